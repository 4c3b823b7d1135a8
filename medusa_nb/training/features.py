"""What heads are trained on: last hidden states, the model's own tokens that follow, and what else it thought of.

The base model is frozen, so its hidden states are computed once and kept on disk, memory-mapped.
"""

import copy
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from medusa_nb.base_model import dtype_name, fingerprint
from medusa_nb.chat import Encoded, encode_conversation
from medusa_nb.distillation.states import KeptStates
from medusa_nb.errors import InputError
from medusa_nb.progress import progress
from medusa_nb.storage import claim, is_claimed, read_json, require_disk_space, write_json
from medusa_nb.verification import logits_function, not_finite, refuse_rope_switch, rope_switches

IGNORED = -100
LIKELY = 16  # so many of the base model's likeliest next tokens are kept for each position
BATCH_TOKENS = 8192  # of conversations read at once, padding included
ABOUT = "features.json"


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


@torch.no_grad()
def likeliest(model, hidden: torch.Tensor, rows: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """The base model's likeliest next tokens at states ``[P, D]``: ids ``[P, M]`` and probabilities that sum to 1.

    Raises:
        InputError: states or logits are not finite.
    """
    ids, probabilities, logits = [], [], logits_function(model)
    for part in hidden.split(rows):  # so many rows of logits at a time
        scores = logits(part.unsqueeze(0))[0].float()
        top = scores.topk(min(LIKELY, scores.shape[-1]), dim=-1)
        chances = (top.values - scores.logsumexp(-1, keepdim=True)).exp()
        if not (torch.isfinite(part).all() and torch.isfinite(chances).all()):
            raise InputError(f"the base model's states are {not_finite(model.dtype)}")
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
        folder = Path(folder)
        self.about = read_json(folder / ABOUT)
        tensors = {}
        for name, (file, kind, width) in _files(self.about).items():
            mapped = np.memmap(folder / file, kind, "r", shape=(self.about["positions"], width))
            tensors[name] = torch.from_numpy(np.array(mapped) if mapped.nbytes < 2**30 else mapped)
        # torch has bf16 and numpy has not: the same two bytes, read as an integer
        self.hidden, self.probabilities = (tensors[name].view(torch.bfloat16) for name in ("hidden", "probabilities"))
        self.likely, self.labels = tensors["likely"], tensors["labels"].long()
        self.conversation = tensors["conversation"][:, 0].long()

    def chosen(self, rows: torch.Tensor) -> "Features":
        """Only the positions ``rows``, for comparisons on as much data; soft labels come from where they did."""
        part = copy.copy(self)
        part.about, part.places = self.about | dict(positions=len(rows)), self._places()[rows]
        part.hidden, part.labels, part.conversation = self.hidden[rows], self.labels[rows], self.conversation[rows]
        return part

    def _places(self) -> torch.Tensor:
        return getattr(self, "places", torch.arange(len(self.likely)))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        index = torch.as_tensor(rows)
        soft = soft_labels(self._places()[index], self.labels.shape[1] - 1, self.likely, self.probabilities)
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
    max_length: int = 2048,
    states: str | Path | None = None,
) -> Features:
    """Compute the features of conversations once; later calls with the same inputs only open them.

    Conversations of similar length are read together. A run that was killed goes on after the last whole batch.

    Args:
        max_length: longer conversations are cut to so many tokens.
        states: a folder of states that were kept while the model answered; they are not computed again.

    Raises:
        InputError: no conversation, no supervised position, states that are not finite, or not enough disk space.
    """
    folder = Path(folder)
    if not conversations:
        raise InputError("there is no conversation to compute features of; the data set is empty")
    key = _key(model, tokenizer, conversations, num_heads, max_length)
    if folder.is_dir() and not is_claimed(folder, dict(features=key)):  # a cache of something else
        shutil.rmtree(folder)
    claim(folder, dict(features=key))
    if (folder / ABOUT).exists():
        return Features(folder)
    encoded = [encode_answer(tokenizer, row) for row in conversations]
    cut = sum(len(e.ids) > max_length for e in encoded)
    encoded = [Encoded(e.ids[:max_length], e.own[:max_length]) for e in encoded]
    supervised = [head_labels(e.ids, e.own, num_heads) for e in encoded]
    total, width = sum(len(p) for p, _ in supervised), model.get_output_embeddings().weight.shape[1]
    if total == 0:
        raise InputError("no token of these conversations is the model's own; are there assistant turns?")
    refuse_rope_switch(model, 0, max(len(e.ids) for e in encoded))
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids))
    likely = min(LIKELY, model.get_output_embeddings().weight.shape[0])
    about = dict(positions=total, hidden_size=width, num_heads=num_heads, likely=likely, conversations=len(order))
    about |= dict(cut=cut, without_answer=sum(not p for p, _ in supervised))
    folder.mkdir(parents=True, exist_ok=True)
    require_disk_space(folder, total * (width * 2 + likely * 6))
    kept = KeptStates(states, width) if states else None
    batches = _batches(order, encoded)
    done = _resume(folder, about, [sum(len(supervised[i][0]) for i in batch) for batch in batches])
    bar = progress(len(order), "conversation", "hidden states", initial=sum(map(len, batches[:done])))
    handles = {name: (folder / file).open("ab") for name, (file, _, _) in _files(about).items()}
    for batch in batches[done:]:
        rows = _states_of(model, batch, conversations, encoded, supervised, kept)
        ids, probabilities = likeliest(model, rows)
        labels = [label for i in batch for label in supervised[i][1]]
        owners = [i for i in batch for _ in supervised[i][0]]
        arrays = dict(
            labels=np.array(labels, np.int32).reshape(-1, num_heads + 1),
            conversation=np.array(owners, np.int32),
            likely=ids.cpu().numpy().astype(np.int32),
            probabilities=probabilities.cpu().view(torch.int16).numpy(),
            hidden=rows.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy(),
        )
        for name, array in arrays.items():
            handles[name].write(array.tobytes())
            handles[name].flush()
        bar.update(len(batch))
    bar.close()
    for handle in handles.values():
        handle.close()
    write_json(folder / ABOUT, about)
    return Features(folder)


