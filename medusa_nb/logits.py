"""How a model turns states into logits: its own way, found once and compared with what the model itself says."""

import weakref
from collections.abc import Callable

import torch

from medusa_nb.base_model import dtype_name, logits_of
from medusa_nb.errors import InputError

_KNOWN: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model: how its logits are made


def logits_function(model) -> Callable[[torch.Tensor], torch.Tensor]:
    """How this model turns states ``[B, T, D]`` into logits; found, and compared with the model, once.

    Raises:
        InputError: no way gives what ``model(ids).logits`` gives.
    """
    if model not in _KNOWN:
        refuse_unsuitable(model)
        make = _working_logits(model)
        _KNOWN[model] = make, make(model)
    return _KNOWN[model][1]


def logits_maker(model) -> Callable:
    """The way that was found to work for this model: ``maker(model)`` is its logits function."""
    logits_function(model)
    return _KNOWN[model][0]


def refuse_unsuitable(model) -> None:
    """Raise :class:`InputError` for what is no decoder with a backbone and an output layer of its own."""
    name = name_of(model)
    if model.config.is_encoder_decoder:
        raise InputError(f"{name} is an encoder-decoder model; Medusa heads need a decoder-only one")
    if model.get_output_embeddings() is None or model.base_model is model:
        raise InputError(f"{name} has no backbone and output layer of its own that heads could stand between")


def name_of(model) -> str:
    """A model's name for messages: where it was loaded from, and its class."""
    source = model.config.name_or_path
    return f"'{source}' ({type(model).__name__})" if source else type(model).__name__


@torch.no_grad()
def _working_logits(model) -> Callable:
    ids = some_tokens(model, 6)[None]
    try:
        wanted = model(input_ids=ids, use_cache=False).logits
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    except Exception as error:  # whatever a model trips over here, it would trip over later
        raise InputError(f"{name_of(model)} does not read a plain text: {first_line(error)}") from error
    require_finite(model, wanted)
    for make in (logits_of, type(model).get_output_embeddings):
        try:
            if deviation(make(model)(hidden), wanted) <= tolerance(model.dtype):
                return make
        except Exception:  # a forward of its own kind; the next way may do
            continue
    raise InputError(
        f"{name_of(model)} turns its states into logits in a way that cannot be told from its parts; Medusa heads need "
        "a model whose forward is a backbone and an output layer"
    )


def require_same_logits(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Raise :class:`RuntimeError` if a compiled pass gives other logits than the eager one."""
    gap = deviation(found, wanted)
    if not gap <= 2 * tolerance(wanted.dtype):
        raise RuntimeError(f"compiled code gives other logits (they differ by {gap:.1%})")


def some_tokens(model, count: int) -> torch.Tensor:
    """The same arbitrary token ids every time: ``[count]``."""
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, size, (count,), generator=torch.Generator().manual_seed(0))
    return ids.to(model.get_output_embeddings().weight.device)


def deviation(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    known = torch.isfinite(wanted)  # some models never say some tokens
    return ((got - wanted)[known].abs().max() / wanted[known].abs().max().clamp(min=1e-9)).item()


def tolerance(dtype: torch.dtype) -> float:
    """The share by which logits may differ because sums are rounded in another order."""
    return {torch.float32: 1e-4, torch.float16: 0.01}.get(dtype, 0.05)


def require_finite(model, logits: torch.Tensor) -> None:
    if torch.isnan(logits).any() or not torch.isfinite(logits).any():
        raise InputError(f"the logits of {name_of(model)} are {not_finite(model.dtype)}")


def not_finite(dtype: torch.dtype) -> str:
    """Words for numbers that overflow, and what to do."""
    other = "use bfloat16 or float32" if dtype == torch.float16 else "the weights may be damaged; load them again"
    return f"not finite in {dtype_name(dtype)}; {other}"


def first_line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]
