"""Exports read back the way their readers do: same keys, same shapes, same arithmetic, nothing ignored.

Written from the facts of each format, not with the code that wrote the files, so that a mistake in one
does not hide in the other.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from medusa_nb.decoding import Generation
from medusa_nb.errors import InputError
from medusa_nb.measurement.identity import first_difference_gap, near_tie
from medusa_nb.storage import read_json


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
        return tensor.float()

    def finish(self) -> None:
        if self:
            raise InputError(f"{self.file} holds {', '.join(sorted(self))}, which its reader would ignore")


def read_tgi(folder: Path, lm_head: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Logits ``[K, ..., V]`` as TGI computes them from states ``[..., D]``.

    The folder is taken for Medusa because its config has ``medusa_num_heads`` and no ``architectures``. If the
    file holds ``0.{layers}.weight`` it is version 1, else version 2, of which one block a head is read.
    """
    config, tensors = read_json(folder / "config.json"), Strict(folder / "medusa_lm_head.safetensors")
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

    It is as strict as the real reader turned out to be (``make peers``): a ``token_map``, which a truncated
    vocabulary needs, is set and then missed, so no such checkpoint loads.
    """
    config, tensors = read_json(folder / "config.json"), Strict(folder / "model.safetensors")
    if config.get("model_type") != "medusa" or config.get("architectures") != ["MedusaModel"]:
        raise InputError(f"{folder / 'config.json'} is not taken for Medusa: model_type and architectures must say so")
    width, vocabulary, biased = config["hidden_size"], config["vocab_size"], config.get("medusa_fc_bias", False)
    if vocabulary != len(lm_head):
        raise InputError(f"{folder / 'config.json'}: vocab_size {vocabulary}, but the base model has {len(lm_head)}")
    if (config.get("truncated_vocab_size") or vocabulary) != vocabulary or "token_map" in tensors:
        raise InputError(f"'{folder}' has a truncated vocabulary, and vLLM 0.32 loads no such heads (token_map)")
    shared = config.get("original_lm_head", False)
    projection = tensors.take("lm_heads.0.weight", vocabulary, width) if shared else lm_head
    logits = []
    for k in range(config["num_heads"]):
        x = hidden
        for layer in range(config["num_hidden_layers"]):
            weight = tensors.take(f"blocks.{k}.layers.{layer}.weight", width, width)
            bias = tensors.take(f"blocks.{k}.layers.{layer}.bias", width) if biased else None
            x = x + F.silu(F.linear(x, weight, bias))
        logits.append(F.linear(x, projection if shared else tensors.take(f"lm_heads.{k}.weight", vocabulary, width)))
    tensors.finish()
    return torch.stack(logits)


READERS = {"tgi": read_tgi, "vllm": read_vllm}


@torch.no_grad()
def check(folder: str | Path, to: str, heads, model, prompt: torch.Tensor) -> str:
    """Read an export back as its reader does and compare with ours; returns a sentence about what was found.

    For ``transformers`` the folder is loaded with plain transformers and must decode ``prompt`` ``[1, T]`` to the text
    of plain greedy decoding (in half precision up to a near-tie); for the others logits on real hidden states, computed
    in fp32, must agree with our heads'.

    Raises:
        InputError: anything missing, left over, of another shape, or different.
    """
    folder = Path(folder)
    if to == "transformers":
        return _check_transformers(folder, model, prompt)
    lm_head = model.get_output_embeddings().weight.float()
    hidden = model.base_model(input_ids=prompt, use_cache=False).last_hidden_state[0].float()
    theirs = READERS[to](folder, lm_head, hidden)
    ours = _in_float32(heads, hidden)
    if theirs.shape != ours.shape:
        raise InputError(f"'{folder}' gives logits of the shape {list(theirs.shape)}, ours are {list(ours.shape)}")
    gap = (theirs - ours).abs().max().item()
    if not gap <= 1e-4 * max(1.0, ours.abs().max().item()):
        raise InputError(f"'{folder}' gives other logits than ours: they differ by {gap:.2g}")
    return f"read back as {to} does: {len(theirs)} heads, largest difference of logits {gap:.1g}"


def _in_float32(heads, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of our heads with all arithmetic in fp32, whatever dtype they are in."""
    logits = []
    for k in range(heads.num_heads):
        x = hidden
        for layer in range(heads.num_layers):
            x = x + F.silu(F.linear(x, heads.weight[k, layer].float(), heads.bias[k, layer].float()))
        projection = heads.lm_head.weight if heads.projection is None else heads.projection[k]
        logits.append(F.linear(x, projection.float()))
    return torch.stack(logits)


def _check_transformers(folder: Path, model, prompt: torch.Tensor) -> str:
    arguments = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=48, do_sample=False)
    plain = model.generate(prompt, **arguments)
    heads = dict(custom_generate=str(folder), medusa_heads=str(folder), trust_remote_code=True)
    ours = model.generate(prompt, **heads, **arguments)
    gap = first_difference_gap(model, *(Generation(ids, prompt.shape[1]) for ids in (ours, plain)))
    if gap is not None and gap > near_tie(model.dtype):
        raise InputError(f"'{folder}' decodes another text than plain greedy decoding")
    same = "the text of plain greedy decoding" if gap is None else f"plain greedy decoding up to a near-tie ({gap:.2g})"
    return f"decoded with custom_generate: {ours.shape[1] - prompt.shape[1]} tokens, {same}"
