"""Heads for other software: the original Medusa's files, vLLM's, and a transformers folder that decodes itself."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

from medusa_nb.base_model import base_fingerprint
from medusa_nb.errors import InputError
from medusa_nb.export.bundle import bundle
from medusa_nb.export.custom_generate import ABOUT, refuse_unsupported
from medusa_nb.heads import Heads, MedusaHeads
from medusa_nb.heads_file import CONFIG, WEIGHTS, portable_config
from medusa_nb.storage import respect_umask, save_tensors, write_json, write_text
from medusa_nb.training.calibration import Calibration
from medusa_nb.tree import Tree


def export_tgi(heads: Heads, folder: Path, version: int = 2, **_) -> None:
    """The original Medusa's layout, which TGI reads: version 2 shares lm_head, version 1 has projections.

    Raises:
        InputError: heads that no server loads; version 2 with own projections or other than one block.
    """
    plain = _plain_heads(heads, "TGI")
    if version == 2 and plain.projection is not None:
        raise InputError("these heads have their own projections, which is version 1; export with --version 1")
    if version == 2 and plain.num_layers != 1:
        raise InputError(
            f"TGI reads version 2 with one block per head only, these have {plain.num_layers}; export with --version 1"
        )
    tensors = plain.tensors()
    if version == 1 and plain.projection is None:
        tensors |= {f"{k}.{plain.num_layers}.weight": plain.lm_head.weight for k in range(plain.num_heads)}
    save_tensors(tensors, folder / WEIGHTS)
    write_json(folder / CONFIG, portable_config(plain) | dict(version=str(version)))


def export_vllm(heads: Heads, folder: Path, **_) -> None:
    """The layout of vLLM up to 0.32 (0.33 removed Medusa): biases kept, top-1 chain, no tree.

    The whole lm_head is written, never a draft vocabulary: real vLLM 0.32 sets a ``token_map`` and then refuses the
    checkpoint because it does not count the map as loaded.

    Raises:
        InputError: heads that no server loads, or an lm_head with a bias.
    """
    plain = _plain_heads(heads, "vLLM")
    if plain.projection is None and getattr(plain.lm_head, "bias", None) is not None:
        raise InputError("this base model's lm_head has a bias, and vLLM's format has no place for it")
    tensors = {}
    for k in range(plain.num_heads):
        for layer in range(plain.num_layers):
            tensors[f"blocks.{k}.layers.{layer}.weight"] = plain.weight[k, layer]
            tensors[f"blocks.{k}.layers.{layer}.bias"] = plain.bias[k, layer]
        if plain.projection is not None:
            tensors[f"lm_heads.{k}.weight"] = plain.projection[k]
    if plain.projection is None:
        tensors["lm_heads.0.weight"] = plain.lm_head.weight
    size, hidden = plain.lm_head.weight.shape
    config = dict(
        model_type="medusa",
        architectures=["MedusaModel"],
        hidden_size=hidden,
        vocab_size=size,
        truncated_vocab_size=size,
        num_heads=plain.num_heads,
        num_hidden_layers=plain.num_layers,
        medusa_fc_bias=True,
        original_lm_head=plain.projection is None,
    )
    save_tensors(tensors, folder / "model.safetensors")
    write_json(folder / CONFIG, config)


def export_transformers(
    heads: Heads,
    folder: Path,
    *,
    model,
    tokenizer=None,
    tree: Tree | None = None,
    calibration: Calibration | None = None,
    tree_size: int = 16,
    weights: bool = True,
    **_,
) -> None:
    """A folder that plain transformers decodes with heads, with ``trust_remote_code=True``.

    Args:
        tree: a candidate tree that stays the same.
        calibration: without ``tree``, grow one of ``tree_size`` nodes at every step, copied tokens included. With
            neither, a chain of each head's best token.
        weights: copy the base model and tokenizer, too. Without them the folder serves as ``custom_generate`` for
            the base model loaded from elsewhere.

    Raises:
        InputError: the base model's generation config asks for something that decoding with heads cannot honour.
    """
    try:
        refuse_unsupported(model.generation_config)
    except InputError as error:
        raise InputError(f"the base model's generation_config.json asks for what would be refused: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    if weights:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        respect_umask(*folder.glob("*.safetensors"))
    save_tensors(heads.tensors(), folder / WEIGHTS)
    if tree is None and calibration is not None:
        worth = [[round(p, 5) for p in row] for row in calibration.ngram_worth.tolist()]
        drafting = dict(tree_size=tree_size, ngram_worth=worth)
    else:
        drafting = dict(tree=[list(path) for path in (tree or Tree.chain(heads.num_heads)).paths])
    about = portable_config(heads)
    about |= dict(base_model=about["base_model_name_or_path"], base_fingerprint=base_fingerprint(model), **drafting)
    write_json(folder / ABOUT, about, indent=None)
    write_text(folder / "custom_generate" / "generate.py", bundle())


FORMATS: dict[str, Callable] = {"tgi": export_tgi, "vllm": export_vllm, "transformers": export_transformers}


def export(heads: Heads, folder: str | Path, to: str, **options) -> list[Path]:
    """Write heads into a new or empty ``folder`` in another software's format; returns the files.

    Raises:
        InputError: unknown format, a folder that is not empty, or heads the format cannot hold.
    """
    folder = Path(folder)
    if to not in FORMATS:
        raise InputError(f"unknown format '{to}'; choose one of {', '.join(FORMATS)}")
    if folder.is_file() or folder.exists() and any(folder.iterdir()):
        raise InputError(f"'{folder}' is not an empty folder; choose a new one for the export")
    existed = folder.exists()
    try:
        FORMATS[to](heads, folder, **options)
    except (InputError, OSError):
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _plain_heads(heads: Heads, server: str) -> MedusaHeads:
    if not isinstance(heads, MedusaHeads):
        raise InputError(
            f"these heads see the path, and {server}'s format has no place for that; export plain heads, or to "
            "transformers"
        )
    if heads.vocabulary is not None:
        if heads.projection is not None:
            raise InputError(f"these heads draft only {heads.num_choices} tokens; export those they were limited from")
        warnings.warn(
            f"these heads draft {heads.num_choices} tokens, and no server loads such ones (vLLM 0.32 sets their "
            "token_map and then misses it); they are written to draft with the whole lm_head",
            stacklevel=4,
        )
    return heads
