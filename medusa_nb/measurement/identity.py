"""Whether two decoders wrote the same text; where not, whether the difference is a rounding of equals."""

import torch

from medusa_nb.decoding import Generation
from medusa_nb.measurement.timing import Timing


@torch.inference_mode()
def first_difference_gap(model, one: Generation, other: Generation, tokenizer=None) -> float | None:
    """None if the texts are equal, else how far apart the model finds the two tokens where they part, in logits.

    Args:
        tokenizer: given where the texts were split into tokens a second time, perhaps otherwise than the model said
            them. Then a text's next token may be any that begins the rest of it, if the model goes on with the rest.
    """
    a, b = one.new_tokens, other.new_tokens
    if a == b:
        return None
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if at is None:  # one is the other's beginning: nothing to compare, never a tie
        return float("inf")
    prefix = one.sequences[:, : one.prompt_length + at]
    logits = model(prefix).logits[0, -1].float()
    gaps = []
    for tokens in (a, b):
        splits = [(logits.max() - logits[tokens[at]]).item()]
        rest = tokenizer.decode(tokens[at:]) if tokenizer else ""
        for token, gap in _beginnings(tokenizer, logits, rest).items():
            after = model(torch.cat([prefix, prefix.new_tensor([[token]])], dim=1)).logits[0, -1].float()
            follow = _beginnings(tokenizer, after, rest.removeprefix(tokenizer.decode([token])))
            splits.append(max(gap, min(follow.values(), default=float("inf"))))
        gaps.append(min(splits))
    return max(gaps)


def _beginnings(tokenizer, logits: torch.Tensor, text: str, likely: int = 64) -> dict[int, float]:
    """The likely tokens that a text can begin with, and how far their logits are below the best."""
    best = logits.topk(min(likely, len(logits)))
    pairs = zip(best.indices.tolist(), (logits.max() - best.values).tolist(), strict=True) if text else ()
    return {token: gap for token, gap in pairs if text.startswith(tokenizer.decode([token]))}


def near_tie(dtype: torch.dtype) -> float:
    """The logit gap below which a difference counts as rounding: four units in the last place of a logit of 16."""
    return 4 * 16 * torch.finfo(dtype).eps


def identity(model, timing: Timing, reference: Timing) -> dict:
    """How many texts equal the reference's, and the logit gap at each first difference.

    ``ties`` counts the differences whose gap is below ``tie``: two tokens that are equal up to rounding.
    """
    pairs = zip(timing.generations, reference.generations, strict=True)
    gaps = [first_difference_gap(model, one, other) for one, other in pairs]
    different = [round(gap, 4) for gap in gaps if gap is not None]
    tie = near_tie(model.dtype)
    ties = sum(gap <= tie for gap in different)
    return dict(prompts=len(gaps), identical=len(gaps) - len(different), ties=ties, gaps=different, tie=tie)


def compare_answers(model, tokenizer, mine: list[dict], theirs: dict[str, dict]) -> dict:
    """Whether answers to the same prompts are the same, token for token; where not, whether they part at a near-tie.

    Args:
        mine: answered conversations.
        theirs: others by id; those that are not there are not compared.
    """
    gaps, compared = [], [(row, theirs[row["id"]]) for row in mine if row["id"] in theirs]
    for pair in compared:
        texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in pair]
        ids = [torch.tensor([tokenizer(text).input_ids], device=model.device) for text in texts]
        one, other = (Generation(x, pair[0]["prompt_tokens"]) for x in ids)
        gaps.append(first_difference_gap(model, one, other, tokenizer))
    different = [gap for gap in gaps if gap is not None]
    ties = sum(gap <= 2 * near_tie(model.dtype) for gap in different)  # batches are rounded otherwise on both sides
    return dict(answers=len(compared), equal=len(compared) - len(different), near_ties=ties)
