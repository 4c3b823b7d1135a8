"""Distillation through servers: nothing lost, nothing doubled, whatever goes wrong."""

import asyncio
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
from chat_server import completion, echo
from datasets import Dataset

from medusa_nb.chat import encode_conversation
from medusa_nb.cli import main
from medusa_nb.distillation.records import is_loop, load_answers
from medusa_nb.distillation.servers import ServerSettings, distil_from_servers, pieces
from medusa_nb.errors import InputError
from medusa_nb.storage import read_lines

pytest_plugins = ["distillation_fixtures"]

QUICK = ServerSettings(max_new_tokens=12, concurrency=8, attempts=1, timeout=20)


def chats(count: int, turns: int = 1) -> Dataset:
    rows = []
    for i in range(count):
        messages = [dict(role="system", content="be brief")]
        for turn in range(turns):
            messages += [dict(role="user", content=f"word{i}-{turn}"), dict(role="assistant", content="not mine")]
        rows.append(dict(id=f"p{i}", split="train", messages=messages))
    return Dataset.from_list(rows)


@pytest.fixture
def prompt_file(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(dict(row, id=row["id"])) + "\n" for row in chats(20)))
    return file


def distill(out, url: str, prompts, *more: str) -> list[str]:
    return ["distill", str(out), "--server", url, "--model", "m", "--prompts", str(prompts), *more]


def test_turns_are_answered_with_the_servers_own_earlier_answers(chat_server, tmp_path):
    server = chat_server()
    report = distil_from_servers([server.url], "m", chats(3, turns=2), tmp_path / "a.jsonl", QUICK)
    assert (report["answered"], report["failed"], report["tokens"]) == (3, {}, 18)
    assert report["servers"] == {server.url: 3}
    for row in load_answers(tmp_path / "a.jsonl"):
        i = row["id"][1:]
        said = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        assert said == [f"2 word{i}-0", f"4 word{i}-1"]
        assert row["messages"][0]["role"] == "system"
        assert (row["finish_reason"], row["completion_tokens"], row["loop"]) == ("stop", 6, False)
    assert all(r["max_tokens"] == 12 and r["temperature"] == 0 and r["seed"] == 0 for r in server.seen)


@pytest.mark.parametrize(
    ("engine", "reason", "meant"),
    [
        ("TGI", "eos_token", "stop"),
        ("TGI", "stop_sequence", "stop"),
        ("TGI, vLLM, llama.cpp, transformers", "length", "length"),
        ("vLLM, llama.cpp, transformers", "stop", "stop"),
        ("llama.cpp, before its chat format", "eos", "stop"),
        ("llama.cpp, before its chat format", "limit", "length"),
        ("a proxy", "MAX_TOKENS", "length"),
        ("a server that does not say", None, "stop"),
    ],
)
def test_finish_reasons_of_engines(chat_server, tmp_path, engine, reason, meant):  # case 22
    server = chat_server(lambda handler, request: completion("a", reason))
    report = distil_from_servers([server.url], "m", chats(2), tmp_path / "a.jsonl", QUICK)
    assert report["failed"] == {}
    assert {row["finish_reason"] for row in load_answers(tmp_path / "a.jsonl")} == {meant}


@pytest.mark.parametrize("reason", ["abort", "content_filter", "tool_calls"])
def test_nothing_answered_is_an_error_with_the_reason(chat_server, tmp_path, prompt_file, capsys, reason):  # case 22
    server = chat_server(lambda handler, request: completion("a", reason))
    assert main(distill(tmp_path / "a.jsonl", server.url, prompt_file)) == 2
    assert f"nothing was answered: finish_reason '{reason}'" in capsys.readouterr().err


