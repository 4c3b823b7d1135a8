"""Fast parts for a model: linear layers packed once for oneDNN (in a copy, on a CPU), attention without copies."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from medusa_nb.private import attention_of, pack_weight, packed_product

ATTENTION = "medusa_sdpa"
PACKED_FOR = 16  # rows that weights are packed for; they serve any number


def register() -> None:
    """Make the packed product an operator that the compiler does not look into, and attention known by its name."""
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    if hasattr(torch.ops.medusa_nb, "packed_linear"):  # an export's copy of this module may have done so
        return
    torch.library.define("medusa_nb::packed_linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
    torch.library.impl("medusa_nb::packed_linear", ("CPU", "MkldnnCPU"))(packed_product)
    torch.library.register_fake("medusa_nb::packed_linear")(
        lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0])
    )


class PackedLinear(nn.Module):
    """Linear layers that read the same input, as one product with a weight that is packed once."""

    def __init__(self, linears: list[nn.Linear]):
        super().__init__()
        weight = torch.cat([linear.weight.detach() for linear in linears])
        self.register_buffer("weight", pack_weight(weight, PACKED_FOR))
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        self.register_buffer("bias", torch.cat(biases) if biases else None)
        self.result: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.medusa_nb.packed_linear(x, self.weight, self.bias)


class Part(nn.Module):
    """Stands in for one of the layers that a :class:`PackedLinear` joins: the first one called computes for all."""

    def __init__(self, joint: PackedLinear, columns: slice, first: bool, last: bool):
        super().__init__()
        self.joint, self.columns, self.first, self.last = joint, columns, first, last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.first:
            self.joint.result = self.joint(x)
        result = self.joint.result[..., self.columns]
        if self.last:
            self.joint.result = None
        return result


def pack(model) -> None:
    """Pack every ``nn.Linear`` of a model; those called one after the other on one input are joined."""
    register()
    calls: list[tuple[nn.Linear, int]] = []
    parents = {child: (m, name) for m in model.modules() for name, child in m.named_children()}
    linears = [module for module in parents if type(module) is nn.Linear]
    hooks = [m.register_forward_pre_hook(lambda m, args: calls.append((m, id(args[0])))) for m in linears]
    inputs = model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    groups: list[list[nn.Linear]] = []
    for (module, seen), (_, before) in zip(calls, [(None, None), *calls], strict=False):
        alike = groups and parents[module][0] is parents[groups[-1][0]][0] and seen == before
        if alike and (module.bias is None) == (groups[-1][0].bias is None):
            groups[-1].append(module)
        else:
            groups.append([module])
    del inputs
    for group in groups:
        joint, start = PackedLinear(group), 0
        for i, linear in enumerate(group):
            columns = slice(start, start + linear.out_features)
            part = Part(joint, columns, i == 0, i == len(group) - 1) if len(group) > 1 else joint
            setattr(*parents[linear], part)
            start += linear.out_features


def group_attention(model) -> None:
    """Let a model that uses torch's attention use :func:`attention` from now on."""
    register()
    if attention_of(model.config.get_text_config()) == "sdpa":
        model.set_attn_implementation(ATTENTION)


def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """torch's attention, with a mask, without copies of keys and values that several query heads share.

    transformers' own copies them once per group as soon as there is a mask. Here the heads of a group stand below
    each other, like further rows of one head, so keys are read once for all of them.
    """
    if attention_mask is None or attention_mask.shape[1] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    batch, heads, rows, width = query.shape
    groups = heads // key.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(batch, -1, groups * rows, width),
        key,
        value,
        attn_mask=attention_mask.repeat(1, 1, groups, 1),
        scale=scaling,
    )
    return out.reshape(batch, heads, rows, -1).transpose(1, 2).contiguous(), None
