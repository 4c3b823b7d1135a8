"""What the heads are trained on: last hidden states, the model's own words that follow, and what else it thought of.

The base model is frozen, so its hidden states are computed once and kept on disk, memory-mapped.
"""

import copy
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from medusa_nb.base_model import fingerprint, require_chat_template
from medusa_nb.errors import InputError
from medusa_nb.progress import progress

IGNORED = -100
LIKELY = 16  # so many of the base model's likeliest next tokens are kept for each position


@dataclass
class Encoded:
    """Token ids ``[T]`` of a conversation and, for each, whether the model itself said it ``[T]``."""

    ids: list[int]
    own: list[bool]


def encode_conversation(tokenizer, messages: list[dict], max_length: int | None = None) -> Encoded:
    """Lay out a conversation with the chat template and mark the assistant's tokens.

    A token is the model's own if it lies in an assistant turn's text: after the generation prompt, up to
    and including the end token of the turn. Found by position in the laid-out text, so an answer that
    also stands in the user's turn is not mistaken. Cut to ``max_length`` tokens.

    Raises:
        InputError: no chat template, or one that rewrites earlier turns when later ones are added.
    """
    require_chat_template(tokenizer)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        until = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if not until.startswith(before) or not text.startswith(until):
            raise InputError(
                f"the chat template of '{tokenizer.name_or_path}' rewrites earlier turns, so the model's own words "
                "cannot be told apart; use conversations of one turn"
            )
        end = until.rfind(tokenizer.eos_token or "", len(before))
        spans.append((len(before), len(until) if end < len(before) else end + len(tokenizer.eos_token or "")))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    own = [any(start <= a and b <= end and b > a for start, end in spans) for a, b in encoded["offset_mapping"]]
    return Encoded(encoded["input_ids"][:max_length], own[:max_length])


def head_labels(ids: list[int], own: list[bool], num_heads: int) -> tuple[list[int], list[list[int]]]:
    """Which positions are supervised, and with what.

    Position t is used if token t+1 is the model's own: there the base model speaks. Its row holds the
    true tokens at t+1 (the base model's), t+2 (head 0's), ... t+K+1, as long as the model's own run
    goes on without a break, and :data:`IGNORED` after that.

    Returns:
        ``(positions [P], labels [P][K + 1])``.
    """
    positions, labels = [], []
    for t in range(len(ids) - 1):
        if not own[t + 1]:
            continue
        row: list[int] = []
        for ahead in range(1, num_heads + 2):
            if t + ahead >= len(ids) or not own[t + ahead]:
                break
            row.append(ids[t + ahead])
        positions.append(t)
        labels.append(row + [IGNORED] * (num_heads + 1 - len(row)))
    return positions, labels


