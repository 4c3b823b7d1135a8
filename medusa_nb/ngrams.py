"""Drafting from the text itself: what followed the last few tokens where they occurred before.

Known as prompt lookup or n-gram speculation. It needs no model and is strong where text repeats itself.
"""

import torch


def ngram_tokens(
    text: torch.Tensor, ends: torch.Tensor, count: int, longest: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Continue each text as it went on after the longest (then the latest) earlier match of its ending.

    Args:
        text: ``[B, C]`` token ids; whatever comes after ``ends`` is ignored.
        ends: ``[B]``, the place of each text's last token.
        count: how many tokens to draft. A match near the end is continued periodically.
        longest: the most tokens of the ending that are compared.

    Returns:
        Draft tokens ``[B, count]`` and how many tokens matched ``[B]``, 0 where none did.
    """
    places = torch.arange(text.shape[1], device=text.device)
    matched = torch.zeros_like(text)
    still = torch.ones_like(text, dtype=torch.bool)
    for back in range(longest):
        wanted = text.gather(1, (ends - back).clamp(min=0).unsqueeze(1))  # [B, 1]
        still = still & (text.roll(back, 1) == wanted) & (places >= back) & (ends.unsqueeze(1) >= back)
        matched = matched + still
    matched = matched.masked_fill(places >= ends.unsqueeze(1), 0)
    found = (matched * text.shape[1] + places).argmax(1, keepdim=True)  # longest first, then latest
    period = (ends.unsqueeze(1) - found).clamp(min=1)
    steps = torch.arange(count, device=text.device) % period
    copied = text.gather(1, (found + 1 + steps).clamp(max=text.shape[1] - 1))
    return copied, matched.gather(1, found)[:, 0]


def ngram_worth(answers: list[list[int]], starts: list[int], count: int = 12, longest: int = 4) -> torch.Tensor:
    """How often copied tokens are right, by length of the match: ``[longest + 1, count]``.

    Entry ``[n, d]``: of the positions in ``answers`` (ids of prompt and answer, the answer from ``starts`` on)
    where n tokens matched, the share at which the first d + 1 copied tokens were all right. Row 0 is 0. One wrong
    try is added to every count, so that what was hardly ever seen is worth little.
    """
    right = torch.zeros(longest + 1, count)
    seen = torch.zeros(longest + 1)
    for ids, start in zip(answers, starts, strict=True):
        ends = torch.arange(max(1, start), len(ids) - 1)
        if not len(ends):
            continue
        text = torch.tensor(ids).expand(len(ends), -1)
        drafted, matched = ngram_tokens(text, ends, count, longest)
        places = ends.unsqueeze(1) + 1 + torch.arange(count)
        truth = text.gather(1, places.clamp(max=len(ids) - 1)).masked_fill(places >= len(ids), -1)
        run = (drafted == truth).int().cumprod(1).float()
        right.index_add_(0, matched, run)
        seen.index_add_(0, matched, torch.ones(len(ends)))
    worth = right / (seen + 1).unsqueeze(1)
    worth[0] = 0
    return worth
