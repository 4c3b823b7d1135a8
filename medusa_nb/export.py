"""Heads for other software: the original Medusa's files, vLLM's, and a transformers folder that decodes itself."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from medusa_nb.bundle import bundle
from medusa_nb.calibration import Calibration
from medusa_nb.custom_generate import ABOUT, base_fingerprint
from medusa_nb.errors import InputError
from medusa_nb.heads import CONFIG, WEIGHTS, MedusaHeads, portable_name
from medusa_nb.tree import Tree, chain


def export_tgi(heads: MedusaHeads, folder: Path, version: int = 2, **_) -> None:
    """The original Medusa's layout, which TGI reads: version 2 shares lm_head, version 1 has projections.

    Raises:
        InputError: heads that see the path or guess few tokens only; version 2 with own projections or other than one
            block.
    """
    _refuse_path(heads, "TGI")
    if heads.vocabulary is not None:
        raise InputError(
            f"these heads guess only {len(heads.vocabulary)} tokens, and TGI's format has no place for such a "
            "draft vocabulary; export heads that guess any token"
        )
    if version == 2 and heads.projection is not None:
        raise InputError("these heads have their own projections, which is version 1; export with --version 1")
    if version == 2 and heads.num_layers != 1:
        raise InputError(
            f"TGI reads version 2 with one block per head only, these have {heads.num_layers}; export with --version 1"
        )
    tensors = heads.tensors()
    if version == 1 and heads.projection is None:
        tensors |= {f"{k}.{heads.num_layers}.weight": heads.shared[0].weight for k in range(heads.num_heads)}
    _write(folder, tensors, WEIGHTS, heads.config() | dict(version=str(version)))


def export_vllm(
    heads: MedusaHeads,
    folder: Path,
    *,
    draft_vocabulary: int | None = None,
    calibration: Calibration | None = None,
    **_,
) -> None:
    """The layout of vLLM up to 0.32 (0.33 removed Medusa): biases kept, top-1 chain, no tree.

    Args:
        draft_vocabulary: N; heads then guess only the N most frequent tokens of ``calibration``. ``token_map``
            (int64 ``[N]``) holds their ids, lm_head or the projections only their rows, and the reader gives
            every other token the logit -inf.

    Raises:
        InputError: heads that see the path, an lm_head with a bias, or a draft vocabulary that is unknown or no
            smaller than the vocabulary (the reader would ignore ``token_map``); one for heads that have their own.
    """
    _refuse_path(heads, "vLLM")
    _refuse_bias(heads, "vLLM")
    vocabulary, tensors = heads.shared[0].weight.shape[0], {}
    if draft_vocabulary is not None:
        heads = heads.limited_to(_token_map(draft_vocabulary, calibration))
    if heads.vocabulary is not None:
        if len(heads.vocabulary) == vocabulary:
            raise InputError(f"a draft vocabulary of {vocabulary} tokens is none: the vocabulary has {vocabulary}")
        tensors["token_map"] = heads.vocabulary
    for k in range(heads.num_heads):
        for layer in range(heads.num_layers):
            tensors[f"blocks.{k}.layers.{layer}.weight"] = heads.weight[k, layer]
            tensors[f"blocks.{k}.layers.{layer}.bias"] = heads.bias[k, layer]
        if heads.projection is not None:
            tensors[f"lm_heads.{k}.weight"] = heads.projection[k]
    lm_head = heads.shared[0].weight
    if heads.projection is None:
        tensors["lm_heads.0.weight"] = lm_head if heads.vocabulary is None else heads.shared_rows
    config = dict(
        model_type="medusa",
        architectures=["MedusaModel"],
        hidden_size=lm_head.shape[1],
        vocab_size=vocabulary,
        truncated_vocab_size=vocabulary if heads.vocabulary is None else len(heads.vocabulary),
        num_heads=heads.num_heads,
        num_hidden_layers=heads.num_layers,
        medusa_fc_bias=True,
        original_lm_head=heads.projection is None,
    )
    _write(folder, tensors, "model.safetensors", config)


def export_transformers(
    heads: MedusaHeads,
    folder: Path,
    *,
    model,
    tokenizer=None,
    tree: Tree | None = None,
    calibration: Calibration | None = None,
    tree_shape: tuple[int, int] = (8, 3),
    weights: bool = True,
    **_,
) -> None:
    """A folder that plain transformers decodes with heads, with ``trust_remote_code=True``.

    Args:
        tree: a candidate tree that stays the same.
        calibration: without ``tree``, grow one at every step, n-grams included; ``tree_shape`` is its number
            of nodes and how deep the heads guess. With neither, a chain of best guesses.
        weights: copy the base model and tokenizer, too. Without them the folder serves as ``custom_generate``
            for the base model loaded from elsewhere.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if weights:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    save_file(_plain(heads.tensors()), folder / WEIGHTS)
    if tree is None and calibration is not None:
        worth = [[round(p, 5) for p in row] for row in calibration.ngram_worth.tolist()]
        guessing = dict(tree_shape=tree_shape, ngram_worth=worth, frequent=calibration.frequent.tolist())
    else:
        guessing = dict(tree=[list(path) for path in (tree or chain(heads.num_heads)).paths])
    about = heads.config() | dict(
        base_model=portable_name(heads.base_name), base_fingerprint=base_fingerprint(model), **guessing
    )
    (folder / ABOUT).write_text(json.dumps(about) + "\n")
    (folder / "custom_generate").mkdir(exist_ok=True)
    (folder / "custom_generate" / "generate.py").write_text(bundle())


FORMATS: dict[str, Callable] = {"tgi": export_tgi, "vllm": export_vllm, "transformers": export_transformers}


def export(heads: MedusaHeads, folder: str | Path, to: str, **options) -> list[Path]:
    """Write heads into a new or empty ``folder`` in another software's format; returns the files.

    Raises:
        InputError: unknown format, a folder that is not empty, or heads the format cannot hold.
    """
    folder = Path(folder)
    if to not in FORMATS:
        raise InputError(f"unknown format '{to}'; choose one of {', '.join(FORMATS)}")
    if options.get("draft_vocabulary") is not None and to != "vllm":
        raise InputError(f"a draft vocabulary to choose is part of vllm's format only, not of {to}'s")
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"'{folder}' is not empty; choose a new folder for the export")
    existed = folder.exists()
    try:
        FORMATS[to](heads, folder, **options)
    except InputError:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _refuse_path(heads: MedusaHeads, server: str) -> None:
    if heads.sees_path:
        raise InputError(
            f"these heads see the path, and {server}'s format has no place for that block; export plain heads, "
            "or to transformers"
        )


def _refuse_bias(heads: MedusaHeads, server: str) -> None:
    if heads.projection is None and getattr(heads.shared[0], "bias", None) is not None:
        raise InputError(f"this base model's lm_head has a bias, and {server}'s format has no place for it")


def _token_map(count: int, calibration: Calibration | None) -> torch.Tensor:
    if calibration is None:
        raise InputError("a draft vocabulary needs the calibration beside the heads, which knows frequent tokens")
    return calibration.most_frequent(count).long()


def _plain(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _write(folder: Path, tensors: dict[str, torch.Tensor], name: str, config: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_plain(tensors), folder / name)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
