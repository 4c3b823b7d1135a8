"""Answered conversations on disk: a JSONL file that grows line by line, and its faults beside it.

Each line is ``{"id", "split", "messages", "finish_reason", "prompt_tokens", "completion_tokens", "loop"}``. Whatever
could not be answered goes by id and reason to ``<file>.dropped``. A run that was killed goes on by id.
"""

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from medusa_nb.chat import clean_text
from medusa_nb.errors import InputError
from medusa_nb.progress import progress
from medusa_nb.storage import append_line, claim, is_claimed, read_lines, sync

SYNC_SECONDS = 2.0  # a killed process loses nothing it has written, a power cut at most this much
RECORD = ("id", "split", "messages", "finish_reason", "prompt_tokens", "completion_tokens", "loop")
NEEDED = {"id", "split", "messages", "finish_reason", "completion_tokens", "loop"}


@dataclass(frozen=True)
class AnswerSettings:
    """What answers depend on: ``max_new_tokens`` per turn, ``temperature`` (0 is greedy), ``seed`` of random numbers.

    Raises:
        InputError: a number is out of its range.
    """

    max_new_tokens: int = 160
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature={self.temperature}; choose 0 (greedy) or a number above")
        for name, value in vars(self).items():
            if name not in ("temperature", "seed") and not value > 0:
                raise InputError(f"{name}={value}; it has to be above 0")

    def made_with(self, model: str) -> dict:
        """The note beside a file of answers."""
        return dict(model=model, max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=self.seed)


@dataclass
class Conversation:
    """A conversation on its way: the ``turns`` (system and user) still to ask, and the ``messages`` so far."""

    id: str
    split: str
    turns: list[dict]
    messages: list[dict] = field(default_factory=list)
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    loop: bool = False

    def ask(self) -> list[dict]:
        """Move on to the next user turn; the messages up to it."""
        end = next(i for i, turn in enumerate(self.turns) if turn["role"] == "user") + 1
        self.messages, self.turns = self.messages + self.turns[:end], self.turns[end:]
        return self.messages

    def answer(self, message: dict, finish_reason: str, prompt_tokens: int, completion_tokens: int, loop: bool) -> None:
        """Add the model's answer to the turn asked last."""
        self.messages = [*self.messages, message]
        self.finish_reason = finish_reason
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        self.loop = self.loop or loop

    def record(self) -> dict:
        """The line that is written once all turns are answered."""
        return {name: getattr(self, name) for name in RECORD}


def asked_turns(messages: list[dict]) -> list[dict]:
    """The system and user turns of a conversation up to its last user turn."""
    turns = [dict(role=m["role"], content=clean_text(m["content"])) for m in messages if m["role"] != "assistant"]
    while turns[-1]["role"] != "user":
        turns.pop()
    return turns


