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
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from medusa_nb.chat import clean_text
from medusa_nb.distillation.records import AnswerFile, AnswerSettings, Conversation, asked_turns, is_loop
from medusa_nb.errors import InputError
from medusa_nb.storage import write_text

# how servers say that the model ended by itself, or that the limit cut it off (OpenAI, vLLM, llama.cpp, TGI, others)
FINISHED = dict.fromkeys(("stop", "eos", "eos_token", "stop_sequence", "end_turn"), "stop")
FINISHED |= dict.fromkeys(("length", "limit", "max_tokens"), "length")
# what reading an answer of any other shape than the expected one ends in
UNREADABLE = (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class ServerSettings(AnswerSettings):
    """How servers are asked; ``max_new_tokens`` and ``temperature`` are always sent.

    ``concurrency``: requests in flight at each server. ``attempts`` per turn, with the client's growing pauses;
    ``timeout`` seconds a request.
    """

    concurrency: int = 64
    attempts: int = 4
    timeout: float = 300.0


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
    openai_package()
    from anyio.from_thread import start_blocking_portal  # comes with openai

    async def main() -> dict:
        clients = {url: await _client(url, settings) for url in dict.fromkeys(urls)}
        try:
            with AnswerFile(file, settings.made_with(model), len(prompts), dropped) as answers:
                await _answer_all(clients, model, prompts, answers, settings)
            return answers.report
        finally:
            await asyncio.gather(*(client.close() for client in clients.values()))

    with start_blocking_portal() as portal:  # a loop of its own, for a notebook's is running; Ctrl-C cancels all tasks
        report = portal.call(main)
    failed, beside = report["failed"], Path(f"{file}.failed")
    if failed:
        lines = (json.dumps(dict(id=name, reason=reason)) for name, reason in sorted(failed.items()))
        write_text(beside, "\n".join(lines) + "\n")
    else:
        beside.unlink(missing_ok=True)
    return report


async def _client(url: str, settings: ServerSettings):
    """The client of a server that is there.

    Raises:
        InputError: nothing answers at this address, or it wants another key.
    """
    openai = openai_package()
    how = dict(api_key=os.environ.get("OPENAI_API_KEY", "none"), timeout=settings.timeout)
    try:
        client = openai.AsyncOpenAI(base_url=url, max_retries=settings.attempts - 1, **how)
    except Exception as error:  # an address that the HTTP client cannot even split into its parts
        raise InputError(f"'{url}' is no address of a server: {error}") from error
    try:
        await _say_hello(client)
    except InputError:
        await client.close()
        raise
    return client


async def _say_hello(client) -> None:
    openai = openai_package()
    try:
        await client.with_options(max_retries=0, timeout=20).models.list()
    except openai.AuthenticationError as error:
        raise InputError(f"the server at {client.base_url} wants another key; set OPENAI_API_KEY") from error
    except openai.APIConnectionError as error:
        raise InputError(
            f"nothing answers at {client.base_url}; start the server first, or correct the address"
        ) from error
    except (openai.APIError, *UNREADABLE):
        pass  # it is there, and has no list of models


async def _answer_all(clients: dict, model: str, prompts: Dataset, answers: AnswerFile, settings) -> None:
    waiting = deque(answers.still_open(prompts))
    served: Counter[str] = Counter()
    lost: dict[str, str] = {}
    answers.report |= dict(failed={}, servers=served)
    while waiting and len(lost) < len(clients):  # again for what a lost server has handed back
        there = {url: client for url, client in clients.items() if url not in lost}
        servers = (_serve(url, client, model, waiting, answers, settings, lost) for url, client in there.items())
        await asyncio.gather(*servers)
    answers.report["failed"] |= {row["id"]: "; ".join(lost.values()) for row in waiting}
    answers.report["servers"] = dict(served)


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
                    await _say_hello(client)
                    answers.report["failed"][row["id"]] = f"connection lost, {settings.attempts} times"
                except InputError as error:
                    lost[url] = str(error)
                    waiting.append(row)

    await asyncio.gather(*(work() for _ in range(min(settings.concurrency, max(1, len(waiting))))))


async def _answer(client, model: str, row: dict, settings: ServerSettings) -> dict:
    """The record of one conversation, its turns answered one after the other with the model's own answers."""
    conversation = Conversation(row["id"], row["split"], asked_turns(row["messages"]))
    while conversation.turns:
        conversation.answer(**await _ask(client, model, conversation.ask(), settings))
    return conversation.record()


async def _ask(client, model: str, messages: list[dict], settings: ServerSettings) -> dict:
    """One turn's answer, see :meth:`Conversation.answer`."""
    openai = openai_package()
    try:
        answer = await client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=settings.seed,
        )
        return _read(answer, settings.max_new_tokens)
    except openai.APITimeoutError as error:  # after the client's own attempts, as below
        raise Unanswered(f"time-out, {settings.attempts} times") from error
    except openai.APIConnectionError as error:
        raise ConnectionLost from error
    except openai.APIStatusError as error:
        raise Unanswered(f"HTTP {error.status_code}: {str(error)[:200]}") from error
    except (openai.APIError, *UNREADABLE) as error:
        raise Unanswered("unreadable answer") from error


def _read(answer, max_new_tokens: int) -> dict:
    choice, usage = answer.choices[0], answer.usage
    message = choice.message
    text = clean_text(message.content or "")
    thought = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None) or ""
    thought = clean_text(thought)
    prompt_tokens = int(usage.prompt_tokens or 0) if usage else 0
    tokens = int(usage.completion_tokens or 0) if usage else len(pieces(thought + text))
    reason = str(choice.finish_reason or ("stop" if tokens < max_new_tokens else "length")).lower()
    if reason not in FINISHED:
        raise Unanswered(f"finish_reason {choice.finish_reason!r}")
    if not text.strip():
        raise Unanswered("the limit cut it off while it was still reasoning" if thought else "empty answer")
    said = dict(role="assistant", content=text) | (dict(reasoning_content=thought) if thought else {})
    return dict(
        message=said,
        finish_reason=FINISHED[reason],
        prompt_tokens=prompt_tokens,
        completion_tokens=tokens,
        loop=is_loop(pieces(thought + text)),
    )


def pieces(text: str) -> list[int]:
    """Words and marks of a text as numbers, for the loop detector where there are no token ids."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(piece, len(numbers)) for piece in re.findall(r"\w+|\W", text)]
