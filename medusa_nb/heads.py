"""Medusa heads: K small networks that guess several tokens ahead from one hidden state.

The base model turns the last hidden state at position t into the token at t+1. Head k reads the
same hidden state and guesses the token at t+k+2 (Cai et al., arXiv 2401.10774, section 2.1).
"""

import json
import pickle
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from medusa_nb.errors import InputError

WEIGHTS, CONFIG = "medusa_lm_head.safetensors", "config.json"


class MedusaHeads(nn.Module):
    """K heads, each a stack of residual blocks ``x + SiLU(W x + b)`` followed by a projection to V.

    The blocks of all heads lie in one tensor, so that K heads cost one batched multiplication, and no
    two of them can share a block by accident. The blocks start at zero: an untrained head repeats the
    base model's own prediction.

    Args:
        lm_head: the base model's frozen output layer, ``[V, D]``. Not a parameter of the heads.
        hidden_size, num_heads, num_layers: D, K and the number of residual blocks.
        own_projection: give each head its own ``[V, D]`` projection, a copy of lm_head at the start
            (the original format's version 1), instead of sharing lm_head (version 2).
        embedding: the base model's frozen input embedding ``[V, D]``. If given, the heads see the path: one more
            residual block per head reads the embeddings of all tokens between the hidden state and its guess,
            the root first, which the base model itself says, then the guesses above (Hydra, Ankner et al.,
            arXiv 2402.05109, section 3). No server's format holds this block.
        vocabulary: ids ``[V']`` of the only tokens that are guessed; logits then have V' columns, and a projection
            V' rows. Rare tokens are then never guessed, which costs little: the base model still says them itself
            (FR-Spec, arXiv 2502.14856).
    """

    def __init__(
        self,
        lm_head: nn.Module,
        hidden_size: int,
        num_heads: int = 4,
        num_layers: int = 1,
        own_projection: bool = False,
        embedding: nn.Module | None = None,
        vocabulary: torch.Tensor | None = None,
    ):
        super().__init__()
        if num_heads < 1 or num_layers < 0:
            raise InputError(f"num_heads={num_heads} and num_layers={num_layers}: at least one head is needed")
        self.shared = (lm_head, embedding)  # in a tuple, so that they are neither saved nor trained with the heads
        like = lm_head.weight
        shape = (num_heads, num_layers, hidden_size)
        self.weight = nn.Parameter(torch.zeros(*shape, hidden_size, dtype=like.dtype, device=like.device))
        self.bias = nn.Parameter(torch.zeros(*shape, dtype=like.dtype, device=like.device))
        rows = like.detach()
        # buffers of a module: a compiled step then holds them as constants, laid out for its number of rows
        for name in ("vocabulary", "known_places", "shared_rows"):
            self.register_buffer(name, None)
        if vocabulary is not None:
            self.vocabulary = vocabulary.to(like.device)
            self.known_places = _places(self.vocabulary, len(like))
            self.shared_rows = rows = rows[self.vocabulary]
        self.projection = nn.Parameter(rows.expand(num_heads, *rows.shape).clone()) if own_projection else None
        self.path_weight = self.path_bias = None
        if embedding is not None:
            wide, seen = hidden_size, embedding.weight.shape[1]
            sizes = [wide + (k + 1) * seen for k in range(num_heads)]
            self.path_weight = nn.ParameterList([like.new_zeros(hidden_size, size) for size in sizes])
            self.path_bias = nn.Parameter(like.new_zeros(num_heads, hidden_size))
        self.base_name = ""

    @classmethod
    def for_model(
        cls,
        model,
        num_heads: int = 4,
        num_layers: int = 1,
        own_projection: bool = False,
        see_path: bool = False,
        vocabulary: torch.Tensor | None = None,
    ):
        """Fresh heads that fit a base model: its hidden size, vocabulary, device and dtype."""
        lm_head = model.get_output_embeddings()
        embedding = model.get_input_embeddings() if see_path else None
        heads = cls(lm_head, lm_head.weight.shape[1], num_heads, num_layers, own_projection, embedding, vocabulary)
        heads.base_name = model.config._name_or_path
        return heads

    def limited_to(self, ids: torch.Tensor) -> "MedusaHeads":
        """The same heads, with the same weights, guessing only the tokens ``ids``: fewer logits at every step."""
        if self.vocabulary is not None:
            raise InputError(
                f"these heads guess only {len(self.vocabulary)} tokens already; limit those they came from"
            )
        wide, own = self.weight.shape[-1], self.projection is not None
        limited = MedusaHeads(self.shared[0], wide, self.num_heads, self.num_layers, own, self.shared[1], ids)
        limited.weight, limited.bias, limited.base_name = self.weight, self.bias, self.base_name
        limited.path_weight, limited.path_bias = self.path_weight, self.path_bias
        if own:
            limited.projection = nn.Parameter(self.projection.detach()[:, limited.vocabulary], requires_grad=False)
        return limited.requires_grad_(self.weight.requires_grad)

    @property
    def num_heads(self) -> int:
        return self.weight.shape[0]

    @property
    def num_layers(self) -> int:
        return self.weight.shape[1]

    @property
    def sees_path(self) -> bool:
        """Whether the heads read the tokens between the hidden state and their guess, too."""
        return self.path_weight is not None

    def tokens(self, places: torch.Tensor) -> torch.Tensor:
        """The token ids whose logits stand at these places."""
        return places if self.vocabulary is None else self.vocabulary[places]

    def places(self, tokens: torch.Tensor) -> torch.Tensor:
        """Where the logits of these token ids stand; -1 for a token that is never guessed, negative ids as they are."""
        if self.vocabulary is None:
            return tokens
        return torch.where(tokens < 0, tokens, self.known_places[tokens.clamp(min=0)])

    def forward(self, hidden: torch.Tensor, count: int | None = None, path: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of the first ``count`` heads (all by default): ``[..., D] -> [K, ..., V]``.

        Args:
            path: token ids ``[..., K]`` that come after these states, of which head k reads the first k + 1;
                needed by heads that see the path, ignored by others.
        """
        count = self.num_heads if count is None else count
        x = self.blocks(hidden.reshape(-1, hidden.shape[-1]), count)
        if self.sees_path:
            if path is None:
                raise InputError("these heads see the path; pass the tokens that come after the states")
            path = path.reshape(-1, path.shape[-1])
            x = torch.stack([self.see(k, x[k], path[:, : k + 1]) for k in range(count)])
        return self.project(x, 0).reshape(count, *hidden.shape[:-1], -1)

    def after(self, k: int, x: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, P, V]`` of head k below P paths: ``x`` ``[B, D]`` from :meth:`blocks`, ids ``[B, P, k + 1]``."""
        x = x.unsqueeze(1)
        if self.sees_path:
            x = self.see(k, x.expand(-1, path.shape[1], -1), path)
        return self.project(x.flatten(0, 1).unsqueeze(0), k).view(*x.shape[:2], -1)

    def blocks(self, hidden: torch.Tensor, count: int) -> torch.Tensor:
        """The residual blocks of the first ``count`` heads: ``[R, D] -> [count, R, D]``."""
        if not self.num_layers:
            return hidden.expand(count, *hidden.shape)
        weight, bias = self.weight[:count], self.bias[:count]
        # all heads read the same state, so their first layers are one matrix
        first = F.linear(hidden, weight[:, 0].flatten(0, 1), bias[:, 0].flatten())
        x = hidden + F.silu(first.unflatten(1, (count, -1)).transpose(0, 1))
        for layer in range(1, self.num_layers):
            x = x + F.silu(torch.baddbmm(bias[:, layer].unsqueeze(1), x, weight[:, layer].transpose(1, 2)))
        return x

    def see(self, k: int, x: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
        """Head k's block that reads the path: ``[..., D]``, ids ``[..., k + 1] -> [..., D]``."""
        seen = self.shared[1](path).to(x.dtype).flatten(-2)
        return x + F.silu(F.linear(torch.cat([x, seen], -1), self.path_weight[k], self.path_bias[k]))

    def project(self, x: torch.Tensor, first: int) -> torch.Tensor:
        """Logits of n heads from head ``first`` on: ``[n, R, D] -> [n, R, V]``."""
        if self.projection is not None:
            # one by one: a compiled step lays out each matrix for its number of rows
            return torch.stack([F.linear(rows, self.projection[first + k]) for k, rows in enumerate(x)])
        return self.shared[0](x) if self.vocabulary is None else F.linear(x, self.shared_rows)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by the names of the original Medusa's format (``{k}.path.*`` and ``vocabulary`` beyond it)."""
        tensors = {}
        for k in range(self.num_heads):
            for layer in range(self.num_layers):
                tensors[f"{k}.{layer}.linear.weight"] = self.weight[k, layer]
                tensors[f"{k}.{layer}.linear.bias"] = self.bias[k, layer]
            if self.projection is not None:
                tensors[f"{k}.{self.num_layers}.weight"] = self.projection[k]
            if self.sees_path:
                tensors |= {f"{k}.path.weight": self.path_weight[k], f"{k}.path.bias": self.path_bias[k]}
        if self.vocabulary is not None:
            tensors["vocabulary"] = self.vocabulary
        return tensors

    def config(self) -> dict:
        """What the original format's ``config.json`` states."""
        config = dict(
            medusa_num_heads=self.num_heads,
            medusa_num_layers=self.num_layers,
            hidden_size=self.weight.shape[-1],
            vocab_size=self.shared[0].weight.shape[0],
            base_model_name_or_path=portable_name(self.base_name),
            version="2" if self.projection is None else "1",
        )
        if self.sees_path:
            config["sees_path"] = True  # no server knows it, so no server takes these heads for plain ones
        if self.vocabulary is not None:
            config["draft_vocabulary_size"] = len(self.vocabulary)
        return config

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``medusa_lm_head.safetensors`` in the original Medusa's format."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in self.tensors().items()}
        save_file(tensors, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(self.config(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, model):
        """Load heads for ``model`` from the original format, versions 1 and 2; every tensor must be there and fit.

        Reads ``medusa_lm_head.safetensors``, or the ``.pt`` file of older checkpoints, in which only tensors
        are accepted. If the config states fewer heads than the file holds, as some published ones do, the
        file counts, and a warning says so.

        Raises:
            InputError: a file is missing or damaged, a tensor is missing, unexpected or of another
                shape, or the heads were trained for a base model of another width or vocabulary.
        """
        folder = Path(folder)
        old = WEIGHTS.replace(".safetensors", ".pt")
        name = old if not (folder / WEIGHTS).exists() and (folder / old).exists() else WEIGHTS
        for file in (CONFIG, name):
            if not (folder / file).is_file():
                raise InputError(f"no {file} in '{folder}'; train heads with 03_head_training or name another folder")
        try:
            config = json.loads((folder / CONFIG).read_text())
        except json.JSONDecodeError as error:
            raise InputError(f"{folder / CONFIG}, line {error.lineno}: not valid JSON ({error.msg})") from error
        for key in ("medusa_num_heads", "medusa_num_layers"):
            if not isinstance(config, dict) or not isinstance(config.get(key), int):
                raise InputError(f"{folder / CONFIG} has no whole number '{key}'; it does not describe Medusa heads")
        return cls.from_files(config, folder / name, model)

    @classmethod
    def from_files(cls, config: dict, file: str | Path, model):
        """Load heads that ``config`` describes from one file of tensors; see :meth:`from_pretrained`."""
        tensors = _read_tensors(Path(file))
        count, layers = config["medusa_num_heads"], config["medusa_num_layers"]
        held = len({name.split(".")[0] for name in tensors if name.split(".")[0].isdigit()})
        if held > count:
            warnings.warn(f"the config states {count} heads, {file} holds {held}; using {held}", stacklevel=3)
            count = held
        own = f"0.{layers}.weight" in tensors
        _refuse_other_base(Path(file).parent, config, tensors, model.get_output_embeddings().weight)
        heads = cls.for_model(
            model, count, layers, own, config.get("sees_path", False), _vocabulary(config, tensors, file)
        )
        expected = {name: tensor.shape for name, tensor in heads.tensors().items()}
        if missing := sorted(expected.keys() - tensors.keys()):
            raise InputError(f"{file} lacks {', '.join(missing)}; save the heads again")
        if extra := sorted(tensors.keys() - expected.keys()):
            raise InputError(f"{file} holds {', '.join(extra)}, which {CONFIG} does not mention")
        for name, shape in expected.items():
            if tensors[name].shape != shape:
                raise InputError(f"{file}: {name} has the shape {list(tensors[name].shape)}, {list(shape)} is needed")
        with torch.no_grad():
            for name, tensor in heads.tensors().items():
                tensor.copy_(tensors[name])
        return heads.requires_grad_(False).eval()


def portable_name(name: str) -> str:
    """A base model's name without the path of this machine: relative to the repository if inside it."""
    root = Path(__file__).resolve().parent.parent
    path = Path(name)
    if path.is_absolute():
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
    return name


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        if file.suffix == ".pt":
            return torch.load(file, weights_only=True, map_location="cpu")
        return load_file(file)
    except pickle.UnpicklingError as error:
        raise InputError(f"{file} holds more than tensors; nothing in it was executed, and it is refused") from error
    except (SafetensorError, OSError, RuntimeError, EOFError) as error:
        raise InputError(f"{file} is damaged or cut short ({error}); save the heads again") from error


def _places(vocabulary: torch.Tensor, size: int) -> torch.Tensor:
    """For each of ``size`` tokens its place in the vocabulary ``[V']``, -1 if it is not in it."""
    good = vocabulary.ndim == 1 and len(vocabulary) > 0 and vocabulary.dtype == torch.long
    if not good or len(vocabulary.unique()) < len(vocabulary) or not 0 <= vocabulary.min() <= vocabulary.max() < size:
        raise InputError(f"a draft vocabulary is a list of different token ids from 0 to {size - 1}; this one is not")
    places = torch.full((size,), -1, device=vocabulary.device)
    places[vocabulary] = torch.arange(len(vocabulary), device=vocabulary.device)
    return places


def _vocabulary(config: dict, tensors: dict, file: str | Path) -> torch.Tensor | None:
    """The draft vocabulary that a file holds, None if the config states none."""
    stated, ids = config.get("draft_vocabulary_size"), tensors.get("vocabulary")
    if stated is not None and (ids is None or len(ids) != stated):
        raise InputError(f"{file} lacks the draft vocabulary of {stated} tokens that {CONFIG} states; save them again")
    return None if stated is None else ids


def _refuse_other_base(folder: Path, config: dict, tensors: dict, lm_head: torch.Tensor) -> None:
    vocabulary, hidden = lm_head.shape
    stated = config.get("base_model_name_or_path", "another base model")
    first = tensors.get("0.0.linear.weight")
    found = first.shape[-1] if first is not None else config.get("hidden_size", hidden)
    if found != hidden:
        raise InputError(f"the heads in '{folder}' are for {stated} (hidden size {found}), this model has {hidden}")
    own = tensors.get(f"0.{config['medusa_num_layers']}.weight") if "draft_vocabulary_size" not in config else None
    found = own.shape[0] if own is not None else config.get("vocab_size", vocabulary)
    if found != vocabulary:
        raise InputError(f"the heads in '{folder}' are for {stated} (vocabulary {found}), this model has {vocabulary}")
