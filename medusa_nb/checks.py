"""Feedback on a learner's answers: each check passes, or names the likely mistake."""

from collections.abc import Callable

import torch

from medusa_nb.tree import Tree, tree_from_paths


class NotYet(AssertionError):
    """The answer is not right yet; the message names the likely mistake."""


def _passed() -> None:
    print("✓ right")


def break_even(answer: float, t1: float, tn: float) -> None:
    """01: how many tokens a pass over n tokens must emit to pay for itself."""
    if abs(answer - tn / t1) < 1e-6:
        return _passed()
    if abs(answer - t1 / tn) < 1e-6:
        raise NotYet("that is the inverse: a slower pass must emit more than one token, so divide t(n) by t(1)")
    raise NotYet("a pass over n tokens costs t(n); plain decoding would emit t(n) / t(1) tokens in that time")


def loop_detector(answer: Callable[[list[int]], bool]) -> None:
    """02: tell whether a list of tokens ends in the same block three times in a row."""
    if not answer([9, 1, 2, 1, 2, 1, 2]):
        raise NotYet("the block may be longer than one token: 9 1 2 1 2 1 2 ends in '1 2' three times")
    if answer([1, 2, 3, 4, 5, 6, 7, 8]):
        raise NotYet("a text without repetition is reported as a loop")
    if answer([1, 2, 1, 2, 3, 4, 5]):
        raise NotYet("only the end of the text counts here, and three repetitions are asked for")
    if not answer([4, 4, 4]):
        raise NotYet("one token three times in a row is a block of length one")
    _passed()


def head_label(answer: Callable[[list[int], int, int], int]) -> None:
    """03: the token that head k should guess at position t."""
    ids = [10, 11, 12, 13, 14, 15]
    got = answer(ids, 1, 0)
    if got == 12:
        raise NotYet("off by one: the token at t+1 is the base model's own prediction, head 0 looks one further")
    if got == 11:
        raise NotYet("that is the token at position t itself, which the model has already read")
    if got != 13 or answer(ids, 0, 3) != 15:
        raise NotYet("head k at position t guesses the token at t + k + 2")
    _passed()


def residual_block(answer: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """03: ``x + SiLU(W x + b)``."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((5, 4), (4, 4), (4,)))
    inner = torch.nn.functional.linear(x, weight, bias)
    got = answer(x, weight, bias)
    if torch.allclose(got, torch.nn.functional.silu(inner), atol=1e-5):
        raise NotYet("the residual is missing: add x, or an untrained head cannot start as the base model's prediction")
    if torch.allclose(got, x + torch.nn.functional.silu(x @ weight + bias), atol=1e-5):
        raise NotYet("the weight is transposed: a linear layer computes x @ W.T + b")
    if not torch.allclose(got, x + torch.nn.functional.silu(inner), atol=1e-5):
        raise NotYet("the block is x + SiLU(x @ W.T + b)")
    _passed()


def tree_mask(answer: Callable[[Tree], torch.Tensor]) -> None:
    """04: row i may look at column j if j is i or an ancestor of i."""
    tree = tree_from_paths([(0,), (1,), (0, 0), (0, 1), (0, 0, 0)])
    got = answer(tree).bool()
    if torch.equal(got, tree.mask()):
        return _passed()
    if torch.equal(got, tree.mask().T):
        raise NotYet("the mask is transposed: rows look, columns are looked at")
    if torch.equal(got, torch.ones_like(got).tril()):
        raise NotYet("that is the plain causal mask: siblings would see each other")
    if not got.diagonal().all():
        raise NotYet("every node must also see itself")
    raise NotYet("walk up from each node to the root and allow exactly what you meet")


def accepted_length(answer: Callable[[list[int], list[int]], int]) -> None:
    """04: how many guesses of a list are kept, given what the base model said before each."""
    if answer([5, 6, 7], [5, 6, 9]) != 2:
        raise NotYet("count guesses up to the first wrong one, and not the wrong one itself")
    if answer([5, 6, 7], [4, 6, 7]) != 0:
        raise NotYet("a right guess behind a wrong one is worthless: it was made for another text")
    if answer([5, 6, 7], [5, 6, 7]) != 3:
        raise NotYet("all guesses may be right")
    _passed()


def mean_tokens_per_pass(answer: Callable[[list[list[int]]], float]) -> None:
    """04: tokens per pass over several texts."""
    texts = [[1, 1, 1, 1], [4]]
    got = answer(texts)
    if abs(got - 2.5) < 1e-9:
        raise NotYet("that is a mean of ratios: long texts must weigh more; sum tokens and passes first, then divide")
    if abs(got - 8 / 5) > 1e-9:
        raise NotYet("divide all tokens by all passes")
    _passed()


def achievable_speedup(answer: Callable[[float, float, float], float]) -> None:
    """05: the speedup that tokens per pass allow when a wide pass costs tn and a narrow one t1."""
    value = answer(3.0, 2.0, 4.0)
    if abs(value - 1.5) < 1e-6:
        return _passed()
    if abs(value - 3.0) < 1e-6:
        raise NotYet("tokens per pass is not a speedup: the wide pass also takes longer than the narrow one")
    if abs(value - 6.0) < 1e-6:
        raise NotYet("that is the inverse price: a wide pass that takes twice as long halves the gain")
    raise NotYet("plain decoding needs tokens * t1 for what one wide pass emits in tn")


def version_1_size(answer: Callable[[int, int, int], int]) -> None:
    """07: how many numbers K heads with one block and their own projections hold."""
    value = answer(3, 10, 100)
    if value == 3 * (100 + 10 + 1000):
        return _passed()
    if value == 3 * (100 + 1000):
        raise NotYet("each block also has a bias of D numbers")
    if value == 3 * (100 + 10) + 1000:
        raise NotYet("in version 1 the projection is not shared: every head has its own V * D numbers")
    if value == 3 * (100 + 10):
        raise NotYet("that is version 2, which shares lm_head; version 1 adds a projection to every head")
    raise NotYet("a head is D * D weights, D biases and V * D for its projection; there are K of them")


def states_size(answer: Callable[[int, int], float]) -> None:
    """06: gigabytes of cached bf16 hidden states."""
    value = answer(1_000_000, 4096)
    if abs(value - 8.192) < 1e-6:
        return _passed()
    if abs(value - 16.384) < 1e-6:
        raise NotYet("bf16 takes two bytes a number, not four")
    if abs(value - 4.096) < 1e-6:
        raise NotYet("that counts numbers; each of them takes two bytes in bf16")
    raise NotYet("every position keeps D numbers of two bytes; a gigabyte is 10**9 bytes here")