@torch.no_grad()
def likeliest(lm_head, hidden: torch.Tensor, rows: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """The base model's likeliest next tokens at states ``[P, D]``: ids ``[P, M]`` and probabilities that sum to 1."""
    ids, probabilities = [], []
    for part in hidden.split(rows):  # so many rows of logits at a time
        top = lm_head(part).float().softmax(-1).topk(min(LIKELY, lm_head.weight.shape[0]), dim=-1)
        ids.append(top.indices)
        probabilities.append(top.values / top.values.sum(-1, keepdim=True))
    return torch.cat(ids), torch.cat(probabilities).to(torch.bfloat16)


def soft_labels(
    positions: torch.Tensor, num_heads: int, ids: torch.Tensor, probabilities: torch.Tensor
) -> dict[str, torch.Tensor]:
    """For each position, what the base model thought likely where head k's token stands: two tensors ``[B, K, M]``.

    The label of head k at position p is what the base model said k + 1 positions later in the same answer, and from
    there come these. Where that lies beyond the answer there is no label, and what is returned means nothing.
    """
    later = positions.unsqueeze(1) + torch.arange(1, num_heads + 1, device=positions.device)
    later = later.clamp(max=len(ids) - 1)
    return dict(likely=ids[later].long(), probabilities=probabilities[later])


class Features(Dataset):
    """Hidden states ``[P, D]`` and labels ``[P, K + 1]`` of P supervised positions, memory-mapped.

    ``conversation[p]`` is the number of the conversation a position comes from; positions of one stand together, in
    order. ``likely`` and ``probabilities`` ``[P, M]`` are what the base model thought of next (:func:`likeliest`).
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.about = json.loads((folder / "features.json").read_text())
        positions = self.about["positions"]
        arrays = _arrays(folder, self.about, "r")
        if positions * self.about["hidden_size"] < 2**28:
            arrays = {name: np.array(array) for name, array in arrays.items()}
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        # torch has bf16 and numpy has not: the same two bytes, read as an integer
        self.hidden, self.probabilities = (tensors[name].view(torch.bfloat16) for name in ("hidden", "probabilities"))
        self.likely = tensors["likely"]
        self.labels = torch.from_numpy(np.load(folder / "labels.npy"))
        self.conversation = torch.from_numpy(np.load(folder / "conversation.npy"))

    def first(self, count: int) -> "Features":
        """The first ``count`` positions, for comparisons on as much data; soft labels may come from behind them."""
        part = copy.copy(self)
        part.about = self.about | dict(positions=count)
        part.hidden, part.labels, part.conversation = (
            self.hidden[:count],
            self.labels[:count],
            self.conversation[:count],
        )
        return part

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        index = torch.as_tensor(rows)
        soft = soft_labels(index, self.labels.shape[1] - 1, self.likely, self.probabilities)
        return dict(hidden=self.hidden[index], labels=self.labels[index]) | soft

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {name: values[0] for name, values in self.__getitems__([row]).items()}


@torch.inference_mode()
def cache_features(
    model,
    tokenizer,
    conversations: list[dict],
    folder: str | Path,
    num_heads: int = 4,
    max_length: int = 1024,
    batch_tokens: int = 8192,
) -> Features:
    """Compute the features of conversations once; later calls with the same inputs only open them.

    Batches of similar length, at most ``batch_tokens`` padded tokens each. A run that was killed goes
    on after the last finished batch.

    Raises:
        InputError: no conversation, no supervised position, or not enough free disk space.
    """
    folder = Path(folder)
    if not conversations:
        raise InputError("there is no conversation to compute features of; the data set is empty")
    key = _key(model, tokenizer, conversations, num_heads, max_length)
    if (folder / "features.json").exists() and json.loads((folder / "features.json").read_text())["key"] == key:
        return Features(folder)
    encoded = [encode_conversation(tokenizer, c["messages"], max_length) for c in conversations]
    supervised = [head_labels(e.ids, e.own, num_heads) for e in encoded]
    total, width = sum(len(p) for p, _ in supervised), model.get_output_embeddings().weight.shape[1]
    if total == 0:
        raise InputError("no token of these conversations is the model's own; are there assistant turns?")
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    about = dict(key=key, positions=total, hidden_size=width, num_heads=num_heads, likely=min(LIKELY, vocabulary))
    require_disk_space(folder, total * (width * 2 + about["likely"] * 6))
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids))
    starts = np.cumsum([0, *(len(supervised[i][0]) for i in order)])
    (folder / "features.json").unlink(missing_ok=True)  # what it describes is about to be overwritten
    marker = folder / "progress.json"
    done = _finished_conversations(marker, key)
    arrays = _arrays(folder, about, "r+" if done else "w+")
    bar = progress(len(order), "conversation", "hidden states", initial=done)
    while done < len(order):
        batch = _batch_from(order, done, encoded, batch_tokens)
        hidden = _hidden_states(model, [encoded[i].ids for i in batch])
        rows = torch.cat([hidden[line, supervised[i][0]] for line, i in enumerate(batch)])
        likely, probabilities = likeliest(model.get_output_embeddings(), rows)
        written = slice(starts[done], starts[done] + len(rows))
        arrays["hidden"][written] = rows.to(torch.bfloat16).cpu().view(torch.int16).numpy()
        arrays["likely"][written] = likely.cpu().numpy()
        arrays["probabilities"][written] = probabilities.cpu().view(torch.int16).numpy()
        for array in arrays.values():
            array.flush()
        done += len(batch)
        marker.write_text(json.dumps(dict(key=key, done=done)))
        bar.update(len(batch))
    bar.close()
    np.save(
        folder / "labels.npy", np.concatenate([np.array(supervised[i][1], np.int64) for i in order if supervised[i][0]])
    )
    np.save(folder / "conversation.npy", np.concatenate([np.full(len(supervised[i][0]), i) for i in order]))
    (folder / "features.json").write_text(json.dumps(about | dict(conversations=len(order))) + "\n")
    marker.unlink()
    return Features(folder)


def _arrays(folder: Path, about: dict, mode: str) -> dict[str, np.memmap]:
    """The three large files, memory-mapped."""
    files = {
        "hidden": ("hidden.bf16", np.int16, about["hidden_size"]),
        "likely": ("likely.i32", np.int32, about["likely"]),
        "probabilities": ("probabilities.bf16", np.int16, about["likely"]),
    }
    return {
        name: np.memmap(folder / file, kind, mode, shape=(about["positions"], width))
        for name, (file, kind, width) in files.items()
    }


def require_disk_space(folder: Path, needed: int) -> None:
    """Raise :class:`InputError` if ``folder``'s disk has less than ``needed`` bytes (and 5 %) free."""
    free = shutil.disk_usage(folder).free
    if needed * 1.05 > free:
        raise InputError(
            f"'{folder}' needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; "
            "free some space or use fewer conversations"
        )


def _hidden_states(model, rows: list[list[int]]) -> torch.Tensor:
    """Last hidden states ``[B, T, D]`` of right-padded rows; causal attention never looks at the padding."""
    device = model.get_output_embeddings().weight.device
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for line, row in enumerate(rows):
        ids[line, : len(row)] = torch.tensor(row)
    return model.base_model(input_ids=ids.to(device), use_cache=False).last_hidden_state


def _batch_from(order: list[int], start: int, encoded: list[Encoded], batch_tokens: int) -> list[int]:
    """The next conversations in ``order`` (short ones first) that fit into ``batch_tokens`` when padded."""
    batch: list[int] = []
    for i in order[start:]:
        if batch and (len(batch) + 1) * len(encoded[i].ids) > batch_tokens:
            break
        batch.append(i)
    return batch


def _key(model, tokenizer, conversations: list[dict], num_heads: int, max_length: int) -> str:
    digest = hashlib.sha256(fingerprint(model).encode())
    digest.update(json.dumps([c["messages"] for c in conversations]).encode())
    digest.update(f"{num_heads} {max_length} {LIKELY} {model.dtype} {tokenizer.chat_template}".encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()


def _finished_conversations(marker: Path, key: str) -> int:
    """How many conversations an interrupted run with the same key has finished."""
    try:
        saved = json.loads(marker.read_text())
    except (OSError, json.JSONDecodeError):
        return 0
    return saved["done"] if saved["key"] == key else 0
