"""The frozen base model and its tokenizer, on the device and in the dtype that suit this machine."""

import hashlib
import time
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from medusa_nb.errors import InputError
from medusa_nb.progress import is_headless

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = ROOT / "data" / "base_model"
CLEARLY = 1.5  # times as fast
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_base_model(name_or_path=None, device=None, dtype=None, trust_remote_code=False):
    """Load a decoder-only language model with its tokenizer, frozen and in evaluation mode.

    Args:
        name_or_path: folder or hub id; the model that ships in ``data/base_model`` by default.
        device: ``"cpu"``, ``"cuda"``, ...; the first accelerator by default, else the CPU.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` or a ``torch.dtype``; by default
            :func:`suitable_dtype`.
        trust_remote_code: run code from the model's repository. Off unless you say so.

    Returns:
        ``(model, tokenizer)``; no parameter of the model requires a gradient.

    Raises:
        InputError: the model is missing, has no safetensors, is an encoder-decoder, or keeps a
            recurrent state, whose rejected guesses could not be taken back.
    """
    source = str(name_or_path or DEFAULT)
    if is_headless():
        transformers.utils.logging.disable_progress_bar()
    device = torch.device(device or suitable_device())
    dtype = as_dtype(dtype) if dtype is not None else None
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        refuse_unsuitable(config, source)
        dtype = dtype or suitable_dtype(device, config)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        first_line = str(error).strip().split("\n")[0]
        raise InputError(f"cannot load a base model from '{source}': {first_line}") from error
    refuse_unsuitable(config, source, type(model))
    return model.to(device).eval().requires_grad_(False), tokenizer


def refuse_unsuitable(config, source: str, model_class: type | None = None) -> None:
    """Raise :class:`InputError` for models that tree attention cannot verify guesses with."""
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"'{source}' is an encoder-decoder model; Medusa heads need a decoder-only one")
    if getattr(model_class, "_is_stateful", False):
        raise InputError(
            f"'{source}' keeps a recurrent state, from which rejected guesses cannot be removed; "
            "choose a model whose layers all use attention"
        )


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A ``torch.dtype`` from its name."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype '{dtype}'; choose one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def suitable_device() -> torch.device:
    """The first accelerator if there is one, else the CPU."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def has_native_bf16() -> bool:
    """True if this CPU multiplies bf16 numbers in hardware; without it bf16 is emulated and slow."""
    return any(
        getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


def suitable_dtype(device: torch.device | str, config=None) -> torch.dtype:
    """Half precision on an accelerator; on a CPU fp32, unless bf16 is native and clearly faster.

    On a CPU both are timed on what a verify pass does: 16 rows through linear layers of the model's
    size. bf16 halves the bytes to read, which decides for large models; but not every CPU that has it
    also computes faster in it, which decides for small ones. Where they are close it is always fp32, so that
    a model is not loaded in one dtype today and in another tomorrow.
    """
    if torch.device(device).type != "cpu":
        return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float16
    if not has_native_bf16():
        return torch.float32
    hidden = getattr(config and config.get_text_config(), "hidden_size", None) or 2048
    seconds = {dtype: _linear_seconds(dtype, hidden) for dtype in (torch.float32, torch.bfloat16)}
    return torch.bfloat16 if CLEARLY * seconds[torch.bfloat16] < seconds[torch.float32] else torch.float32


def _linear_seconds(dtype: torch.dtype, hidden: int, rows: int = 16, layers: int = 6, repeats: int = 9) -> float:
    """Median seconds of ``rows`` through ``layers`` different linear layers ``[3 hidden, hidden]``."""
    weights = [torch.randn(3 * hidden, hidden).to(dtype) for _ in range(layers)]
    inputs = torch.randn(rows, hidden).to(dtype)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        for weight in weights:
            torch.nn.functional.linear(inputs, weight)
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def context_length(model) -> int | None:
    """The largest number of positions the model accepts, or None if it states none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def attention_window(model) -> int | None:
    """How many positions back some of the model's layers look at most; None where all look at the whole text."""
    config = model.config.get_text_config()
    if set(getattr(config, "layer_types", None) or []) == {"full_attention"}:
        return None
    return getattr(config, "sliding_window", None)


def require_chat_template(tokenizer) -> None:
    """Raise :class:`InputError` if the tokenizer cannot lay out a conversation."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"the tokenizer of '{tokenizer.name_or_path}' has no chat template; set tokenizer.chat_template "
            "to the layout the model was trained with"
        )


def eos_token_ids(model, tokenizer) -> list[int]:
    """Every token id that ends an answer, from the generation config and the tokenizer."""
    stated = model.generation_config.eos_token_id
    ids = set(stated if isinstance(stated, list) else [stated])
    return sorted(i for i in ids | {tokenizer.eos_token_id} if i is not None)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names and bytes of all parameters and buffers: changes if any byte does."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
