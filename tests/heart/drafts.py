"""Random heads, prompts, and what transformers' own loop says to them."""

import torch

from medusa_nb.heads import Heads, MedusaHeads
from medusa_nb.path_heads import PathHeads

FEW = torch.arange(40)  # a draft vocabulary


def random_heads(model, K: int, seed: int = 0, kind: type = MedusaHeads, **options) -> Heads:
    heads = kind(model, K, **options)
    torch.manual_seed(seed)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return heads.requires_grad_(False)


def path_heads(model, K: int, seed: int = 0, **options) -> Heads:
    return random_heads(model, K, seed, PathHeads, **options)


def prompt(length: int, seed: int = 0, vocabulary: int = 50) -> torch.Tensor:
    return torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed))


def own_text(model, ids: torch.Tensor, new: int, ends: int | list[int] | None = None, **options) -> list[int]:
    """The new tokens that ``model.generate`` finds greedily; by default nothing but ``new`` ends them."""
    batch = ids.unsqueeze(0)
    stated, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    options = dict(max_new_tokens=new, do_sample=False, eos_token_id=ends, pad_token_id=0) | options
    try:
        return model.generate(batch, attention_mask=torch.ones_like(batch), **options)[0, len(ids) :].tolist()
    finally:
        model.generation_config.eos_token_id = stated
