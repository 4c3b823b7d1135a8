"""Distillation through a server: nothing lost, nothing doubled, whatever goes wrong."""

import asyncio
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import Request, urlopen

import pytest
from datasets import Dataset

from medusa_nb.distillation import read_lines
from medusa_nb.errors import InputError
from medusa_nb.remote import RemoteSettings, distil_remotely, pieces
from medusa_nb.server import serving

QUICK = RemoteSettings(max_new_tokens=12, concurrency=8, attempts=8, pause=0.01, timeout=3)
FAULTS = ("429", "500", "dropped", "truncated", "not json", "empty")


class Echo(BaseHTTPRequestHandler):
    """A chat server that answers with the number of turns and the last word, and faults of a chosen share."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        if server.dead:
            return self.connection.close()
        with server.lock:
            server.seen.append(request)
            fault = server.source.choice(FAULTS) if server.source.random() < server.share else ""
            server.faults[fault] += 1
        time.sleep(server.delay)
        words = request["messages"][-1]["content"].split()
        if "unanswerable" in words:
            return self.send(400, b'{"error": "no"}')
        if fault in ("429", "500"):
            return self.send(int(fault), b"{}")
        text = "" if fault == "empty" else f"{len(request['messages'])} {words[-1]}"
        message = dict(role="assistant", content=text)
        choice = dict(index=0, message=message, finish_reason="stop")
        usage = dict(prompt_tokens=5, completion_tokens=3, total_tokens=8)
        answer = dict(id="x", object="chat.completion", created=0, model="m", choices=[choice], usage=usage)
        body = json.dumps(answer).encode()
        if fault == "dropped":
            return self.connection.close()
        if fault == "truncated":
            return self.send(200, body, length=len(body) + 50)
        return self.send(200, b"<html>" if fault == "not json" else body)

    def send(self, status: int, body: bytes, length: int | None = None):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)
        if length:
            self.close_connection = True

    def log_message(self, *arguments):
        pass

    def handle(self):
        try:
            super().handle()
        except (ConnectionError, ValueError):
            pass


def start(share: float = 0.0, delay: float = 0.0, port: int = 0) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", port), Echo)
    server.lock, server.seen, server.faults = threading.Lock(), [], Counter()
    server.source, server.share, server.delay, server.dead = random.Random(0), share, delay, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def url(server) -> str:
    return f"http://127.0.0.1:{server.server_port}/v1"


@pytest.fixture
def server():
    server = start()
    yield server
    server.shutdown()


def prompts(count: int, turns: int = 1, text: str = "word") -> Dataset:
    rows = []
    for i in range(count):
        messages = [dict(role="system", content="be brief")]
        for turn in range(turns):
            messages += [dict(role="user", content=f"{text}{i}-{turn}"), dict(role="assistant", content="not mine")]
        rows.append(dict(id=f"p{i}", split="train", messages=messages))
    return Dataset.from_list(rows)


def test_turns_are_answered_with_its_own_earlier_answers(server, tmp_path):
    report = distil_remotely([url(server)], "m", prompts(3, turns=2), tmp_path / "a.jsonl", QUICK)
    assert (report["answered"], report["failed"], report["tokens"]) == (3, {}, 18)
    for row in read_lines(tmp_path / "a.jsonl"):
        i = row["id"][1:]
        said = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        assert said == [f"2 word{i}-0", f"4 word{i}-1"]
        assert row["messages"][0]["role"] == "system"
        assert (row["finish_reason"], row["completion_tokens"], row["loop"]) == ("stop", 6, False)


def test_limits_are_always_sent_and_requests_run_side_by_side(tmp_path):
    server = start(delay=0.2)
    started = time.perf_counter()
    distil_remotely([url(server)], "m", prompts(16), tmp_path / "a.jsonl", QUICK)
    assert time.perf_counter() - started < 16 * 0.2
    assert all(r["max_tokens"] == 12 and r["temperature"] == 0 for r in server.seen)
    server.shutdown()


def test_several_servers_share_the_work(server, tmp_path):
    other = start()
    distil_remotely([url(server), url(other)], "m", prompts(20), tmp_path / "a.jsonl", QUICK)
    assert len(server.seen) == len(other.seen) == 10
    other.shutdown()


def test_a_fifth_of_faults_loses_and_doubles_nothing(tmp_path):
    server = start(share=0.2)
    report = distil_remotely([url(server)], "m", prompts(60, turns=2), tmp_path / "a.jsonl", QUICK)
    rows = read_lines(tmp_path / "a.jsonl")
    assert {row["id"] for row in rows} == {f"p{i}" for i in range(60)} and len(rows) == 60
    assert report["failed"] == {}
    assert all(server.faults[fault] for fault in FAULTS)  # each kind really happened
    assert all(m["content"].strip() for row in rows for m in row["messages"])
    server.shutdown()


def test_what_cannot_be_answered_is_listed_and_tried_again(server, tmp_path):
    file, rows = tmp_path / "a.jsonl", list(prompts(3))
    bad = [dict(id=f"bad{i}", split="train", messages=[dict(role="user", content="unanswerable")]) for i in range(2)]
    report = distil_remotely([url(server)], "m", Dataset.from_list(rows + bad), file, QUICK)
    assert set(report["failed"]) == {"bad0", "bad1"} and "HTTP 400" in report["failed"]["bad0"]
    assert {row["id"] for row in read_lines(tmp_path / "a.jsonl.failed")} == {"bad0", "bad1"}
    asked = len(server.seen)
    report = distil_remotely([url(server)], "m", Dataset.from_list(rows + bad), file, QUICK)
    assert (report["resumed"], len(server.seen) - asked) == (3, 2)


def test_a_server_that_dies_and_comes_back(tmp_path):
    server = start(delay=0.05)
    port = server.server_port
    patient = RemoteSettings(max_new_tokens=12, concurrency=4, attempts=12, pause=0.05, timeout=2)

    def restart():
        time.sleep(0.3)
        server.dead = True  # connections that are open die, too
        server.shutdown()
        server.server_close()
        time.sleep(0.5)
        start(port=port)

    thread = threading.Thread(target=restart)
    thread.start()
    report = distil_remotely([f"http://127.0.0.1:{port}/v1"], "m", prompts(60), tmp_path / "a.jsonl", patient)
    thread.join()
    assert report["answered"] == 60 and report["failed"] == {}
    assert report["retries"]


CLIENT = """
import json, sys
from datasets import Dataset
from medusa_nb.remote import RemoteSettings, distil_remotely
settings = RemoteSettings(max_new_tokens=12, concurrency=4, attempts=8, pause=0.01, timeout=5)
report = distil_remotely([sys.argv[1]], "m", Dataset.from_list(json.loads(sys.argv[3])), sys.argv[2], settings)
print(json.dumps(report))
"""


def test_a_client_killed_three_times_ends_complete(tmp_path):
    server, file = start(share=0.2, delay=0.1), tmp_path / "a.jsonl"
    command = [sys.executable, "-c", CLIENT, url(server), str(file), json.dumps(list(prompts(80)))]
    killed = 0
    for lines in (5, 20, 45):
        client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while client.poll() is None and (not file.exists() or file.read_text().count("\n") < lines):
            time.sleep(0.02)
        client.send_signal(signal.SIGKILL)
        killed += client.wait() == -signal.SIGKILL
    done = subprocess.run(command, capture_output=True, text=True)
    assert killed == 3 and done.returncode == 0, done.stderr
    rows = read_lines(file)
    assert len(rows) == 80 and {row["id"] for row in rows} == {f"p{i}" for i in range(80)}
    assert json.loads(done.stdout.splitlines()[-1])["resumed"] >= 45
    server.shutdown()


def test_other_settings_no_server_no_prompts(server, tmp_path):
    distil_remotely([url(server)], "m", prompts(1), tmp_path / "a.jsonl", QUICK)
    with pytest.raises(InputError, match="other settings.*model"):
        distil_remotely([url(server)], "other", prompts(1), tmp_path / "a.jsonl", QUICK)
    with pytest.raises(InputError, match="name at least one server"):
        distil_remotely([], "m", prompts(1), tmp_path / "a.jsonl", QUICK)
    with pytest.raises(InputError, match="no prompt to answer"):
        distil_remotely([url(server)], "m", prompts(1).select([]), tmp_path / "b.jsonl", QUICK)


def test_the_key_comes_from_the_environment_and_stays_there(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    distil_remotely([url(server)], "m", prompts(1), tmp_path / "a.jsonl", QUICK)
    output = capsys.readouterr()
    assert "sk-secret" not in output.out + output.err + (tmp_path / "a.jsonl").read_text()


def test_it_also_runs_where_an_event_loop_runs(server, tmp_path):
    async def notebook():
        return distil_remotely([url(server)], "m", prompts(2), tmp_path / "a.jsonl", QUICK)

    assert asyncio.run(notebook())["answered"] == 2


def test_a_missing_client_is_said(server, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match="install requirements-serve.txt"):
        distil_remotely([url(server)], "m", prompts(1), tmp_path / "a.jsonl", QUICK)


def test_pieces_of_a_text_show_its_loops():
    from medusa_nb.distillation import is_loop

    assert is_loop(pieces("x = 1\n" * 20))
    assert not is_loop(pieces("def f(a, b):\n    return a + b\n"))


def test_through_a_real_server(tmp_path):
    from conftest import DEFAULT

    rows = [dict(id=f"p{i}", split="train", messages=[dict(role="user", content=f"def f{i}(x):")]) for i in range(3)]
    settings = RemoteSettings(max_new_tokens=8, concurrency=3)
    with serving(DEFAULT) as base:
        with urlopen(Request(base.replace("/v1", "/health")), timeout=5) as answer:
            assert answer.status == 200
        report = distil_remotely([base], str(DEFAULT), Dataset.from_list(rows), tmp_path / "a.jsonl", settings)
    assert report["answered"] == 3, report
    assert {row["finish_reason"] for row in read_lines(tmp_path / "a.jsonl")} <= {"stop", "length"}