def _files(about: dict) -> dict[str, tuple[str, type, int]]:
    """The large files: name, kind of number, and how many a position has."""
    return {
        "labels": ("labels.i32", np.int32, about["num_heads"] + 1),
        "conversation": ("conversation.i32", np.int32, 1),
        "likely": ("likely.i32", np.int32, about["likely"]),
        "probabilities": ("probabilities.bf16", np.int16, about["likely"]),
        "hidden": ("hidden.bf16", np.int16, about["hidden_size"]),
    }


def _resume(folder: Path, about: dict, counts: list[int]) -> int:
    """How many batches of so many positions are whole in all files; what comes after them is cut off."""
    sizes = {file: np.dtype(kind).itemsize * width for file, kind, width in _files(about).values()}
    for file in sizes:
        (folder / file).touch()
    whole = min((folder / file).stat().st_size // size for file, size in sizes.items())
    ends = np.cumsum(counts)
    done = int(np.searchsorted(ends, whole, side="right"))
    rows = int(ends[done - 1]) if done else 0
    for file, size in sizes.items():
        with (folder / file).open("r+b") as handle:
            handle.truncate(rows * size)
    return done


def _states_of(model, batch, conversations, encoded, supervised, kept: KeptStates | None) -> torch.Tensor:
    """The states ``[P, D]`` of a batch's supervised positions, kept ones where there are."""
    found = {}
    for i in batch if kept else ():
        own = [token for token, mine in zip(encoded[i].ids, encoded[i].own, strict=True) if mine]
        found[i] = kept.get(conversations[i]["id"], own)
    missing = [i for i in batch if supervised[i][0] and found.get(i) is None]
    if missing:
        hidden = hidden_states(model, [encoded[i].ids for i in missing])
        found |= {i: hidden[line, supervised[i][0]] for line, i in enumerate(missing)}
    width = model.get_output_embeddings().weight.shape[1]
    rows = [found[i].to(model.device, model.dtype) for i in batch if supervised[i][0]]
    return torch.cat(rows) if rows else torch.zeros(0, width, dtype=model.dtype, device=model.device)


def hidden_states(model, rows: list[list[int]]) -> torch.Tensor:
    """Last hidden states ``[B, T, D]`` of texts of up to T tokens, padded on the right: causal attention never looks."""
    logits_function(model)  # refuses a model whose parts do not make the whole
    device = model.get_output_embeddings().weight.device
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    if rope_switches(model):  # a longer neighbour would change the others
        parts = [model.base_model(input_ids=torch.tensor([row], device=device), use_cache=False) for row in rows]
        return torch.nn.utils.rnn.pad_sequence([part.last_hidden_state[0] for part in parts], batch_first=True)
    return model.base_model(input_ids=ids.to(device), use_cache=False).last_hidden_state


def _batches(order: list[int], encoded: list[Encoded]) -> list[list[int]]:
    """The conversations in ``order`` (short ones first), in batches of at most so many tokens when padded."""
    batches: list[list[int]] = [[]]
    for i in order:
        if batches[-1] and (len(batches[-1]) + 1) * len(encoded[i].ids) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(i)
    return batches


def _key(model, tokenizer, conversations: list[dict], num_heads: int, max_length: int) -> str:
    digest = hashlib.sha256(fingerprint(model).encode())
    digest.update(json.dumps([[c["messages"], c.get("finish_reason")] for c in conversations]).encode())
    digest.update(f"{num_heads} {max_length} {LIKELY} {dtype_name(model.dtype)} {tokenizer.chat_template}".encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()
