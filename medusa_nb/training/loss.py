"""What heads are trained to do: predict what the base model said, and in part what else it thought likely.

The loss is the cross entropy of each head against the token it should have predicted, weighted by depth (Cai et al.,
arXiv 2401.10774, section 2.2.1), and in part against the base model's own probabilities there (soft labels, Hinton et
al., arXiv 1503.02531).
"""

import torch
from torch import nn

from medusa_nb.errors import InputError
from medusa_nb.heads import Heads
from medusa_nb.training.features import IGNORED, Features

RANKS = 64  # how many of a head's best tokens are told apart
NEVER = 2**30  # the rank of all others


class HeadsWithLoss(nn.Module):
    """Heads as ``transformers.Trainer`` wants them: ``forward`` returns a loss.

    Args:
        depth_decay: the weight of head k in the loss is this to the power k.
        soft_share: the part of the loss on the base model's probabilities; 0 is plain Medusa.
        dtype: products are computed in this dtype, as the base model's are; weights and losses stay in fp32.
    """

    def __init__(self, heads: Heads, depth_decay: float, soft_share: float, dtype: torch.dtype):
        super().__init__()
        self.heads, self.depth_decay, self.soft_share, self.dtype = heads, depth_decay, soft_share, dtype

    def forward(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        likely: torch.Tensor | None = None,
        probabilities: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """``hidden [B, D]``, ``labels [B, K + 1]`` (column 0 is the base model's own next token), and for each head
        what :func:`~medusa_nb.training.features.soft_labels` found likely, ``[B, K, M]``."""
        count = self.heads.num_heads
        labels = labels[:, : count + 1]
        with torch.autocast(hidden.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.heads(hidden.float(), labels[:, :-1].clamp(min=0))  # [K, B, V']
        soft = None
        if self.soft_share and likely is not None and probabilities is not None:
            places = self.heads.places(likely[:, :count])
            weights = self.soft_share * probabilities[:, :count].float().masked_fill(places < 0, 0)
            soft = places.clamp(min=0), weights
        places = self.heads.places(labels[:, 1:])
        losses = head_losses(logits, places.masked_fill(places < 0, IGNORED), soft)
        decay = self.depth_decay ** torch.arange(count, device=losses.device)
        return dict(loss=(losses * decay).sum(), head_loss=losses.detach(), logits=logits.detach(), places=places)


def head_losses(
    logits: torch.Tensor, labels: torch.Tensor, soft: tuple[torch.Tensor, torch.Tensor] | None = None
) -> torch.Tensor:
    """Mean cross entropy of each head over its supervised positions: ``[K]``, 0 for a head without a label.

    Args:
        logits: ``[K, B, V']``.
        labels: ``[B, K]``, places among the V' logits; :data:`IGNORED` where there is nothing to predict.
        soft: places and weights ``[B, K, M]`` of further tokens to predict; the label has the rest of the weight 1.

    Raises:
        InputError: no head has any label, or the loss is not finite.
    """
    used = (labels != IGNORED).sum(0)
    divisor = mean_over_processes(used)
    if not divisor.any():
        raise InputError("every label of this batch is ignored; the conversations have no answers long enough")
    logits = logits.float()
    gold = labels.clamp(min=0).T.unsqueeze(-1)  # [K, B, 1]
    score = logits.gather(-1, gold)[..., 0]
    if soft is not None:
        ids, weights = (x.transpose(0, 1) for x in soft)  # [K, B, M]
        score = (1 - weights.sum(-1)) * score + (weights * logits.gather(-1, ids)).sum(-1)
    losses = (logits.logsumexp(-1) - score).masked_fill(labels.T == IGNORED, 0.0)
    losses = losses.sum(1) / divisor.clamp(min=1 / world_size())
    if not torch.isfinite(losses).all():
        raise InputError("the loss is not finite; try a lower learning rate, or check the base model's states")
    return losses


def mean_over_processes(used: torch.Tensor) -> torch.Tensor:
    """Labels per process on average: what a sum is divided by, so that averaging over processes gives the mean."""
    if world_size() == 1:
        return used
    total = used.clone()
    torch.distributed.all_reduce(total)
    return total / world_size()


def world_size() -> int:
    """How many processes train together."""
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if started else 1


def label_ranks(logits: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Rank of each true token among a head's best :data:`RANKS`: ``[K, B, V']``, ``[B, K]`` -> ``[B, K]``.

    ``places`` says where the true tokens' logits stand, see :meth:`Heads.places`. 0 is the head's best token; -1
    where there is no label; :data:`NEVER` for a token that is not among its best, or that it never drafts.

    Raises:
        InputError: a logit is NaN: no rank among NaNs means anything.
    """
    best = logits.float().topk(min(RANKS, logits.shape[-1]), dim=-1)
    if torch.isnan(best.values).any():  # topk puts NaN first
        raise InputError("the heads' logits are not finite; train them again, or load the base model in another dtype")
    found = best.indices == places.T.unsqueeze(-1)  # [K, B, RANKS]
    ranks = torch.where(found.any(-1), found.int().argmax(-1), NEVER).T
    return torch.where(places == IGNORED, -1, ranks)


@torch.inference_mode()
def rank_table(heads: Heads, features: Features, batch: int = 512) -> torch.Tensor:
    """``[P, K]``: the rank every head gives the true token at every position, -1 without a label."""
    table = []
    for start in range(0, len(features), batch):
        rows = features.hidden[start : start + batch].to(heads.device, heads.dtype)
        labels = features.labels[start : start + batch, : heads.num_heads + 1].to(heads.device)
        logits = heads(rows, labels[:, :-1].clamp(min=0))
        table.append(label_ranks(logits, heads.places(labels[:, 1:])).cpu())
    return torch.cat(table)


def accuracy(ranks: torch.Tensor, top: tuple[int, ...] = (1, 5)) -> list[dict]:
    """Per head: the share of its labels that are among its ``top`` choices, from :func:`rank_table`.

    None for a head without any label.
    """
    result = []
    for column in ranks.T:
        known = column[column >= 0]
        shares = {f"top{n}": (known < n).float().mean().item() if len(known) else None for n in top}
        result.append(shares | {"labels": len(known)})
    return result