class AnswerFile:
    """A file of answers that is being written; a context manager that keeps the report.

    Args:
        file: continued if it exists.
        settings: what the answers are made with; a file made with something else is refused.
        total: how many conversations there are.
        dropped: how many were left out before, by reason.
    """

    def __init__(self, file: str | Path, settings: dict, total: int, dropped: Counter | None = None):
        if total < 1:
            raise InputError("there is no prompt to answer; the data set is empty")
        self.file = Path(file)
        if self.file.is_dir():
            raise InputError(f"'{self.file}' is a folder; name a JSONL file for the answers")
        if self.file.name.endswith(".gz"):
            raise InputError(f"'{self.file}': answers are written line by line; name a .jsonl file and pack it later")
        self.faults_file = self.file.with_name(self.file.name + ".dropped")
        ours = is_claimed(self.file)  # else it is somebody's file, not to be repaired
        self.answered = {row["id"] for row in answers_in(self.file, repair=ours)}
        self.faults = {row["id"]: row["reason"] for row in read_lines(self.faults_file, repair=ours)}
        if ours and not self.answered and not self.faults:  # an earlier try that came to nothing binds nobody
            self.file.unlink(missing_ok=True)
        claim(self.file, settings)
        self.total, self.left_out = total, Counter(dropped or {})
        self.report: dict[str, Any] = dict(answered=0, resumed=len(self.answered), tokens=0, seconds=0.0)

    def __enter__(self) -> "AnswerFile":
        done = len(self.answered) + len(self.faults)
        self.bar = progress(max(self.total, done), "conversation", "answering", initial=done)
        self.started = self.synced = time.perf_counter()
        self.handles = [file.open("a", encoding="utf-8") for file in (self.file, self.faults_file)]
        return self

    def __exit__(self, *_) -> None:
        sync(self.handles)
        for handle in self.handles:
            handle.close()
        self.bar.close()
        tokens, seconds = self.report["tokens"], self.report["seconds"]
        self.report["dropped"] = dict(self.left_out + Counter(self.faults.values()))
        self.report["tokens_per_second"] = tokens / seconds if tokens else 0.0

    def still_open(self, prompts: Dataset) -> list[dict]:
        """The rows that are neither answered nor known to be unanswerable; those without a user turn are dropped."""
        done, rows = self.answered | self.faults.keys(), []
        for row in prompts:
            if row["id"] not in done:
                if any(message["role"] == "user" for message in row["messages"]):
                    rows.append(row)
                else:
                    self.drop(row["id"], "the conversation has no user turn")
        return rows

    def add(self, record: dict) -> None:
        """Write an answered conversation."""
        append_line(self.handles[0], record)
        self.report["answered"] += 1
        self.report["tokens"] += record["completion_tokens"]
        self._tick()

    def drop(self, identity: str, reason: str) -> None:
        """Note that a conversation cannot be answered, now or later."""
        append_line(self.handles[1], dict(id=identity, reason=reason))
        self.faults[identity] = reason
        self._tick()

    def _tick(self) -> None:
        now = time.perf_counter()
        self.report["seconds"] = now - self.started
        if now - self.synced > SYNC_SECONDS:
            sync(self.handles)
            self.synced = now
        self.bar.update()
        self.bar.set_postfix_str(f"{self.report['tokens'] / self.report['seconds']:,.0f} tokens/s", refresh=False)


def load_answers(file: str | Path, split: str | None = None, loops: bool = True) -> list[dict]:
    """The answered conversations of a file (JSONL, or JSONL in gzip).

    Args:
        split: only those of this split.
        loops: whether answers that run into a repetition loop are among them.

    Raises:
        InputError: no such file, a line that is no answered conversation, or nothing to return.
    """
    file = Path(file)
    if not file.is_file():
        raise InputError(f"there is no file '{file}' of answers; 02_self_distillation and `distill` make one")
    rows = answers_in(file)
    rows = [row for row in rows if split in (None, row["split"]) and (loops or not row["loop"])]
    if not rows:
        raise InputError(f"'{file}' holds no answered conversation{f' of the split {split!r}' if split else ''}")
    return rows


def answers_in(file: Path, repair: bool = False) -> list[dict]:
    """The records of a file, every one an answered conversation; see :func:`medusa_nb.storage.read_lines`."""
    if starts_a_list(file):
        raise InputError(
            f"{file} is one JSON list, as ShareGPT's files are, and holds no answers of this model; let it answer "
            f"first: `medusa-nb distill answers.jsonl --prompts {file.name}`"
        )
    rows = read_lines(file, repair)
    for number, row in enumerate(rows, 1):
        if missing := sorted(NEEDED - row.keys()):
            what = "a prompt, not an answer" if {"messages", "conversations"} & row.keys() else "no answer"
            raise InputError(
                f"{file}, record {number} is {what} (it lacks {', '.join(missing)}); let the model answer first: "
                f"`medusa-nb distill answers.jsonl --prompts {file.name}`"
            )
    return rows


def starts_a_list(file: Path) -> bool:
    """Whether the text of a file starts with a bracket."""
    if not file.is_file():
        return False
    with file.open("rb") as handle:
        return handle.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def is_loop(tokens: list[int]) -> bool:
    """Whether an answer runs into a repetition loop, see :func:`loop_period`."""
    return loop_period(tokens) is not None


def loop_period(tokens: list[int]) -> int | None:
    """The length of a block that an answer repeats, None if it runs into no loop.

    A loop is a block of at most 64 tokens that occurs at least three times in a row somewhere, where the repetitions
    after the first cover at least 30 tokens.
    """
    ids = torch.tensor(tokens)
    for period in range(1, min(64, len(tokens) // 2) + 1):
        same = (ids[period:] == ids[:-period]).int()
        count = torch.cumsum(same, 0)
        run = count - torch.where(same == 0, count, 0).cummax(0).values  # length of the run that ends at each place
        if run.max() >= max(30, 2 * period):
            return period
    return None
