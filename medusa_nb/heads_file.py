"""Heads on disk: ``config.json`` and ``medusa_lm_head.safetensors``, the original Medusa's format.

Plain heads are written just as the original does. Heads that see the path use the same two files with tensors of
their own. Every tensor must be there and fit: a missing one would go unnoticed until nothing is ever accepted.
"""

import pickle
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from medusa_nb.errors import InputError
from medusa_nb.heads import Heads, MedusaHeads
from medusa_nb.path_heads import PathHeads
from medusa_nb.storage import portable_name, read_json, save_tensors, write_json

WEIGHTS, CONFIG = "medusa_lm_head.safetensors", "config.json"


def save_heads(heads: Heads, folder: str | Path) -> None:
    """Write ``config.json`` and ``medusa_lm_head.safetensors`` into ``folder``."""
    if bad := [name for name, tensor in heads.tensors().items() if not torch.isfinite(tensor).all()]:
        raise InputError(
            f"{', '.join(bad[:3])} of the heads is not finite; nothing was saved, train with other settings"
        )
    save_tensors(heads.tensors(), Path(folder) / WEIGHTS)
    write_json(Path(folder) / CONFIG, portable_config(heads))


def portable_config(heads: Heads) -> dict:
    """The heads' config, with the base model's name but no path of this machine."""
    return heads.config() | dict(base_model_name_or_path=portable_name(heads.base_name))


def load_heads(folder: str | Path, model) -> Heads:
    """Load heads for ``model``: the original format's versions 1 and 2, or heads that see the path.

    Reads ``medusa_lm_head.safetensors``, or the ``.pt`` file of older checkpoints, in which only tensors are
    accepted. If the config states fewer heads than the file holds, as some published ones do, the file counts, and a
    warning says so.

    Raises:
        InputError: a file is missing or damaged, a tensor is missing, unexpected or of another shape, or the heads
            were trained for a base model of another width or vocabulary.
    """
    folder = Path(folder)
    old = WEIGHTS.replace(".safetensors", ".pt")
    name = old if not (folder / WEIGHTS).exists() and (folder / old).exists() else WEIGHTS
    for file in (CONFIG, name):
        if not (folder / file).is_file():
            raise InputError(f"no {file} in '{folder}'; train heads with 03_head_training or name another folder")
    return heads_from(read_json(folder / CONFIG), folder / name, model)


def heads_from(config: dict, file: str | Path, model) -> Heads:
    """Load the heads that ``config`` describes from one file of tensors; see :func:`load_heads`."""
    file = Path(file)
    count, tensors = _whole_number(config, "medusa_num_heads", file), _read_tensors(file)
    held = len({name.split(".")[0] for name in tensors if name.split(".")[0].isdigit()})
    if held > count:
        warnings.warn(f"the config states {count} heads, {file} holds {held}; using {held}", stacklevel=3)
        count = held
    _refuse_other_base(file.parent, config, tensors, model.get_output_embeddings().weight)
    heads = _empty_heads(config, count, tensors, file, model)
    expected = heads.tensors()
    if missing := sorted(expected.keys() - tensors.keys()):
        raise InputError(f"{file} lacks {', '.join(missing)}; save the heads again")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise InputError(f"{file} holds {', '.join(extra)}, which {CONFIG} does not mention")
    for name, tensor in expected.items():
        found = tensors[name]
        if found.shape != tensor.shape:
            raise InputError(f"{file}: {name} has the shape {list(found.shape)}, {list(tensor.shape)} is needed")
        if not torch.isfinite(found).all():
            raise InputError(f"{file}: {name} is not finite; the heads were damaged in training, train them again")
        with torch.no_grad():
            tensor.copy_(found)
    return heads.requires_grad_(False).eval()


def _whole_number(config: dict, name: str, file: Path) -> int:
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise InputError(f"the {CONFIG} of '{file.parent}' has no whole number '{name}' of 1 or more: no Medusa heads")
    return value


def _empty_heads(config: dict, count: int, tensors: dict, file: Path, model) -> Heads:
    if config.get("sees_path"):
        vocabulary, every = tensors.get("vocabulary"), config.get("vocab_size")
        stated = config.get("draft_vocabulary_size", every)
        if stated != (every if vocabulary is None else len(vocabulary)):
            raise InputError(
                f"{file} lacks the draft vocabulary of {stated} tokens that {CONFIG} states; save them again"
            )
        return PathHeads(model, count, vocabulary)
    layers = _whole_number(config, "medusa_num_layers", file)
    return MedusaHeads(model, count, layers, own_projection=f"0.{layers}.weight" in tensors)


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        old = file.suffix == ".pt"
        read = torch.load(file, weights_only=True, map_location="cpu") if old else load_file(file)
    except pickle.UnpicklingError as error:
        raise InputError(f"{file} holds more than tensors; nothing in it was executed, and it is refused") from error
    except (SafetensorError, OSError, RuntimeError, EOFError) as error:
        why = str(error).split("\n")[0]
        raise InputError(f"{file} is damaged or cut short ({why}); save the heads again") from error
    if not isinstance(read, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in read.values()):
        raise InputError(f"{file} does not hold tensors by name; save the heads again")
    return read


def _refuse_other_base(folder: Path, config: dict, tensors: dict, lm_head: torch.Tensor) -> None:
    stated = config.get("base_model_name_or_path", "another base model")
    block, own = tensors.get("0.0.linear.weight"), tensors.get(f"0.{config.get('medusa_num_layers')}.weight")
    vocabulary, hidden = lm_head.shape
    for what, found, needed in (
        ("hidden size", config.get("hidden_size") if block is None else block.shape[-1:].numel(), hidden),
        ("vocabulary", config.get("vocab_size") if own is None else own.shape[:1].numel(), vocabulary),
    ):
        if found not in (None, needed):
            raise InputError(f"the heads in '{folder}' are for {stated} ({what} {found}), this model has {needed}")
