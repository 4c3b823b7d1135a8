"""Self-distillation through servers: any OpenAI-compatible ``/v1/chat/completions``, many requests in flight.

Failures are expected. A conversation is written only when all its turns are answered; what could not be
answered is listed by id beside the file and tried again on the next run.
"""

import asyncio
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from medusa_nb.distillation import claim, is_loop, read_lines, sync, write_record
from medusa_nb.errors import InputError
from medusa_nb.progress import progress
from medusa_nb.server import openai_package

FINAL = {400, 401, 403, 404, 413, 422}  # asking again would not help


@dataclass(frozen=True)
class RemoteSettings:
    """How servers are asked. ``max_new_tokens`` counts per turn and is always sent, as is ``temperature``.

    ``attempts`` per turn, the pause between them doubling from ``pause`` seconds; ``timeout`` seconds a request.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    concurrency: int = 64
    attempts: int = 6
    pause: float = 0.5
    timeout: float = 300.0


def distil_remotely(
    urls: list[str], model: str, prompts: Dataset, file: str | Path, settings: RemoteSettings | None = None
) -> dict:
    """Let servers answer every prompt that ``file`` does not hold yet; append answers to it.

    Lines are those of :func:`medusa_nb.distillation.distil`. Requests are shared out over ``urls``. The API
    key comes from ``OPENAI_API_KEY`` only.

    Returns:
        A report: ``answered``, ``resumed``, ``failed`` (reason by id, also in ``<file>.failed``), ``tokens``,
        ``seconds`` and ``tokens_per_second``.

    Raises:
        InputError: no prompts, no URL, another model or other settings than the file was made with.
    """
    settings = settings or RemoteSettings()
    if not urls:
        raise InputError("name at least one server, for instance http://127.0.0.1:8000/v1")
    if not len(prompts):
        raise InputError("there is no prompt to answer; the data set is empty")
    file = Path(file)
    kept = {name: getattr(settings, name) for name in ("max_new_tokens", "temperature", "seed")}
    claim(file, kept | dict(model=model))
    done = {row["id"] for row in read_lines(file, repair=True)}
    open_ = [row for row in prompts if row["id"] not in done]
    report = run_anywhere(_answer_all(urls, model, open_, file, settings))
    report["resumed"] = len(done)
    failures = file.with_name(file.name + ".failed")
    if report["failed"]:
        lines = (json.dumps(dict(id=name, reason=reason)) for name, reason in sorted(report["failed"].items()))
        failures.write_text("\n".join(lines) + "\n")
    else:
        failures.unlink(missing_ok=True)
    return report


def run_anywhere(work: Coroutine) -> dict:
    """Run a coroutine to its end, also from a notebook, whose own event loop is running already."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


async def _answer_all(urls, model, rows: list[dict], file: Path, settings: RemoteSettings) -> dict:
    key = os.environ.get("OPENAI_API_KEY", "none")
    clients = [
        openai_package().AsyncOpenAI(base_url=u, api_key=key, max_retries=0, timeout=settings.timeout) for u in urls
    ]
    report = dict(answered=0, failed={}, retries=Counter(), tokens=0, seconds=0.0)
    bar = progress(len(rows), "conversation", "answering")
    waiting = iter(enumerate(rows))
    started = time.perf_counter()

    async def work(handle):
        for number, row in waiting:  # one iterator for all workers: each row is taken once
            try:
                record = await _answer(clients, number, model, row, settings, report["retries"])
            except Unanswered as failure:
                report["failed"][row["id"]] = str(failure)
            else:
                write_record(handle, record)
                report["answered"] += 1
                report["tokens"] += record["completion_tokens"]
            report["seconds"] = time.perf_counter() - started
            bar.update()
            bar.set_postfix_str(f"{report['tokens'] / report['seconds']:,.0f} tokens/s", refresh=False)

    with file.open("a") as handle:
        await asyncio.gather(*(work(handle) for _ in range(min(settings.concurrency, max(1, len(rows))))))
        sync(handle)
    bar.close()
    for client in clients:
        await client.close()
    report["retries"] = dict(report["retries"])
    report["tokens_per_second"] = report["tokens"] / report["seconds"] if report["tokens"] else 0.0
    return report


class Unanswered(Exception):
    """A turn that no attempt could answer; the message says why."""


async def _answer(clients, number: int, model: str, row: dict, settings: RemoteSettings, retries: Counter) -> dict:
    """The record of one conversation, its turns answered one after the other with the model's own answers."""
    turns = [message for message in row["messages"] if message["role"] != "assistant"]
    messages: list[dict] = []
    record = dict(id=row["id"], split=row["split"], finish_reason="", prompt_tokens=0, completion_tokens=0, loop=False)
    for turn in turns:
        messages.append(turn)
        if turn["role"] != "user":
            continue
        text, finish, usage = await _ask(clients, number, model, messages, settings, retries)
        messages.append(dict(role="assistant", content=text))
        record["finish_reason"] = finish
        record["prompt_tokens"] += usage[0]
        record["completion_tokens"] += usage[1]
        record["loop"] = record["loop"] or is_loop(pieces(text))
    if record["completion_tokens"] == 0 and not any(m["role"] == "assistant" for m in messages):
        raise Unanswered("there is no user turn")
    return dict(id=row["id"], split=row["split"], messages=messages) | record


async def _ask(clients, number, model, messages, settings: RemoteSettings, retries: Counter) -> tuple[str, str, tuple]:
    """One turn's text, finish_reason and token counts; tries again, on the next server, after what may pass."""
    openai, reason = openai_package(), ""
    for attempt in range(settings.attempts):
        if attempt:
            retries[reason] += 1
            await asyncio.sleep(settings.pause * 2 ** (attempt - 1) * (0.5 + random.random()))
        try:
            answer = await clients[(number + attempt) % len(clients)].chat.completions.create(
                model=model,
                messages=messages,
                max_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                seed=settings.seed,
            )
            choice = answer.choices[0]
            text, finish = choice.message.content, choice.finish_reason
            if finish not in ("stop", "length"):
                reason = f"finish_reason {finish!r}"
            elif not (text or "").strip():
                reason = "empty answer"
            else:
                usage = answer.usage
                return text, finish, (usage.prompt_tokens, usage.completion_tokens) if usage else (0, len(pieces(text)))
        except openai.APIStatusError as error:
            reason = f"HTTP {error.status_code}"
            if error.status_code in FINAL:
                raise Unanswered(f"{reason}: {str(error)[:200]}") from error
        except openai.APITimeoutError:
            reason = "time-out"
        except openai.APIConnectionError:
            reason = "connection lost"
        except (openai.APIError, ValueError, TypeError, AttributeError, IndexError):
            reason = "unreadable answer"
    raise Unanswered(f"{reason}, {settings.attempts} times")


def pieces(text: str) -> list[int]:
    """Words and marks of a text as numbers, for the loop detector where there are no token ids."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(piece, len(numbers)) for piece in re.findall(r"\w+|\W", text)]


def settings_from(options) -> RemoteSettings:
    """Settings from the command line's options."""
    known = RemoteSettings.__dataclass_fields__
    return RemoteSettings(
        **{name: value for name, value in vars(options).items() if name in known and value is not None}
    )


def describe(report: dict) -> dict:
    """A report as it is printed: failures counted by reason, and the first ids."""
    failed = report["failed"]
    return report | dict(failed=dict(Counter(failed.values())), failed_ids=sorted(failed)[:20])
