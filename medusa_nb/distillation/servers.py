"""Self-distillation through servers: any OpenAI-compatible ``/v1/chat/completions``, many requests in flight.

Every server takes the next conversation when it is ready for one, so a fast one answers more. One that dies hands its
conversations back to the others. A conversation is written only when all its turns are answered; what could not be
answered is listed by id in ``<file>.failed`` and tried again on the next run.
"""

import asyncio
import json
import os
import re
from collections import Counter, deque
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from medusa_nb.chat import clean_text
from medusa_nb.distillation.records import AnswerFile, is_loop
from medusa_nb.errors import InputError
from medusa_nb.storage import write_text

# how servers say that the model ended by itself, or that the limit cut it off (OpenAI, vLLM, llama.cpp, TGI)
FINISHED = dict(stop="stop", eos_token="stop", stop_sequence="stop", eos="stop", length="length", max_tokens="length")


@dataclass(frozen=True)
class ServerSettings:
    """How servers are asked. ``max_new_tokens`` counts per turn and is always sent, as is ``temperature``.

    ``concurrency``: requests in flight at each server. ``attempts`` per turn, with the client's growing pauses;
    ``timeout`` seconds a request.
    """

    max_new_tokens: int = 160
    temperature: float = 0.0
    seed: int = 0
    concurrency: int = 64
    attempts: int = 4
    timeout: float = 300.0

    def __post_init__(self):
        if min(self.max_new_tokens, self.concurrency, self.attempts) < 1 or not self.timeout > 0:
            raise InputError("max_new_tokens, concurrency and attempts are at least 1, and timeout is above 0")


class Unanswered(Exception):
    """A turn that cannot be answered; the message says why."""


class ConnectionLost(Exception):
    """No attempt reached the server, or none got an answer back."""


def openai_package():
    """The ``openai`` client, which is an optional package.

    Raises:
        InputError: it is not installed.
    """
    try:
        import openai
    except ImportError as error:
        raise InputError("asking a server needs the openai package; pip install 'medusa-nb[serve]'") from error
    return openai


def distil_from_servers(
    urls: list[str],
    model: str,
    prompts: Dataset,
    file: str | Path,
    settings: ServerSettings | None = None,
    dropped: Counter | None = None,
) -> dict:
    """Let servers answer every prompt that ``file`` does not hold yet; append answers to it.

    Lines are those of :mod:`medusa_nb.distillation.records`. The API key comes from ``OPENAI_API_KEY`` only.

    Returns:
        A report: ``answered``, ``resumed``, ``failed`` (reason by id), ``servers`` (answers of each), ``dropped``,
        ``tokens``, ``seconds`` and ``tokens_per_second``.

    Raises:
        InputError: no prompts, no URL, nothing answers there, or another model or settings than the file was made
            with.
    """
    settings = settings or ServerSettings()
    if not urls:
        raise InputError("name at least one server, for instance http://127.0.0.1:8000/v1")
    made_with = dict(model=model, **{n: getattr(settings, n) for n in ("max_new_tokens", "temperature", "seed")})
    with AnswerFile(file, made_with, len(prompts), dropped) as answers:
        waiting = deque(row for row in prompts if row["id"] not in answers.answered)
        answers.report |= dict(failed={}, servers=Counter())
        run_anywhere(_answer_all(urls, model, waiting, answers, settings))
    failed, beside = answers.report["failed"], answers.file.with_name(answers.file.name + ".failed")
    if failed:
        lines = (json.dumps(dict(id=name, reason=reason)) for name, reason in sorted(failed.items()))
        write_text(beside, "\n".join(lines) + "\n")
    else:
        beside.unlink(missing_ok=True)
    answers.report["servers"] = dict(answers.report["servers"])
    return answers.report


def run_anywhere(work: Coroutine):
    """Run a coroutine to its end, also from a notebook, whose own event loop is running already.

    Ctrl-C cancels it at once.
    """
    started: list = []

    async def main():
        started.append((asyncio.get_running_loop(), asyncio.current_task()))
        return await work

    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(asyncio.run, main())
        try:
            return future.result()
        except KeyboardInterrupt:
            for loop, task in started:
                loop.call_soon_threadsafe(task.cancel)
            raise


