"""Feedback on a learner's answers: each check passes, or names the likely mistake."""

from collections.abc import Callable

import torch

from medusa_nb.tree import Tree, tree_from_paths


class NotYet(AssertionError):
    """The answer is not right yet; the message names the likely mistake."""


def _passed() -> None:
    print("✓ right")


def _given(answer) -> None:
    if answer is ...:
        raise NotYet("your turn: put your answer in place of the three dots and run the cell again")


def break_even(answer: float, t1: float, tn: float) -> None:
    """01: how many tokens a pass over n tokens must emit to pay for itself."""
    _given(answer)
    if abs(answer - tn / t1) < 1e-6:
        return _passed()
    if abs(answer - t1 / tn) < 1e-6:
        raise NotYet("that is the inverse: a slower pass must emit more than one token, so divide t(n) by t(1)")
    raise NotYet("a pass over n tokens costs t(n); plain decoding would emit t(n) / t(1) tokens in that time")


def slack_end(answer: Callable[[dict[int, float]], int]) -> None:
    """01: the first width from which doubling the tokens costs at least 1.8 times as much."""
    latency = {1: 2.0, 2: 2.1, 4: 2.4, 8: 2.9, 16: 4.2, 32: 8.1, 64: 16.3}
    got = answer(latency)
    if got == 32:
        raise NotYet("off by one: compare t(2n) with t(n) and answer n, the width *before* the dear doubling")
    if isinstance(got, float):
        raise NotYet("that is a ratio or a time; asked for is the width n")
    if got == 1:
        raise NotYet("the first widths are the cheap ones: look for the first ratio of 1.8 or more, not below it")
    if got != 16:
        raise NotYet("go through n from small to large; answer the first n with t(2n) / t(n) of 1.8 or more")
    _passed()


def share_at_limit(answer: Callable[[list[dict]], float]) -> None:
    """02: the share of answers that were cut off by the limit."""
    rows = [dict(finish_reason=reason, completion_tokens=n) for reason, n in (("stop", 9), ("length", 50), ("stop", 7))]
    rows.append(dict(finish_reason="stop", completion_tokens=50))
    got = answer(rows)
    if abs(got - 3 / 4) < 1e-9:
        raise NotYet("those ended by themselves; `length` marks an answer that hit the limit")
    if abs(got - 2 / 4) < 1e-9:
        raise NotYet("an answer as long as the limit may just have ended there: go by finish_reason, not by length")
    if abs(got - 50 / 116) < 1e-9:
        raise NotYet("that is a share of tokens; count answers")
    if got == 1:
        raise NotYet("that is a number of answers; a share is divided by how many there are")
    if abs(got - 1 / 4) > 1e-9:
        raise NotYet("divide the answers whose finish_reason is `length` by all answers")
    _passed()


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


def conversation_labels(answer: Callable) -> None:
    """03: positions and labels of a whole conversation, as :func:`medusa_nb.features.head_labels` gives them."""
    ids = [10, 11, 12, 13, 14, 15, 16]
    own = [False, False, True, True, False, False, True]  # two turns of the model: 12 13, and 16
    positions, labels = answer(ids, own, 2)
    positions, labels = list(positions), [list(row) for row in labels]
    if positions == [2, 3, 6]:
        raise NotYet(
            "off by one: position t is used if token t+1 is the model's own, because that is what is said there"
        )
    if len(positions) > 3:
        raise NotYet(
            "the user's words are supervised, too: a position counts only if the token at t+1 is the model's own"
        )
    if positions != [1, 2, 5]:
        raise NotYet(
            "used are the positions t whose next token, t+1, is the model's own; nothing stands behind the last"
        )
    if labels[0][0] == 13:
        raise NotYet("off by one: the first column is the base model's own token at t+1, head 0's follows")
    if labels[0][:3] == [12, 13, 14] or labels[1][1:2] == [14]:
        raise NotYet("a label runs into the next turn: stop at the first token that is not the model's own")
    if any(len(row) != 3 for row in labels):
        raise NotYet("every row has a column for the base model and one for each head; fill up with -100")
    if labels != [[12, 13, -100], [13, -100, -100], [16, -100, -100]]:
        raise NotYet("the row of t holds the tokens at t+1, t+2, ... of the same turn, then -100")
    _passed()


def head_confidence(answer: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> None:
    """03: each head's best token and its probability, from logits ``[K, V]``."""
    logits = torch.tensor([[1.0, 3.0, 0.0, 2.0], [4.0, 0.0, 1.0, 2.0], [0.0, 0.0, 2.5, 0.0]])
    tokens, chance = answer(logits)
    if tuple(tokens.shape) != (3,) or tuple(chance.shape) != (3,):
        raise NotYet(
            f"one token and one probability per head: shapes [3] and [3], not {[*tokens.shape]}, {[*chance.shape]}"
        )
    best, right = logits.softmax(-1).max(-1).indices, logits.softmax(-1).max(-1).values
    if torch.allclose(chance, logits.softmax(0).gather(1, best[:, None])[:, 0]) or torch.allclose(
        chance, logits.softmax(0).max(-1).values
    ):
        raise NotYet("softmax over the wrong axis: probabilities must sum to 1 over the vocabulary, not over the heads")
    if torch.allclose(chance, logits.max(-1).values):
        raise NotYet("those are logits; a softmax turns them into probabilities")
    if not torch.equal(tokens, best):
        raise NotYet("each head's best token is the argmax over the vocabulary, the last axis")
    if not torch.allclose(chance, right):
        raise NotYet("take the softmax over the last axis, and of it the value at the best token")
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


def acceptance_walk(answer: Callable[[Tree, list[int], list[int]], list[int]]) -> None:
    """04: the accepted nodes of a tree, from its tokens and what the base model says after each node."""
    tree = tree_from_paths([(0,), (1,), (0, 0), (1, 0), (1, 0, 0)])
    tokens = [5, 6, 7, 8, 9, 4]
    got = list(answer(tree, tokens, [7, 0, 9, 0, 3, 0]))
    if got and got[0] != 0:
        raise NotYet("the root is certain: the path starts with node 0")
    if got == [0, 2]:
        raise NotYet("accepted length off by one: the last right guess, token 9, is missing")
    if got == [0, 2, 4, 5]:
        raise NotYet("accepted length off by one: token 4 is kept, but the base model said 3 there")
    if got != [0, 2, 4]:
        raise NotYet("from the node you stand on, go to the child whose token is what the base model says *there*")
    if list(answer(tree, tokens, [0, 8, 9, 0, 4, 0])) != [0]:
        raise NotYet("a right guess behind a wrong one is worthless: it was made for another text")
    if list(answer(tree, tokens, [7, 0, 9, 0, 4, 0])) != [0, 2, 4, 5]:
        raise NotYet("all guesses of a path may be right: walk on until a node has no fitting child")
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
