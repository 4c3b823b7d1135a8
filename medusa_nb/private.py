"""Every private name of other packages that this one relies on, what for, and what happens without it.

A test asks for each of them and names the one that has moved. Nothing else in the package uses such a name.
"""

import torch


def pack_weight(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """A weight ``[out, in]`` laid out as oneDNN reads it fastest for about ``rows`` rows of input.

    ``torch.utils.mkldnn`` packs too, but its modules convert every input and output, and take no bf16 on some
    processors. Without this name, steps are not compiled.
    """
    return torch.ops.mkldnn._reorder_linear_weight.default(weight, rows)


def packed_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ weight.T + bias`` for a weight from :func:`pack_weight`. Without this name, steps are not compiled."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def write_count(tensor: torch.Tensor) -> int:
    """How often a tensor was written to, as autograd counts it. Without it a change of weights goes unnoticed."""
    return 0 if tensor.is_inference() else tensor._version


def attention_of(config) -> str:
    """The attention a transformers model uses; there is only a public way to set it."""
    return config._attn_implementation


def prepared_generation_config(model, given, options: dict):
    """Generation config and remaining arguments, as ``model.generate`` itself makes them of its arguments."""
    return model._prepare_generation_config(given, **options)


def generation_defaults(config) -> dict:
    """What transformers takes for options of a generation config that are not set."""
    return config._get_default_generation_params()
