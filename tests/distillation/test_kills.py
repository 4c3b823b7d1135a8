"""``medusa-nb distill`` killed at random moments: at the end the file is that of an undisturbed run.

``MEDUSA_NB_KILLS`` says how often each of the two tests kills.
"""

import json
import multiprocessing
import os
import random
import time

import pytest
from chat_server import echo, user

from medusa_nb.cli import main
from medusa_nb.distillation.records import load_answers

pytest_plugins = ["distillation_fixtures"]

KILLS = int(os.environ.get("MEDUSA_NB_KILLS", 2))
IMPORTED = ["medusa_nb.distillation.in_process", "medusa_nb.distillation.servers", "medusa_nb.cli"]
IMPORTED += ["openai.resources.chat", "anyio.from_thread", "transformers.models.llama.modeling_llama"]


@pytest.fixture(scope="module")
def start():
    """Starts the command in a process of its own, in which everything is imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)

    def start(arguments: list[str]):
        process = context.Process(target=main, args=(arguments,))
        process.start()
        return process

    return start


@pytest.fixture
def prompt_file(tmp_path):
    file = tmp_path / "chats.jsonl"
    rows = [user(*[f"count to {i}"] * (1 + i % 3), name=str(i)) for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def kill_at_random_moments(start, out, arguments: list[str]) -> list[dict]:
    """Run the command to its end, again and again killed after so many new answers; the records at the end."""
    source, killed, seen = random.Random(0), 0, []
    for _ in range(20 * KILLS):
        if killed == KILLS:
            break
        if out.exists() and out.read_text().count("\n") > 30:  # begin anew, so that there is something to kill
            for file in out.parent.glob(out.name + "*"):
                file.unlink()
        before = out.stat().st_size if out.exists() else 0
        enough = before + source.randrange(1, 1500)
        process = start(arguments)
        while process.is_alive() and (not out.exists() or out.stat().st_size < enough):
            time.sleep(0.001)
        time.sleep(source.random() * 0.02)
        process.kill()
        process.join()
        killed += process.exitcode == -9
        seen.append(out.stat().st_size)
    assert killed == KILLS
    print(f"killed {killed} times, at {seen} bytes")
    assert main(arguments) == 0
    rows = load_answers(out)
    assert len({row["id"] for row in rows}) == len(rows) == 40
    return sorted(rows, key=lambda row: int(row["id"].split(":")[1]))


def undisturbed(out, arguments: list[str]) -> list[dict]:
    assert main(arguments) == 0
    return sorted(load_answers(out), key=lambda row: int(row["id"].split(":")[1]))


def test_killed_while_the_model_answers_in_process(start, tmp_path, tiny_folder, prompt_file):
    def arguments(out):
        limits = ["--max-new-tokens", "10", "--batch-size", "4"]
        return ["distill", str(out), "--model", str(tiny_folder), "--prompts", str(prompt_file), *limits]

    parts, whole = tmp_path / "parts.jsonl", tmp_path / "whole.jsonl"
    keep = ["--keep-states", str(tmp_path / "states")]
    assert kill_at_random_moments(start, parts, arguments(parts) + keep) == undisturbed(whole, arguments(whole))


def test_killed_while_a_server_answers(start, chat_server, tmp_path, prompt_file):
    def slowly(handler, request):
        time.sleep(0.005)
        return echo(handler, request)

    def arguments(out):
        how = ["--server", server.url, "--model", "m", "--concurrency", "2", "--prompts", str(prompt_file)]
        return ["distill", str(out), *how]

    server, parts, whole = chat_server(slowly), tmp_path / "parts.jsonl", tmp_path / "whole.jsonl"
    assert kill_at_random_moments(start, parts, arguments(parts)) == undisturbed(whole, arguments(whole))
