"""Heads whose weights are random, so that they draft different tokens."""

import torch


def randomised(heads, seed: int = 0, std: float = 0.3):
    """These heads, frozen, with random weights."""
    torch.manual_seed(seed)
    for tensor in heads.parameters():
        torch.nn.init.normal_(tensor, std=std)
    return heads.requires_grad_(False).eval()
