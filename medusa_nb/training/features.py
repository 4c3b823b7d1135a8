"""What heads are trained on: last hidden states, the model's own tokens that follow, and what else it thought of.

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
from filelock import FileLock
from torch.utils.data import Dataset

from medusa_nb.base_model import context_length, dtype_name, fingerprint
from medusa_nb.chat import Encoded, encode_conversation
from medusa_nb.distillation.states import KeptStates
from medusa_nb.errors import InputError
from medusa_nb.logits import logits_function, not_finite
from medusa_nb.progress import progress
from medusa_nb.rope import refuse_rope_switch, rope_switches
from medusa_nb.storage import claim, is_claimed, read_json, require_disk_space, write_json

IGNORED = -100
LIKELY = 16  # so many of the base model's likeliest next tokens are kept for each position
BATCH_TOKENS = 8192  # of conversations read at once, padding included
ABOUT, DATA = "features.json", "features.bin"


def encode_answer(tokenizer, row: dict, max_length: int | None = None) -> Encoded:
    """An answered conversation's tokens, see :func:`~medusa_nb.chat.encode_conversation`.

    The template ends every turn; where the limit cut an answer off, that end is not the model's own.
    """
    encoded = encode_conversation(tokenizer, row["messages"], max_length)
    if row.get("finish_reason") == "length" and True in encoded.own:
        last = len(encoded.own) - 1 - encoded.own[::-1].index(True)
        if encoded.ids[last] in tokenizer.added_tokens_decoder:
            encoded.own[last] = False
    return encoded


def head_labels(ids: list[int], own: list[bool], num_heads: int) -> tuple[list[int], list[list[int]]]:
    """Which positions are supervised, and with what.

    Position t is used if token t+1 is the model's own: there the base model speaks. Its row holds the true tokens at
    t+1 (the base model's), t+2 (head 0's), ... t+K+1, as long as the model's own run goes on without a break, and
    :data:`IGNORED` after that.

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


@dataclass
class Supervised(Encoded):
    """One conversation: its tokens, which of them the model said ``[T]``, and what :func:`head_labels` makes of it."""

    positions: list[int]
    labels: list[list[int]]


def longest_text(model, max_length: int) -> int:
    """Where conversations are cut: at ``max_length`` tokens or the model's context, whichever is less."""
    return min(max_length, context_length(model) or max_length)


def supervise(
    model, tokenizer, conversations: list[dict], num_heads: int, max_length: int
) -> tuple[list[Supervised], dict[str, int]]:
    """Conversations as tokens and labels, cut as :func:`longest_text` says.

    Returns:
        One entry per conversation, and counts: ``positions``, conversations that were ``cut``, and those that are
        ``without_answer`` (or whose answer was cut away).

    Raises:
        InputError: no conversation, or none with an answer.
    """
    if not conversations:
        raise InputError("there is no conversation to compute features of; the data set is empty")
    length = longest_text(model, max_length)
    result: list[Supervised] = []
    cut = 0
    for row in conversations:
        encoded = encode_answer(tokenizer, row)
        cut += len(encoded.ids) > length
        ids, own = encoded.ids[:length], encoded.own[:length]
        result.append(Supervised(ids, own, *head_labels(ids, own, num_heads)))
    positions = sum(len(one.positions) for one in result)
    if not positions:
        why = f"; {cut} were cut to {length} tokens" if cut else ""
        raise InputError(f"no token of these conversations is the model's own{why}; are there assistant turns?")
    return result, dict(positions=positions, cut=cut, without_answer=sum(not one.positions for one in result))


def refuse_not_finite(states: torch.Tensor, model) -> None:
    """Raise :class:`InputError` for states or probabilities that overflowed in the base model's dtype."""
    if not torch.isfinite(states).all():
        raise InputError(f"the base model's states are {not_finite(model.dtype)}")


