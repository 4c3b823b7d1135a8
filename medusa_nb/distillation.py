"""Self-distillation: the base model answers the prompts itself, and the heads learn from that.

Answers are written as they come, one JSON line a conversation. A run that was killed continues by
id and loses at most the batch in flight.
"""

import json
import os
import time
import zlib
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset

from medusa_nb.base_model import context_length, eos_token_ids, require_chat_template
from medusa_nb.errors import InputError
from medusa_nb.heads import portable_name
from medusa_nb.kv_cache import BufferCache
from medusa_nb.progress import progress


@dataclass(frozen=True)
class DistillationSettings:
    """How answers are made. ``temperature`` 0 is greedy decoding; ``max_new_tokens`` counts per turn."""

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
    _claim(file, {**asdict(settings), "model": portable_name(model.config._name_or_path)})
    done = {row["id"] for row in read_lines(file, repair=True)}
    dropped_file = file.with_name(file.name + ".dropped")
    dropped = {row["id"]: row["reason"] for row in read_lines(dropped_file, repair=True)}
    waiting = [Conversation(row, tokenizer) for row in prompts if row["id"] not in done and row["id"] not in dropped]
    waiting.sort(key=lambda c: len(c.prompt_ids))
    report = dict(answered=0, resumed=len(done), dropped=Counter(dropped.values()), tokens=0, seconds=0.0)
    started = time.perf_counter()
    bar = progress(len(waiting), "conversation", "answering")
    with file.open("a") as answers, dropped_file.open("a") as failures:
        for start in range(0, len(waiting), settings.batch_size):
            batch = waiting[start : start + settings.batch_size]
            answer_batch(model, tokenizer, batch, settings)
            for conversation in batch:
                if conversation.failure:
                    report["dropped"][conversation.failure] += 1
                    _write(failures, dict(id=conversation.id, reason=conversation.failure))
                else:
                    report["answered"] += 1
                    report["tokens"] += conversation.completion_tokens
                    _write(answers, conversation.record())
            for handle in (answers, failures):
                handle.flush()
                os.fsync(handle.fileno())
            bar.update(len(batch))
            report["seconds"] = time.perf_counter() - started
            bar.set_postfix_str(f"{report['tokens'] / report['seconds']:,.0f} tokens/s")
    bar.close()
    report["tokens_per_second"] = report["tokens"] / report["seconds"] if report["tokens"] else 0.0
    report["dropped"] = dict(report["dropped"])
    return report


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


def answer_batch(model, tokenizer, batch: list[Conversation], settings: DistillationSettings) -> None:
    """Answer all turns of a batch of conversations, all first turns together, then all second ones."""
    limit = context_length(model)
    while turns := [c for c in batch if c.open]:
        for conversation in turns:
            if limit is not None and len(conversation.prompt_ids) + settings.max_new_tokens > limit:
                conversation.failure = "prompt too long for the context"
        turns = [c for c in turns if c.open]
        if not turns:
            return
        seed = zlib.crc32(f"{settings.seed}:{turns[0].id}:{len(turns[0].messages)}".encode())
        answers = generate_batch(
            model,
            [c.prompt_ids for c in turns],
            settings.max_new_tokens,
            eos_token_ids(model, tokenizer),
            settings.temperature,
            seed,
        )
        for conversation, (tokens, finished) in zip(turns, answers, strict=True):
            conversation.take(tokens, finished)


@torch.inference_mode()
def generate_batch(
    model, prompts: list[list[int]], max_new_tokens: int, eos: list[int], temperature: float = 0.0, seed: int = 0
) -> list[tuple[list[int], bool]]:
    """Answer B prompts at once; rows that have ended leave the batch, so no work is spent on them.

    Prompts are padded on the left with a masked token.

    Returns:
        For each prompt its new tokens, without the end token, and whether there was one.
    """
    device, lm_head = model.get_output_embeddings().weight.device, model.get_output_embeddings()
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width + max_new_tokens, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = True
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask[:, :width].cumsum(1) - 1).clamp(min=0)
    cache = BufferCache(width + max_new_tokens)
    generator = torch.Generator(device).manual_seed(seed)
    ends = torch.tensor(eos, device=device)
    rows = torch.arange(len(prompts), device=device)  # which prompt each row of the batch answers
    answers: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    for count in range(max_new_tokens):
        hidden = model.base_model(
            input_ids=ids,
            attention_mask=mask[:, : width + count],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        tokens = choose(lm_head(hidden), temperature, generator)
        going = ~torch.isin(tokens, ends)
        for row, token, goes_on in zip(rows.tolist(), tokens.tolist(), going.tolist(), strict=True):
            if goes_on:
                answers[row].append(token)
            else:
                finished[row] = True
        positions = positions[:, -1:] + 1
        if not going.all():
            order = close_gaps(going)
            if not len(order):
                break
            tokens, rows, mask, positions = tokens[order], rows[order], mask[order], positions[order]
            cache.select_rows(order)
        ids = tokens.unsqueeze(1)
    return list(zip(answers, finished, strict=True))


def close_gaps(going: torch.Tensor) -> torch.Tensor:
    """Numbers of the rows that go on, the last ones moved into the places of those that ended."""
    order = torch.arange(int(going.sum()), device=going.device)
    order[~going[: len(order)]] = going[len(order) :].nonzero()[:, 0] + len(order)
    return order


def choose(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """``[B, V]`` -> ``[B]``: the best token, or at a temperature above 0 a sampled one."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]


def is_loop(tokens: list[int], min_tokens: int = 30, max_period: int = 64) -> bool:
    """True if an answer runs into a repetition loop.

    That is: somewhere a block of p <= ``max_period`` tokens stands at least three times in a row, and
    the repetitions after the first cover at least ``min_tokens`` tokens.
    """
    ids = torch.tensor(tokens)
    for period in range(1, min(max_period, len(tokens) // 2) + 1):
        same = (ids[period:] == ids[:-period]).int()
        # length of the run of equalities that ends at each position
        count = torch.cumsum(same, 0)
        run = count - torch.where(same == 0, count, 0).cummax(0).values
        if run.max() >= max(min_tokens, 2 * period):
            return True
    return False


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


def _claim(file: Path, settings: dict) -> None:
    """Note the settings beside a new file; refuse to continue one that was made with others."""
    file.parent.mkdir(parents=True, exist_ok=True)
    note = file.with_name(file.name + ".settings")
    settings.pop("batch_size")  # no influence on the answers' meaning
    if not note.exists() or not file.exists():
        note.write_text(json.dumps(settings) + "\n")
        return
    earlier = json.loads(note.read_text())
    changed = [f"{k} {earlier.get(k)!r} -> {v!r}" for k, v in settings.items() if earlier.get(k) != v]
    if changed:
        raise InputError(
            f"'{file}' was made with other settings ({', '.join(changed)}); choose another file or delete it"
        )


def _write(handle, record: dict) -> None:
    handle.write(json.dumps(record, ensure_ascii=False) + "\n")
