"""Self-distillation: the base model answers the prompts itself, and the heads learn from that.

Answers are written as they come, one JSON line a conversation. A run that was killed continues by
id and loses at most the conversations in flight.
"""

import json
import os
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset

from medusa_nb.base_model import context_length, eos_token_ids, require_chat_template
from medusa_nb.batching import Request, answer_all
from medusa_nb.errors import InputError
from medusa_nb.heads import portable_name
from medusa_nb.progress import progress

SYNC_SECONDS = 2.0  # a killed process loses nothing it has written, a power cut at most this much


@dataclass(frozen=True)
class DistillationSettings:
    """How answers are made: ``max_new_tokens`` per turn, ``temperature`` 0 is greedy, ``batch_size`` texts at once."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    batch_size: int = 64
    seed: int = 0


def distil(model, tokenizer, prompts: Dataset, file: str | Path, settings: DistillationSettings | None = None) -> dict:
    """Let the model answer every prompt that ``file`` does not hold yet; append answers to it.

    Each line of ``file`` is ``{"id", "split", "messages", "finish_reason", "prompt_tokens",
    "completion_tokens", "loop"}``. Conversations of several turns are answered turn by turn, with the
    model's own earlier answers. Empty answers and prompts too long for the context are not written;
    their ids and reasons go to ``<file>.dropped``.

    Returns:
        A report: ``answered``, ``resumed`` (already in the file), ``dropped`` by reason, new
        ``tokens``, ``seconds`` and ``tokens_per_second``.

    Raises:
        InputError: no chat template, no prompts, or ``file`` was made with other settings.
    """
    settings = settings or DistillationSettings()
    require_chat_template(tokenizer)
    if not len(prompts):
        raise InputError("there is no prompt to answer; the data set is empty")
    file = Path(file)
    kept = {name: value for name, value in asdict(settings).items() if name != "batch_size"}  # no influence on answers
    claim(file, kept | dict(model=portable_name(model.config._name_or_path)))
    done = {row["id"] for row in read_lines(file, repair=True)}
    dropped_file = file.with_name(file.name + ".dropped")
    dropped = {row["id"]: row["reason"] for row in read_lines(dropped_file, repair=True)}
    open_ = [Conversation(row, tokenizer) for row in prompts if row["id"] not in done and row["id"] not in dropped]
    report = dict(answered=0, resumed=len(done), dropped=Counter(dropped.values()), tokens=0, seconds=0.0)
    bar = progress(len(open_), "conversation", "answering")
    started = last_sync = time.perf_counter()
    with file.open("a") as answers, dropped_file.open("a") as failures:
        for conversation in answer_conversations(model, tokenizer, open_, settings):
            if conversation.failure:
                report["dropped"][conversation.failure] += 1
                write_record(failures, dict(id=conversation.id, reason=conversation.failure))
            else:
                report["answered"] += 1
                report["tokens"] += conversation.completion_tokens
                write_record(answers, conversation.record())
            now = time.perf_counter()
            report["seconds"] = now - started
            if now - last_sync > SYNC_SECONDS:
                sync(answers, failures)
                last_sync = now
            bar.update()
            bar.set_postfix_str(f"{report['tokens'] / report['seconds']:,.0f} tokens/s", refresh=False)
        sync(answers, failures)
    bar.close()
    report["tokens_per_second"] = report["tokens"] / report["seconds"] if report["tokens"] else 0.0
    report["dropped"] = dict(report["dropped"])
    return report


def answer_conversations(model, tokenizer, conversations: list["Conversation"], settings) -> Iterator["Conversation"]:
    """Yield conversations as all their turns are answered, or as they fail."""
    limit, waiting = context_length(model), deque()

    def ask(conversation: Conversation) -> bool:
        if limit is not None and len(conversation.prompt_ids) + settings.max_new_tokens > limit:
            conversation.failure = "prompt too long for the context"
            return False
        seed = f"{settings.seed}:{conversation.id}:{len(conversation.messages)}"
        waiting.append(Request(conversation, conversation.prompt_ids, settings.max_new_tokens, seed))
        return True

    for conversation in sorted(conversations, key=lambda c: len(c.prompt_ids)):
        if not ask(conversation):
            yield conversation
    if not waiting:
        return
    capacity = max(c.room(settings.max_new_tokens) for c in conversations if not c.failure)
    capacity = capacity if limit is None else min(capacity, limit)
    slots, eos = min(settings.batch_size, len(waiting)), eos_token_ids(model, tokenizer)
    for request in answer_all(model, waiting, slots, capacity, eos, settings.temperature):
        request.about.take(request.tokens, request.finished)
        if not request.about.open or not ask(request.about):
            yield request.about


class Conversation:
    """One conversation on its way: the turns still to answer and those answered."""

    def __init__(self, row: dict, tokenizer):
        self.id, self.split, self.tokenizer = row["id"], row["split"], tokenizer
        self.turns = [m for m in row["messages"] if m["role"] != "assistant"]
        self.messages: list[dict] = []
        self.finish_reason, self.failure = "", ""
        self.prompt_tokens = self.completion_tokens = 0
        self.loop = False
        self._next_user_turn()

    def _next_user_turn(self) -> None:
        while self.turns and self.turns[0]["role"] == "system":
            self.messages.append(self.turns.pop(0))
        if self.turns:
            self.messages.append(self.turns.pop(0))
        text = self.tokenizer.apply_chat_template(self.messages, tokenize=False, add_generation_prompt=True)
        self.prompt_ids = self.tokenizer(text, add_special_tokens=False).input_ids

    def room(self, max_new_tokens: int) -> int:
        """How many tokens the whole conversation can grow to; exact if one turn is left to answer."""
        text = "".join(m["content"] for m in self.turns)
        later = len(self.tokenizer(text, add_special_tokens=False).input_ids) + 32 * len(self.turns)
        return len(self.prompt_ids) + later + max_new_tokens * (1 + len(self.turns))

    @property
    def open(self) -> bool:
        """True while there is a turn to answer."""
        return not self.failure and self.messages[-1]["role"] != "assistant"

    def take(self, answer: list[int], finished: bool) -> None:
        """Add the model's answer (without its end token) and move on to the next user turn."""
        text = self.tokenizer.decode(answer, skip_special_tokens=True)
        if not text.strip():
            self.failure = "empty answer"
            return
        self.messages.append(dict(role="assistant", content=text))
        self.finish_reason = "stop" if finished else "length"
        self.prompt_tokens += len(self.prompt_ids)
        self.completion_tokens += len(answer) + finished
        self.loop = self.loop or is_loop(answer)
        if self.turns:
            self._next_user_turn()

    def record(self) -> dict:
        """The line that is written."""
        names = ("id", "split", "messages", "finish_reason", "prompt_tokens", "completion_tokens", "loop")
        return {name: getattr(self, name) for name in names}