@torch.no_grad()
def likeliest(model, hidden: torch.Tensor, rows: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """The base model's likeliest next tokens at states ``[P, D]``: ids ``[P, M]`` and probabilities that sum to 1.

    Raises:
        InputError: states or logits are not finite.
    """
    ids, probabilities, logits = [], [], logits_function(model)
    for part in hidden.split(rows):  # so many rows of logits at a time
        refuse_not_finite(part, model)
        scores = logits(part.unsqueeze(0))[0].float()
        top = scores.topk(min(LIKELY, scores.shape[-1]), dim=-1)
        chances = (top.values - scores.logsumexp(-1, keepdim=True)).exp()
        refuse_not_finite(chances, model)
        ids.append(top.indices)
        probabilities.append(chances / chances.sum(-1, keepdim=True))
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
    ``about`` says what they were made of, and how many conversations were cut or left without an answer.
    """

    def __init__(self, folder: str | Path):
        self.about = read_json(Path(folder) / ABOUT)
        mapped = np.memmap(Path(folder) / DATA, _record(**self.about["sizes"]), "c")
        data = np.array(mapped) if mapped.nbytes < 2**30 else mapped
        # torch has bf16 and numpy has not: the same two bytes, read as an integer
        self.hidden, self.probabilities = (
            torch.from_numpy(data[name]).view(torch.bfloat16) for name in ("hidden", "probabilities")
        )
        self.likely, self.labels = torch.from_numpy(data["likely"]), torch.from_numpy(data["labels"]).long()
        self.conversation = torch.from_numpy(data["conversation"]).long()
        self.places = torch.arange(len(self.likely))  # where soft labels are looked up

    def chosen(self, rows: torch.Tensor) -> "Features":
        """Only the positions ``rows``, for comparisons on as much data; soft labels come from where they did."""
        part = copy.copy(self)
        part.about, part.places = self.about | dict(positions=len(rows)), self.places[rows]
        part.hidden, part.labels, part.conversation = self.hidden[rows], self.labels[rows], self.conversation[rows]
        return part

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        index = torch.as_tensor(rows)
        soft = soft_labels(self.places[index], self.labels.shape[1] - 1, self.likely, self.probabilities)
        return dict(hidden=self.hidden[index], labels=self.labels[index]) | soft

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {name: values[0] for name, values in self.__getitems__([row]).items()}


def _record(heads: int, likely: int, width: int) -> np.dtype:
    """What the file holds for each position."""
    fields = [
        ("labels", np.int32, (heads + 1,)),
        ("conversation", np.int32),
        ("likely", np.int32, (likely,)),
        ("probabilities", np.int16, (likely,)),
        ("hidden", np.int16, (width,)),
    ]
    return np.dtype(fields, align=True)


def cache_features(
    model,
    tokenizer,
    conversations: list[dict],
    folder: str | Path,
    num_heads: int = 4,
    max_length: int = 2048,
    states: str | Path | None = None,
) -> Features:
    """Compute the features of conversations once; later calls with the same inputs only open them.

    Conversations of similar length are read together. A run that was killed goes on after the last whole batch. Of
    several processes one computes and the others wait for it.

    Args:
        max_length: longer conversations are cut to so many tokens.
        states: a folder of states that were kept while the model answered; they are not computed again.

    Raises:
        InputError: no conversation, no supervised position, states that are not finite, or not enough disk space.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    vocabulary, width = model.get_output_embeddings().weight.shape
    sizes = dict(heads=num_heads, likely=min(LIKELY, vocabulary), width=width)
    key = _key(model, tokenizer, conversations, f"{sizes} {longest_text(model, max_length)} {DATA}")
    with FileLock(folder.with_name(folder.name + ".lock")):
        if folder.is_dir() and not is_claimed(folder, dict(features=key)):
            if not is_claimed(folder):
                raise InputError(f"'{folder}' holds something else than features; name another folder")
            shutil.rmtree(folder)  # features of something else
        claim(folder, dict(features=key))
        if not (folder / ABOUT).exists():
            supervised, counts = supervise(model, tokenizer, conversations, num_heads, max_length)
            refuse_rope_switch(model, 0, max(len(one.ids) for one in supervised))
            require_disk_space(folder, counts["positions"] * _record(**sizes).itemsize)
            folder.mkdir(parents=True, exist_ok=True)
            kept = KeptStates(states, model) if states else None
            _compute(model, conversations, supervised, folder / DATA, _record(**sizes), kept)
            write_json(folder / ABOUT, counts | dict(conversations=len(conversations), sizes=sizes))
    return Features(folder)


@torch.inference_mode()
def _compute(model, conversations, supervised: list[Supervised], file: Path, record: np.dtype, kept) -> None:
    """Write the records of all supervised positions, after those that are there already."""
    batches = _batches(supervised)
    ends = np.cumsum([sum(len(supervised[i].positions) for i in batch) for batch in batches])
    file.touch()
    done = int(np.searchsorted(ends, file.stat().st_size // record.itemsize, side="right"))
    bar = progress(len(supervised), "conversation", "hidden states", initial=sum(map(len, batches[:done])))
    with file.open("r+b") as handle:
        handle.truncate((int(ends[done - 1]) if done else 0) * record.itemsize)  # a batch that is not whole
        handle.seek(0, 2)
        for batch in batches[done:]:
            states = _states_of(model, batch, conversations, supervised, kept)
            ids, probabilities = likeliest(model, states)
            rows = np.zeros(len(states), record)
            rows["labels"] = [label for i in batch for label in supervised[i].labels]
            rows["conversation"] = [i for i in batch for _ in supervised[i].positions]
            rows["likely"] = ids.cpu().numpy()
            rows["probabilities"] = probabilities.cpu().view(torch.int16).numpy()
            rows["hidden"] = states.to(torch.bfloat16).cpu().view(torch.int16).numpy()
            handle.write(rows.tobytes())
            handle.flush()
            bar.update(len(batch))
    bar.close()


def _batches(supervised: list[Supervised]) -> list[list[int]]:
    """Which conversations are read together, short ones first: at most so many tokens when padded."""
    batches: list[list[int]] = []
    with_answer = (i for i, one in enumerate(supervised) if one.positions)
    for i in sorted(with_answer, key=lambda i: len(supervised[i].ids)):
        if not batches or (len(batches[-1]) + 1) * len(supervised[i].ids) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(i)
    return batches


def _states_of(model, batch: list[int], conversations, supervised: list[Supervised], kept) -> torch.Tensor:
    """The states ``[P, D]`` of a batch's supervised positions, kept ones where there are."""
    found = {}
    for i in batch if kept else ():
        own = [token for token, mine in zip(supervised[i].ids, supervised[i].own, strict=True) if mine]
        if (states := kept.get(conversations[i]["id"], own)) is not None:
            found[i] = states
    if missing := [i for i in batch if i not in found]:
        hidden = hidden_states(model, [supervised[i].ids for i in missing])
        found |= {i: hidden[line, supervised[i].positions] for line, i in enumerate(missing)}
    return torch.cat([found[i].to(model.device, model.dtype) for i in batch])


def hidden_states(model, rows: list[list[int]]) -> torch.Tensor:
    """Hidden states ``[B, T, D]`` of texts of up to T tokens, padded at the end, where attention never looks."""
    logits_function(model)  # refuses a model whose parts do not make the whole
    device = model.get_output_embeddings().weight.device
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    if rope_switches(model):  # a longer neighbour would change the others
        parts = [model.base_model(input_ids=torch.tensor([row], device=device), use_cache=False) for row in rows]
        return torch.nn.utils.rnn.pad_sequence([part.last_hidden_state[0] for part in parts], batch_first=True)
    return model.base_model(input_ids=ids.to(device), use_cache=False).last_hidden_state


def _key(model, tokenizer, conversations: list[dict], layout: str) -> str:
    """Changes with whatever the features depend on."""
    digest = hashlib.sha256(f"{fingerprint(model)} {dtype_name(model.dtype)} {layout}".encode())
    digest.update(json.dumps([[c["messages"], c.get("finish_reason")] for c in conversations]).encode())
    digest.update(f"{tokenizer.chat_template} {tokenizer.backend_tokenizer.to_str()}".encode())
    return digest.hexdigest()
