"""The frozen base model and its tokenizer, on the device and in the dtype that suit this machine."""

import copy
import hashlib
from collections.abc import Callable

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_outputs import BaseModelOutputWithPast

from medusa_nb.errors import InputError
from medusa_nb.packaged_model import packaged_model
from medusa_nb.packing import group_attention
from medusa_nb.private import write_count
from medusa_nb.progress import is_headless

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_base_model(name_or_path=None, device=None, dtype=None, trust_remote_code=False, **loading):
    """Load a decoder-only language model with its tokenizer, frozen and in evaluation mode.

    Args:
        name_or_path: folder or hub id; by default SmolLM2-135M-Instruct, see :mod:`medusa_nb.packaged_model`.
        device: ``"cpu"``, ``"cuda"``, ...; the first accelerator by default, else the CPU.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` or a ``torch.dtype``; by default
            :func:`suitable_dtype`.
        trust_remote_code: run code from the model's repository. Off unless you say so.
        loading: further arguments of ``from_pretrained``, such as ``quantization_config``.

    Returns:
        ``(model, tokenizer)``; no parameter of the model requires a gradient.

    Raises:
        InputError: the model is missing or incomplete, has no safetensors, or is no decoder with attention only.
    """
    source = str(name_or_path or packaged_model())
    if is_headless():
        transformers.utils.logging.disable_progress_bar()
    device = torch.device(device or suitable_device())
    dtype = suitable_dtype(device) if dtype is None else as_dtype(dtype)
    trust = dict(trust_remote_code=trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(source, **trust)
        if getattr(config, "is_encoder_decoder", False):
            raise InputError(f"'{source}' is an encoder-decoder model; Medusa heads need a decoder-only one")
        tokenizer = AutoTokenizer.from_pretrained(source, **trust)
        model = _load_weights(source, config, dict(dtype=dtype, use_safetensors=True) | trust | loading)
    except InputError:
        raise
    except Exception as error:  # files, missing packages, code of the model's own: all are the model's fault
        first_line = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise InputError(f"cannot load a base model from '{source}': {first_line}") from error
    rows, known = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values(), default=-1) + 1
    if known > rows:
        raise InputError(
            f"the tokenizer of '{source}' knows {known} tokens and the model only {rows}; "
            "load the tokenizer it was trained with, or resize its embeddings and train them"
        )
    if "device_map" not in loading:
        model = model.to(device)
    group_attention(model)
    return model.eval().requires_grad_(False), tokenizer


def _load_weights(source: str, config, arguments: dict) -> nn.Module:
    """The model with torch's own attention, or its own where it does not support that; every weight must be there."""

    def load(attention: str):
        return AutoModelForCausalLM.from_pretrained(
            source, config=config, attn_implementation=attention, output_loading_info=True, **arguments
        )

    try:
        model, found = load("sdpa")
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        model, found = load("eager")
    for what, names in (("lacks", found["missing_keys"]), ("has the wrong shape for", found["mismatched_keys"])):
        if names:
            listed = ", ".join(sorted(name if isinstance(name, str) else name[0] for name in names)[:3])
            raise InputError(f"the file of weights in '{source}' {what} {listed}; download or save the model again")
    return model


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A ``torch.dtype`` from its name."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype '{dtype}'; choose one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def dtype_name(dtype: torch.dtype) -> str:
    """``"bfloat16"`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def suitable_device() -> torch.device:
    """The first accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def suitable_dtype(device: torch.device | str) -> torch.dtype:
    """bf16 where the hardware multiplies it, else fp16 on an accelerator and fp32 on a CPU.

    A rule, not a timing: one machine gets the same answer every time. Emulated bf16 does not count; on a T4 it is
    several times slower than fp16.
    """
    if torch.device(device).type == "cpu":
        return torch.bfloat16 if has_native_bf16() else torch.float32
    native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def has_native_bf16() -> bool:
    """True if this CPU multiplies bf16 numbers in hardware."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def context_length(model) -> int | None:
    """The largest number of positions the model accepts, or None if it states none."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    return None


def eos_token_ids(model, tokenizer) -> list[int]:
    """Every token id that ends an answer, from the generation config and the tokenizer."""
    return sorted(as_ids(model.generation_config.eos_token_id) | as_ids(tokenizer.eos_token_id))


def as_ids(value) -> set[int]:
    """Token ids given as None, a number, a tensor, a set or several numbers."""
    if value is None or isinstance(value, set):
        return value or set()
    return set(torch.as_tensor(value).flatten().tolist())


class _HandThrough(nn.Module):
    """Stands in for a backbone: returns the states it is given."""

    def forward(self, *_, inputs_embeds=None, **__):
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)


def logits_of(model) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model's own way from last hidden states ``[B, T, D]`` to logits ``[B, T, V]``.

    Most models apply lm_head; some scale or cap what comes out of it. So the model's own ``forward`` runs, around a
    stand-in for the backbone that hands the states through. That this gives ``model(ids).logits`` is checked by
    :func:`medusa_nb.verification.check_model`.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    shell = copy.deepcopy(model, shared | {id(model.base_model): _HandThrough()})
    return lambda hidden: shell(inputs_embeds=hidden, use_cache=False).logits


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names and bytes of all parameters and buffers: changes if any byte does."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def base_fingerprint(model) -> str:
    """SHA-256 over architecture, sizes and lm_head (in bf16, so that it does not depend on the dtype loaded in)."""
    config = model.config.get_text_config()
    weight = model.get_output_embeddings().weight.detach().to("cpu", torch.bfloat16).contiguous()
    digest = hashlib.sha256(f"{config.model_type} {config.num_hidden_layers} {list(weight.shape)}".encode())
    digest.update(weight.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def weights_state(model) -> list[tuple[int, int]]:
    """Where each weight lies and how often it was written to: another one if the weights change."""
    return [(p.data_ptr(), write_count(p)) for p in model.parameters()]
