"""The plain way to train heads, kept only to be measured against.

It is what a first version does: run the frozen model again in every epoch, pad every conversation to the
full length, and put a loss on every position, the user's words included.
"""

import time

import torch

from medusa_nb.features import IGNORED, encode_conversation
from medusa_nb.heads import MedusaHeads
from medusa_nb.training import head_losses, in_float32


def train_plainly(
    model,
    tokenizer,
    heads: MedusaHeads,
    conversations: list[dict],
    epochs: int,
    batch_size: int = 4,
    learning_rate: float = 1e-3,
    depth_decay: float = 0.8,
    max_length: int = 1024,
) -> float:
    """Train ``heads`` in place on whole conversations, padded to ``max_length`` tokens; returns seconds."""
    rows = [encode_conversation(tokenizer, c["messages"], max_length).ids for c in conversations]
    device, count = heads.weight.device, heads.num_heads
    ids = torch.zeros(len(rows), max_length, dtype=torch.long, device=device)
    labels = torch.full((len(rows), max_length + count + 1), IGNORED, device=device)
    for line, row in enumerate(rows):
        ids[line, : len(row)] = labels[line, : len(row)] = torch.tensor(row, device=device)
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=heads.weight.dtype == torch.bfloat16)
    started = time.perf_counter()
    with in_float32(heads):
        optimizer = torch.optim.AdamW(heads.parameters(), lr=learning_rate, weight_decay=0.0)
        steps = epochs * -(-len(rows) // batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for epoch in range(epochs):
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch))
            for batch in order.split(batch_size):
                with torch.no_grad():
                    hidden = model.base_model(input_ids=ids[batch], use_cache=False).last_hidden_state.float()
                windows = labels[batch].unfold(1, count, 1)  # [B, T, K]: K labels from each place on
                with bf16:
                    logits = heads(hidden, path=windows[:, 1 : max_length + 1].clamp(min=0))  # [K, B, T, V]
                losses, _ = head_losses(logits.flatten(1, 2), windows[:, 2 : max_length + 2].flatten(0, 1))
                decay = depth_decay ** torch.arange(len(losses), device=device)
                (losses * decay).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    return time.perf_counter() - started
