"""Exports read back the way their readers do: same keys, same shapes, same arithmetic, nothing ignored.

Written from the facts of each format, not with the code that wrote the files, so that a mistake in one
does not hide in the other.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from medusa_nb.errors import InputError


class Strict(dict):
    """Tensors that must all be taken, each with the shape its reader expects."""

    def __init__(self, file: Path):
        super().__init__(load_file(file))
        self.file = file

    def take(self, name: str, *shape: int) -> torch.Tensor:
        if name not in self:
            raise InputError(f"{self.file} lacks {name}")
        tensor = self.pop(name)
        if tuple(tensor.shape) != shape:
            raise InputError(
                f"{self.file}: {name} has the shape {list(tensor.shape)}, its reader expects {list(shape)}"
            )
        return tensor

    def finish(self) -> None:
        if self:
            raise InputError(f"{self.file} holds {', '.join(sorted(self))}, which its reader would ignore")


def read_tgi(folder: Path, lm_head: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Logits ``[K, ..., V]`` as TGI computes them from states ``[..., D]``.

    The folder is taken for Medusa because its config has ``medusa_num_heads`` and no ``architectures``. If the
    file holds ``0.{layers}.weight`` it is version 1, else version 2, of which one block a head is read.
    """
    config, tensors = json.loads((folder / "config.json").read_text()), Strict(folder / "medusa_lm_head.safetensors")
    if "architectures" in config or "medusa_num_heads" not in config:
        raise InputError(
            f"{folder / 'config.json'} is not taken for Medusa: it needs medusa_num_heads, no architectures"
        )
    vocabulary, width = lm_head.shape
    layers, first = config["medusa_num_layers"], "0.{}.weight".format(config["medusa_num_layers"]) in tensors
    if not first and layers != 1:
        raise InputError(f"{folder / 'config.json'}: version 2 is read with medusa_num_layers 1, not {layers}")
    logits = []
    for k in range(config["medusa_num_heads"]):
        x = hidden
        for layer in range(layers):
            weight = tensors.take(f"{k}.{layer}.linear.weight", width, width)
            x = x + F.silu(F.linear(x, weight, tensors.take(f"{k}.{layer}.linear.bias", width)))
        logits.append(F.linear(x, tensors.take(f"{k}.{layers}.weight", vocabulary, width) if first else lm_head))
    tensors.finish()
    return torch.stack(logits)


def read_vllm(folder: Path, lm_head: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Logits ``[K, ..., V]`` as vLLM up to 0.32 computes them from states ``[..., D]``.

    With a ``truncated_vocab_size`` below ``vocab_size``, ``token_map`` names the tokens that the projections'
    rows stand for, and all others get -inf; otherwise a ``token_map`` is ignored.
    """
    config, tensors = json.loads((folder / "config.json").read_text()), Strict(folder / "model.safetensors")
    if config.get("model_type") != "medusa" or config.get("architectures") != ["MedusaModel"]:
        raise InputError(f"{folder / 'config.json'} is not taken for Medusa: model_type and architectures must say so")
    width, vocabulary, biased = config["hidden_size"], config["vocab_size"], config.get("medusa_fc_bias", False)
    if vocabulary != len(lm_head):
        raise InputError(f"{folder / 'config.json'}: vocab_size {vocabulary}, but the base model has {len(lm_head)}")
    rows, shared = config.get("truncated_vocab_size") or vocabulary, config.get("original_lm_head", False)
    tokens = read_token_map(tensors, rows, vocabulary) if rows < vocabulary else slice(None)
    projection = tensors.take("lm_heads.0.weight", rows, width) if shared else None
    logits = []
    for k in range(config["num_heads"]):
        x = hidden
        for layer in range(config["num_hidden_layers"]):
            weight = tensors.take(f"blocks.{k}.layers.{layer}.weight", width, width)
            bias = tensors.take(f"blocks.{k}.layers.{layer}.bias", width) if biased else None
            x = x + F.silu(F.linear(x, weight, bias))
        guessed = F.linear(x, projection if shared else tensors.take(f"lm_heads.{k}.weight", rows, width))
        logits.append(guessed.new_full((*guessed.shape[:-1], vocabulary), -torch.inf))
        logits[-1][..., tokens] = guessed
    tensors.finish()
    return torch.stack(logits)


def read_token_map(tensors: Strict, count: int, vocabulary: int) -> torch.Tensor:
    """The ids ``[count]`` of the tokens that heads may guess: whole numbers, each once, all of the vocabulary."""
    tokens = tensors.take("token_map", count)
    if (
        tokens.dtype != torch.int64
        or len(tokens.unique()) < count
        or not 0 <= tokens.min() <= tokens.max() < vocabulary
    ):
        raise InputError(f"{tensors.file}: token_map must hold {count} different ids below {vocabulary} as int64")
    return tokens


READERS = {"tgi": read_tgi, "vllm": read_vllm}


@torch.no_grad()
def check(folder: str | Path, to: str, heads, model, prompt: torch.Tensor) -> str:
    """Read an export back as its reader does and compare with ours; returns a sentence about what was found.

    For ``transformers`` the folder is loaded with plain transformers and must decode ``prompt`` ``[1, T]`` to
    the very tokens of plain greedy decoding; for the others logits on real hidden states must agree.

    Raises:
        InputError: anything missing, left over, of another shape, or different.
    """
    folder = Path(folder)
    if to == "transformers":
        return _check_transformers(folder, model, prompt)
    lm_head = model.get_output_embeddings().weight.float()
    hidden = model.base_model(input_ids=prompt).last_hidden_state[0].float()
    theirs, every = READERS[to](folder, lm_head, hidden), len(lm_head)
    if heads.vocabulary is not None:
        theirs = theirs[..., heads.vocabulary]
    ours = heads(hidden.to(heads.weight.dtype)).float()
    if theirs.shape != ours.shape:
        raise InputError(f"'{folder}' gives logits of the shape {list(theirs.shape)}, ours are {list(ours.shape)}")
    guessed = theirs != -torch.inf
    count = int(guessed[0, 0].sum())
    gap = (theirs - ours)[guessed].abs().max().item() if count else torch.inf
    allowed = 1e-5 if heads.weight.dtype == torch.float32 else 0.5
    if not gap <= allowed * max(1.0, ours.abs().max().item()):
        raise InputError(f"'{folder}' gives other logits than ours: they differ by {gap:.2g}")
    words = f", {count} of {every} tokens" if count < every else ""
    return f"read back as {to} does: {len(theirs)} heads{words}, largest difference of logits {gap:.1g}"


def _check_transformers(folder: Path, model, prompt: torch.Tensor) -> str:
    arguments = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=48, do_sample=False)
    plain = model.generate(prompt, **arguments)
    ours = model.generate(prompt, custom_generate=str(folder), trust_remote_code=True, **arguments)
    if plain.tolist() != ours.tolist():
        raise InputError(f"'{folder}' decodes another text than plain greedy decoding")
    return f"decoded with custom_generate: {ours.shape[1] - prompt.shape[1]} tokens, the text of plain greedy decoding"
