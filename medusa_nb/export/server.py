"""``transformers serve`` on loopback, for as long as a ``with`` block lasts."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from medusa_nb.distillation.servers import openai_package
from medusa_nb.errors import InputError


def free_port() -> int:
    """A port on loopback that nobody uses right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(model: str | Path, trust_remote_code: bool = False, compiled: bool = False) -> Iterator[str]:
    """Start an OpenAI-compatible server for ``model``; yields its base URL and stops it at the end.

    Listens on 127.0.0.1 only. ``compiled``: the server's ``--compile``; its first answer then takes longer.

    Raises:
        InputError: the serving packages are missing, or the server does not come up; with its last words.
    """
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model), "--dtype", "auto"]
    command += ["--trust-remote-code"] if trust_remote_code else []
    command += ["--compile"] if compiled else []
    with running(command, "/health") as url:
        yield url


@contextmanager
def running(command: list[str], health: str, environment: dict | None = None, timeout: float = 300) -> Iterator[str]:
    """Run a server command with ``--host 127.0.0.1 --port N`` added; yields ``http://127.0.0.1:N/v1``.

    ``health``: a path that is answered once the server is ready.
    """
    port = free_port()
    command = [*command, "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | dict(HF_HUB_OFFLINE=os.environ.get("HF_HUB_OFFLINE", "1")) | (environment or {})
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            wait_until_ready(server, f"http://127.0.0.1:{port}{health}", timeout, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def wait_until_ready(server: subprocess.Popen, url: str, timeout: float, log) -> None:
    """Ask until the server answers, ends or the time is up."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.3)
    log.seek(0)
    last = log.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
    if "Missing dependencies" in "".join(last):
        raise InputError("transformers serve needs further packages; pip install 'medusa-nb[serve]'")
    raise InputError(f"the server did not come up: {last[-1]}")


@cache
def client_of(url: str):
    """The ``openai`` client of a server: kept, because making one takes longer than a short answer."""
    return openai_package().OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"), timeout=300)


def ask(url: str, model: str | Path, messages: list[dict], max_tokens: int, stream: bool = False) -> str:
    """One greedy answer from an OpenAI-compatible server, sent whole or (``stream``) piece by piece."""
    asked = dict(model=str(model), messages=messages, max_tokens=max_tokens, temperature=0)
    answer = client_of(url).chat.completions.create(**asked, stream=stream)
    if not stream:
        return answer.choices[0].message.content
    return "".join(piece.choices[0].delta.content or "" for piece in answer if piece.choices)