def test_ctrl_c_ends_at_once_and_keeps_what_is_answered(chat_server, tmp_path, prompt_file):  # case 23
    go_on = threading.Event()

    def three_then_wait(handler, request):
        if len(server.seen) > 3:
            go_on.wait(60)
        return echo(handler, request)

    server, out = chat_server(three_then_wait), tmp_path / "a.jsonl"
    command = [sys.executable, "-m", "medusa_nb", *distill(out, server.url, prompt_file, "--concurrency", "1")]
    listening = functools.partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # shells tell background jobs to ignore it
    client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listening)
    try:
        while len(server.seen) < 4 and client.poll() is None:
            time.sleep(0.02)
        client.send_signal(signal.SIGINT)
        started = time.perf_counter()
        _, said = client.communicate(timeout=50)  # well before the server answers
        print(f"ended {time.perf_counter() - started:.2f} s after Ctrl-C")
    finally:
        client.kill()
        go_on.set()
    assert client.returncode == 130
    assert "Traceback" not in said and "the same command goes on from there" in said
    assert len(load_answers(out)) == 3
    assert main(distill(out, server.url, prompt_file)) == 0
    assert len({row["id"] for row in load_answers(out)}) == len(load_answers(out)) == 20


def test_a_locale_that_knows_only_ascii(chat_server, tmp_path):  # case 20
    server, out, prompts = chat_server(), tmp_path / "a.jsonl", tmp_path / "é.jsonl"
    prompts.write_text(json.dumps(dict(messages=[dict(role="user", content="é 漢")]), ensure_ascii=False), "utf-8")
    ascii_only = os.environ | dict(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    command = [sys.executable, "-m", "medusa_nb", *distill(out, server.url, prompts)]
    done = subprocess.run(command, env=ascii_only, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert [m["content"] for m in load_answers(out)[0]["messages"]] == ["é 漢", "1 é 漢"]


def test_nothing_listens(tmp_path, prompt_file, capsys):  # case 24
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert main(distill(tmp_path / "a.jsonl", f"http://127.0.0.1:{port}/v1", prompt_file)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"nothing answers at http://127.0.0.1:{port}/v1" in line and "start the server first" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == [prompt_file.name]


def test_a_server_that_hangs_up_is_asked_once(chat_server, tmp_path):  # case 24
    server = chat_server()
    server.dead = True
    with pytest.raises(InputError, match="nothing answers at"):
        distil_from_servers([server.url], "m", chats(20), tmp_path / "a.jsonl")
    assert (server.looked, len(server.seen)) == (1, 0)


@pytest.mark.parametrize("url", ["127.0.0.1:1", "http://[::1/v1", "localhost", "http://no such host/v1", ""])
def test_an_address_that_is_none(tmp_path, url):
    with pytest.raises(InputError, match="no address of a server|nothing answers at"):
        distil_from_servers([url], "m", chats(1), tmp_path / "a.jsonl")


def test_a_wrong_key_is_said_before_anything_is_asked(chat_server, tmp_path, monkeypatch):
    server = chat_server()
    monkeypatch.setattr(server.RequestHandlerClass, "do_GET", lambda handler: handler.send(401, b"{}"))
    with pytest.raises(InputError, match="wants another key; set OPENAI_API_KEY"):
        distil_from_servers([server.url], "m", chats(1), tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_that_the_server_keeps_apart_stays_with_its_answer(chat_server, tmp_path, tokenizer, name):  # case 25
    server = chat_server(lambda handler, request: completion("b", **{name: "a \ud83d"}))
    report = distil_from_servers([server.url], "m", chats(1, turns=2), tmp_path / "a.jsonl", QUICK)
    [row] = load_answers(tmp_path / "a.jsonl")
    said = dict(role="assistant", content="b", reasoning_content="a \ufffd")
    assert row["messages"][2] == row["messages"][4] == said
    assert said in server.seen[1]["messages"] and report["tokens"] == 6
    with pytest.raises(InputError, match="without its reasoning"):  # its template would leave it out
        encode_conversation(tokenizer, row["messages"])


def test_reasoning_is_the_models_own_where_the_template_lays_it_out(tokenizer):  # case 25
    import copy

    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n"
        "{{ m.reasoning_content }}\n</think>\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [dict(role="user", content="Hi"), dict(role="assistant", content="b", reasoning_content="b or c")]
    encoded = encode_conversation(thinking, turns)
    own = [token for token, mine in zip(encoded.ids, encoded.own, strict=True) if mine]
    assert tokenizer.decode(own) == "<think>\nb or c\n</think>\nb<|im_end|>"


def test_a_limit_reached_while_still_reasoning_is_no_answer(chat_server, tmp_path):  # case 25
    server = chat_server(lambda handler, request: completion(None, "length", reasoning_content="a"))
    report = distil_from_servers([server.url], "m", chats(1), tmp_path / "a.jsonl", QUICK)
    assert "still reasoning" in report["failed"]["p0"]


def test_half_a_surrogate_pair_in_an_answer_and_a_prompt(chat_server, tmp_path, prompt_file):  # case 16
    server = chat_server(lambda handler, request: completion("a \ud83d"))
    record = dict(messages=[dict(role="user", content="x \ud83d")])
    prompt_file.write_text(json.dumps(record) + "\n")
    for _ in range(2):
        assert main(distill(tmp_path / "a.jsonl", server.url, prompt_file)) == 0
    [row] = load_answers(tmp_path / "a.jsonl")
    assert [m["content"] for m in row["messages"]] == ["x \ufffd", "a \ufffd"]


def test_what_cannot_be_answered_is_listed_and_tried_again(chat_server, tmp_path):
    refused = {"word1-0", "word2-0"}

    def refuse_some(handler, request):
        if request["messages"][-1]["content"] in refused:
            return handler.send(400, b'{"error": "no"}')
        return echo(handler, request)

    server, file = chat_server(refuse_some), tmp_path / "a.jsonl"
    report = distil_from_servers([server.url], "m", chats(5), file, QUICK)
    assert set(report["failed"]) == {"p1", "p2"} and "HTTP 400" in report["failed"]["p1"]
    assert [row["id"] for row in read_lines(tmp_path / "a.jsonl.failed")] == ["p1", "p2"]
    refused.clear()
    asked = len(server.seen)
    report = distil_from_servers([server.url], "m", chats(5), file, QUICK)
    assert (report["resumed"], report["answered"], len(server.seen) - asked) == (3, 2, 2)
    assert not (tmp_path / "a.jsonl.failed").exists()


def test_a_busy_server_is_asked_again(chat_server, tmp_path):
    def busy_at_first(handler, request):
        if len(server.seen) % 2:
            return handler.send(429, b"{}", retry_after_ms="1")
        return echo(handler, request)

    server = chat_server(busy_at_first)
    patient = ServerSettings(max_new_tokens=12, concurrency=1, attempts=2)
    assert distil_from_servers([server.url], "m", chats(4), tmp_path / "a.jsonl", patient)["answered"] == 4


def test_servers_of_different_speed_share_the_work_and_one_dies(chat_server, tmp_path):
    fast_is_far = threading.Event()

    def fast(handler, request):
        if len(servers[0].seen) > 25:
            fast_is_far.set()
        return echo(handler, request)

    def slow(handler, request):
        fast_is_far.wait(30)
        return echo(handler, request)

    def dies(handler, request):
        if len(servers[2].seen) > 4:
            servers[2].dead = True
            return handler.reset()
        return echo(handler, request)

    servers = [chat_server(behave) for behave in (fast, slow, dies)]
    settings = ServerSettings(max_new_tokens=12, concurrency=4, attempts=1, timeout=60)
    urls = [server.url for server in servers]
    report = distil_from_servers(urls, "m", chats(60), tmp_path / "a.jsonl", settings)
    rows = load_answers(tmp_path / "a.jsonl")
    assert len(rows) == 60 == len({row["id"] for row in rows}) and report["failed"] == {}
    by_fast, by_slow, by_dead = (report["servers"].get(url, 0) for url in urls)
    assert by_fast + by_slow + by_dead == 60
    assert by_fast > by_slow > 0 and by_dead <= 4


def test_all_servers_die(chat_server, tmp_path):
    def dies(handler, request):
        server.dead = len(server.seen) > 3
        return handler.reset() if server.dead else echo(handler, request)

    server = chat_server(dies)
    one = ServerSettings(max_new_tokens=12, concurrency=1, attempts=1)
    report = distil_from_servers([server.url], "m", chats(10), tmp_path / "a.jsonl", one)
    assert report["answered"] == 3 and len(report["failed"]) == 7
    assert all("nothing answers" in reason for reason in report["failed"].values())


def wrong(**changes):
    """An answer whose top level is changed."""
    return lambda handler: handler.send(200, json.dumps(completion("a") | changes).encode())


def wrong_choice(**changes):
    choice = completion("a")["choices"][0] | changes
    return wrong(choices=[choice])


FAULTS = {
    "connection reset": lambda handler: handler.reset(),
    "500": lambda handler: handler.send(500, b"{}"),
    "429": lambda handler: handler.send(429, b"{}"),
    "503 in HTML": lambda handler: handler.send(503, b"<html>", kind="text/html"),
    "400 that is no JSON": lambda handler: handler.send(400, b"\xff{"),
    "empty body": lambda handler: handler.send(200, b""),
    "broken JSON": lambda handler: handler.send(200, b'{"choices": [{"mess'),
    "truncated": lambda handler: handler.send(200, b'{"choices": []}', length=500),
    "not HTTP": lambda handler: handler.wfile.write(b"hello\r\n\r\n") and handler.reset(),
    "HTML": lambda handler: handler.send(200, b"<html>", kind="text/html"),
    "not UTF-8": lambda handler: handler.send(200, b'{"a": "\xff"}'),
    "said to be gzip": lambda handler: handler.send(200, b"plain", content_encoding="gzip"),
    "deep JSON": lambda handler: handler.send(200, b"[" * 50_000),
    "a long number": lambda handler: handler.send(200, b"9" * 5000),
    "a redirect to itself": lambda handler: handler.send(307, b"", location="/v1/chat/completions"),
    "a list": lambda handler: handler.send(200, b"[1]"),
    "null": lambda handler: handler.send(200, b"null"),
    "a number": lambda handler: handler.send(200, b"3"),
    "a string": lambda handler: handler.send(200, b'"a"'),
    "no choices": wrong(choices=[]),
    "choices null": wrong(choices=None),
    "choices a string": wrong(choices="abc"),
    "choices an object": wrong(choices={"0": 1}),
    "a choice of null": wrong(choices=[None]),
    "message null": wrong_choice(message=None),
    "message a string": wrong_choice(message="a"),
    "content null": wrong_choice(message=dict(role="assistant", content=None)),
    "content a number": wrong_choice(message=dict(role="assistant", content=5)),
    "content a list": wrong_choice(message=dict(role="assistant", content=[1])),
    "reasoning a number": wrong_choice(message=dict(role="assistant", content="a", reasoning_content=5)),
    "blank content": wrong_choice(message=dict(role="assistant", content=" \n")),
    "finish_reason a list": wrong_choice(finish_reason=[1]),
    "usage a string": wrong(usage="many"),
    "tokens a string": wrong(usage=dict(prompt_tokens="x", completion_tokens="y")),
    "tokens infinite": wrong(usage=dict(prompt_tokens=float("inf"), completion_tokens=1)),
    "time-out": lambda handler: time.sleep(1.5),
}


def test_every_prompt_is_answered_or_listed_as_failed_under_faults(chat_server, tmp_path):
    count, source, met = int(os.environ.get("MEDUSA_NB_FAULTS", 72)), random.Random(0), Counter()
    order = [name for _ in range(count // len(FAULTS) + 1) for name in FAULTS][:count]
    healthy = threading.Event()

    def behave(handler, request):
        with server.lock:
            fault = order.pop() if order and source.random() < 0.8 else ""
            met[fault] += 1
        if fault and not healthy.is_set():
            return FAULTS[fault](handler) and None
        return echo(handler, request)

    server, file, rows = chat_server(behave), tmp_path / "a.jsonl", chats(count, turns=2)
    quick = ServerSettings(max_new_tokens=12, concurrency=16, attempts=1, timeout=1)
    rounds = 0
    while order:
        report = distil_from_servers([server.url], "m", rows, file, quick)
        answered = {row["id"] for row in read_lines(file)}
        assert len(read_lines(file)) == len(answered) == report["answered"] + report["resumed"]
        assert answered | report["failed"].keys() == set(rows["id"]) and not answered & report["failed"].keys()
        listed = {row["id"] for row in read_lines(tmp_path / "a.jsonl.failed")}
        assert listed == report["failed"].keys()
        assert all(met[name] for name in FAULTS) or order
        rounds += 1
    print(f"{sum(met[name] for name in FAULTS)} faults of {len(FAULTS)} kinds in {rounds} rounds")
    healthy.set()
    report = distil_from_servers([server.url], "m", rows, file, ServerSettings(12, concurrency=16))
    assert report["failed"] == {} and report["answered"] + report["resumed"] == count
    for row in load_answers(file):
        said = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        assert said == [f"2 word{row['id'][1:]}-0", f"4 word{row['id'][1:]}-1"]


def test_other_settings_no_server_no_prompts(chat_server, tmp_path):
    server, file = chat_server(), tmp_path / "a.jsonl"
    distil_from_servers([server.url], "m", chats(1), file, QUICK)
    with pytest.raises(InputError, match="other settings.*model"):
        distil_from_servers([server.url], "other", chats(1), file, QUICK)
    with pytest.raises(InputError, match="name at least one server"):
        distil_from_servers([], "m", chats(1), file, QUICK)
    with pytest.raises(InputError, match="no prompt to answer"):
        distil_from_servers([server.url], "m", chats(1).select([]), tmp_path / "b.jsonl", QUICK)
    with pytest.raises(InputError, match="is a folder"):  # case 21
        distil_from_servers([server.url], "m", chats(1), tmp_path, QUICK)


@pytest.mark.parametrize("wrong", [dict(concurrency=0), dict(max_new_tokens=-1), dict(timeout=0), dict(temperature=-1)])
def test_settings_out_of_range(wrong):  # case 21
    with pytest.raises(InputError, match=next(iter(wrong))):
        ServerSettings(**wrong)


def test_the_model_of_a_server_has_to_be_named(tmp_path, capsys):
    assert main(["distill", str(tmp_path / "a.jsonl"), "--server", "http://127.0.0.1:1/v1"]) == 2
    assert "name the model that the server serves with --model" in capsys.readouterr().err


def test_the_key_comes_from_the_environment_and_stays_there(chat_server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    distil_from_servers([chat_server().url], "m", chats(1), tmp_path / "a.jsonl", QUICK)
    output = capsys.readouterr()
    assert "sk-secret" not in output.out + output.err + (tmp_path / "a.jsonl").read_text()


def test_it_also_runs_where_an_event_loop_runs(chat_server, tmp_path):
    server = chat_server()

    async def notebook():
        return distil_from_servers([server.url], "m", chats(2), tmp_path / "a.jsonl", QUICK)

    assert asyncio.run(notebook())["answered"] == 2


def test_the_client_package_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"pip install 'medusa-nb\[serve\]'"):
        distil_from_servers(["http://127.0.0.1:1/v1"], "m", chats(1), tmp_path / "a.jsonl", QUICK)


def test_pieces_of_a_text_show_its_loops():
    assert is_loop(pieces("x = 1\n" * 20))
    assert not is_loop(pieces("def f(a, b):\n    return a + b\n"))