async def _answer_all(urls, model: str, waiting: deque, answers: AnswerFile, settings: ServerSettings) -> None:
    openai = openai_package()
    key = os.environ.get("OPENAI_API_KEY", "none")
    how = dict(api_key=key, timeout=settings.timeout, max_retries=settings.attempts - 1)
    clients = {url: openai.AsyncOpenAI(base_url=url, **how) for url in dict.fromkeys(urls)}
    try:
        for url, client in clients.items():
            await _say_hello(openai, url, client)
        lost: dict[str, str] = {}
        while waiting and len(lost) < len(clients):  # again for what a lost server has handed back
            there = {url: client for url, client in clients.items() if url not in lost}
            servers = (_serve(url, client, model, waiting, answers, settings, lost) for url, client in there.items())
            await asyncio.gather(*servers)
        answers.report["failed"] |= {row["id"]: "; ".join(lost.values()) for row in waiting}
    finally:
        for client in clients.values():
            await client.close()


async def _say_hello(openai, url: str, client) -> None:
    """Raise :class:`InputError` unless a server answers there."""
    try:
        await client.with_options(max_retries=0, timeout=20).models.list()
    except openai.AuthenticationError as error:
        raise InputError(f"the server at {url} wants another key; set OPENAI_API_KEY") from error
    except openai.APIConnectionError as error:
        raise InputError(f"nothing answers at {url}; start the server first, or correct the address") from error
    except (openai.APIError, ValueError, TypeError, AttributeError):
        pass  # it is there, and has no list of models


async def _serve(url, client, model, waiting: deque, answers: AnswerFile, settings: ServerSettings, lost: dict) -> None:
    """Let one server answer until nothing is waiting or it is lost."""

    async def work() -> None:
        while waiting and url not in lost:
            row = waiting.popleft()
            try:
                answers.add(await _answer(client, model, row, settings))
                answers.report["servers"][url] += 1
            except Unanswered as failure:
                answers.report["failed"][row["id"]] = str(failure)
            except ConnectionLost:
                try:
                    await _say_hello(openai_package(), url, client)
                    answers.report["failed"][row["id"]] = f"connection lost, {settings.attempts} times"
                except InputError as error:
                    lost[url] = str(error)
                    waiting.append(row)

    await asyncio.gather(*(work() for _ in range(min(settings.concurrency, max(1, len(waiting))))))


async def _answer(client, model: str, row: dict, settings: ServerSettings) -> dict:
    """The record of one conversation, its turns answered one after the other with the model's own answers."""
    messages: list[dict] = []
    record = dict(id=row["id"], split=row["split"], finish_reason="", prompt_tokens=0, completion_tokens=0, loop=False)
    for turn in row["messages"]:
        if turn["role"] == "assistant":
            continue
        messages.append(dict(role=turn["role"], content=clean_text(turn["content"])))
        if turn["role"] == "user":
            text, finish, prompt_tokens, tokens = await _ask(client, model, messages, settings)
            messages.append(dict(role="assistant", content=text))
            record["finish_reason"] = finish
            record["prompt_tokens"] += prompt_tokens
            record["completion_tokens"] += tokens
            record["loop"] = record["loop"] or is_loop(pieces(text))
    if not record["finish_reason"]:
        raise Unanswered("there is no user turn")
    return dict(id=row["id"], split=row["split"], messages=messages) | record


async def _ask(client, model: str, messages: list[dict], settings: ServerSettings) -> tuple[str, str, int, int]:
    """One turn's text, how it ended, and its token counts."""
    openai = openai_package()
    try:
        answer = await client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=settings.seed,
        )
    except openai.APITimeoutError as error:  # after the client's own attempts, as below
        raise Unanswered(f"time-out, {settings.attempts} times") from error
    except openai.APIConnectionError as error:
        raise ConnectionLost from error
    except openai.APIStatusError as error:
        raise Unanswered(f"HTTP {error.status_code}: {str(error)[:200]}") from error
    except (openai.APIError, ValueError, TypeError, AttributeError) as error:
        raise Unanswered("unreadable answer") from error
    choices = getattr(answer, "choices", None)
    message = choices[0].message if choices else None
    if message is None:
        raise Unanswered("unreadable answer")
    if getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None):
        raise Unanswered(
            "the server keeps the reasoning apart from the answer, so heads would never learn it; start it without a "
            "reasoning parser"
        )
    text, finish = clean_text(message.content or ""), FINISHED.get(str(choices[0].finish_reason))
    if finish is None:
        raise Unanswered(f"finish_reason {choices[0].finish_reason!r}")
    if not text.strip():
        raise Unanswered("empty answer")
    usage = answer.usage
    counts = (usage.prompt_tokens or 0, usage.completion_tokens or 0) if usage else (0, len(pieces(text)))
    return text, finish, *counts


def pieces(text: str) -> list[int]:
    """Words and marks of a text as numbers, for the loop detector where there are no token ids."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(piece, len(numbers)) for piece in re.findall(r"\w+|\W", text)]