def generate_batch(
    model, prompts: list[list[int]], max_new_tokens: int, eos: list[int], temperature: float = 0.0, slots: int = 64
) -> list[tuple[list[int], bool]]:
    """Answer prompts, ``slots`` at a time: the new tokens of each, without the end token, and whether it had one."""
    requests = [Request(i, ids, max_new_tokens, seed=str(i)) for i, ids in enumerate(prompts)]
    capacity = max(map(len, prompts)) + max_new_tokens
    waiting = deque(sorted(requests, key=lambda request: len(request.prompt)))
    for _ in answer_all(model, waiting, min(slots, len(prompts)), capacity, eos, temperature):
        pass
    return [(request.tokens, request.finished) for request in requests]


def is_loop(tokens: list[int]) -> bool:
    """True if an answer runs into a repetition loop, see :func:`loop_period`."""
    return loop_period(tokens) is not None


def loop_period(tokens: list[int], min_tokens: int = 30, max_period: int = 64) -> int | None:
    """The length p <= ``max_period`` of a block that an answer repeats, None if it runs into no loop.

    A loop is a block that stands at least three times in a row somewhere, where the repetitions after the
    first cover at least ``min_tokens`` tokens.
    """
    ids = torch.tensor(tokens)
    for period in range(1, min(max_period, len(tokens) // 2) + 1):
        same = (ids[period:] == ids[:-period]).int()
        # length of the run of equalities that ends at each position
        count = torch.cumsum(same, 0)
        run = count - torch.where(same == 0, count, 0).cummax(0).values
        if run.max() >= max(min_tokens, 2 * period):
            return period
    return None


def read_lines(file: str | Path, repair: bool = False) -> list[dict]:
    """The records of a JSONL file, none if there is no file.

    Args:
        repair: cut off a last line that a killed process left incomplete.

    Raises:
        InputError: a line is not valid JSON; names file and line.
    """
    file = Path(file)
    if not file.exists():
        return []
    data = file.read_bytes()
    if repair and data and not data.endswith(b"\n"):
        data = data[: data.rfind(b"\n") + 1]
        with file.open("r+b") as handle:
            handle.truncate(len(data))
    records = []
    for number, line in enumerate(data.decode().removesuffix("\n").split("\n") if data else [], 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(f"{file}, line {number}: not valid JSON ({error.msg}); delete the line") from error
    return records


def load_answers(file: str | Path, split: str | None = None, loops: bool = True) -> list[dict]:
    """The answered conversations of a file, of one split if named, without loops if wished."""
    if not Path(file).is_file():
        raise InputError(f"there is no file '{file}' of answers; 02_self_distillation makes it")
    rows = [r for r in read_lines(file) if split in (None, r["split"]) and (loops or not r["loop"])]
    if not rows:
        raise InputError(f"'{file}' holds no answered conversation{f' of the split {split!r}' if split else ''}")
    return rows


def claim(file: Path, settings: dict) -> None:
    """Note the settings beside a new file; refuse to continue one that was made with others."""
    file.parent.mkdir(parents=True, exist_ok=True)
    note = file.with_name(file.name + ".settings")
    if not note.exists() or not file.exists():
        note.write_text(json.dumps(settings) + "\n")
        return
    earlier = json.loads(note.read_text())
    changed = [f"{k} {earlier.get(k)!r} -> {v!r}" for k, v in settings.items() if earlier.get(k) != v]
    if changed:
        raise InputError(
            f"'{file}' was made with other settings ({', '.join(changed)}); choose another file or delete it"
        )


def write_record(handle, record: dict) -> None:
    """Append one JSON line and hand it to the operating system at once."""
    handle.write(json.dumps(record, ensure_ascii=False) + "\n")
    handle.flush()


def sync(*handles) -> None:
    """Have the operating system put what was written on the disk."""
    for handle in handles:
        os.fsync(handle.fileno())
