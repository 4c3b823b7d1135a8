"""The exercises' checks: right answers pass, cheap wrong ones fail with what is wrong about them, None survives."""

import inspect
import statistics

import pytest
import torch
import torch.nn.functional as F

from medusa_nb.course import checks
from medusa_nb.course.checks import Exercise, NotYet

EXERCISES = {name: value for name, value in vars(checks).items() if isinstance(value, Exercise)}


def shifted(ids, by):
    return torch.cat([ids[by:], torch.full((by,), -100)])


def mask_of(parents, itself=True, all_ancestors=True):
    mask = torch.zeros(len(parents), len(parents), dtype=torch.bool)
    for node in range(len(parents)):
        mask[node, node] = itself
        above = parents[node]
        while above >= 0:
            mask[node, above] = True
            above = parents[above] if all_ancestors else -1
    return mask


def walk(parents, tokens, said):
    path = [0]
    while fitting := [i for i, p in enumerate(parents) if p == path[-1] and tokens[i] == said[path[-1]]]:
        path.append(fitting[0])
    return path


def loops(tokens, sizes, times=3):
    return any(tokens[-n:] * times == tokens[-n * times :] for n in sizes if n * times <= len(tokens))


WRONG = {
    "kept_tokens": [
        (lambda draft, said: sum(a == b for a, b in zip(draft, said, strict=True)), "after a wrong one does not count"),
        (lambda draft, said: len(draft), "up to the first difference"),
        (lambda draft, said: len(set(draft) & set(said)), "first that does not|does not count"),
        (lambda draft, said: 0, "up to the first that does not"),
        (lambda draft, said: [a == b for a, b in zip([*draft, 0], [*said, 1], strict=True)].index(False) + 1, "off by"),
    ],
    "break_even": [
        (lambda t1, tn: t1 / tn, "inverse"),
        (lambda t1, tn: tn - t1, "difference of times"),
        (lambda t1, tn: tn / t1 - 1, "extra tokens only"),
        (lambda t1, tn: tn // t1, "in the time of one wide pass"),
        (lambda t1, tn: 16, "in the time of one wide pass"),
    ],
    "loop_detector": [
        (lambda t: loops(t, range(1, 99), times=2), "three are asked for"),
        (lambda t: loops(t, [1]), "longer than one token"),
        (lambda t: loops(t, [1, 2]), "longer than two tokens"),
        (lambda t: loops(t, [1, 2, 3]), "every length up to a third"),
        (lambda t: loops(t, range(1, len(t) // 3)), "every length|range"),
        (lambda t: loops(t, range(1, (len(t) - 1) // 3 + 1)), "range"),
        (lambda t: len(set(t)) < len(t), "only the end counts"),
        (lambda t: True, "only the end counts"),
        (lambda t: False, "only|end"),
    ],
    "residual_block": [
        (lambda x, w, b: F.silu(x @ w.T + b), "residual is missing"),
        (lambda x, w, b: x + F.silu(x @ w + b), "transposed"),
        (lambda x, w, b: x + x @ w.T + b, "nonlinearity is missing"),
        (lambda x, w, b: x + F.silu(x @ w.T), "bias is missing"),
        (lambda x, w, b: x, "the block is"),
        (lambda x, w, b: x + F.relu(x @ w.T + b), "the block is"),
    ],
    "head_loss": [
        (lambda x, y: F.cross_entropy(x, y, ignore_index=-100, reduction="sum") / len(y), "not by all of them"),
        (lambda x, y: F.cross_entropy(x, y, ignore_index=-100, reduction="sum"), "that is the sum"),
        (lambda x, y: F.cross_entropy(x, y.clamp(min=0)), "nothing to predict"),
        (lambda x, y: -F.cross_entropy(x, y), "the minus is missing"),
        (lambda x, y: F.mse_loss(x.argmax(-1).float(), y.float()), "average -log p"),
        (lambda x, y: torch.tensor(0.0), "average -log p"),
    ],
    "shifted_labels": [
        (lambda ids, k: shifted(ids, k + 1), "still shifted by one"),
        (lambda ids, k: shifted(ids, k + 3), "one too far"),
        (lambda ids, k: ids.roll(-(k + 2)), "wraps around"),
        (lambda ids, k: shifted(ids, 2), "these are head 0's"),
        (lambda ids, k: ids[k + 2 :], "fill up"),
        (lambda ids, k: torch.full_like(ids, -100), "label t of head k"),
    ],
    "tree_mask": [
        (lambda parents: mask_of(parents).T, "transposed"),
        (lambda parents: torch.ones(len(parents), len(parents)).tril(), "siblings would see each other"),
        (lambda parents: mask_of(parents, itself=False), "see itself"),
        (lambda parents: mask_of(parents, all_ancestors=False), "not only the parent"),
        (lambda parents: torch.eye(len(parents)), "walk up"),
    ],
    "acceptance_walk": [
        (lambda *case: walk(*case)[1:], "root is certain"),
        (lambda *case: walk(*case)[:-1] or [0], "last accepted node is missing"),
        (lambda p, t, s: [i for i in range(9) if i == 0 or t[i] == s[p[i]]], "its parent was not accepted"),
        (lambda *case: walk(*case)[:2], "the path goes on"),
        (lambda *case: [0], "go to the child"),
        (lambda p, t, s: [i for i in range(9) if i == 0 or t[i] in s], "not accepted"),
    ],
    "cache_crop": [
        (lambda rows, n, path: rows[:, : n + len(path)], "need not be the first"),
        (lambda rows, n, path: rows[:, [n + i for i in path]], "text's own rows"),
        (lambda rows, n, path: rows[:, [*range(n), *path]], "places further"),
        (lambda rows, n, path: rows[:, :n], "accepted nodes' rows"),
        (lambda rows, n, path: rows, "keep rows 0 to length - 1"),
        (lambda rows, n, path: rows[:, [*range(4), *(4 + i for i in path)]], "keep rows|stopped"),
    ],
    "tokens_per_pass": [
        (lambda texts: statistics.mean(map(statistics.mean, texts)), "mean of ratios"),
        (lambda texts: sum(map(sum, texts)) / len(texts), "not by texts"),
        (lambda texts: sum(map(len, texts)) / sum(map(sum, texts)), "other way round"),
        (lambda texts: statistics.mean(texts[0]), "all tokens by all passes"),
    ],
    "tree_positions": [
        (lambda n, p: n + torch.arange(len(p)), "still by number"),
        (lambda n, p: mask_of(p).sum(1) - 1, "text counts, too"),
        (lambda n, p: n + mask_of(p).sum(1), "off by one"),
        (lambda n, p: n + torch.tensor(p), "the root's plus its depth"),
    ],
    "achievable": [
        (lambda tokens, t1, tn, d: tokens, "is not a speedup"),
        (lambda tokens, t1, tn, d: tokens / t1, "how long does plain decoding take"),
        (lambda tokens, t1, tn, d: tokens * t1 / tn, "drafting takes time"),
        (lambda tokens, t1, tn, d: tokens * (tn + d) / t1, "upside down"),
        (lambda tokens, t1, tn, d: tokens * t1 / tn + d, "plain decoding needs"),
    ],
}
CHEAP = [(name, number) for name, answers in WRONG.items() for number in range(len(answers))]


def test_every_exercise_has_at_least_three_wrong_answers_here():
    assert WRONG.keys() == EXERCISES.keys()
    assert all(len(answers) >= 3 for answers in WRONG.values())


@pytest.mark.parametrize(("name", "number"), CHEAP)
def test_a_cheap_wrong_answer_fails_and_is_told_why(name, number):
    answer, message = WRONG[name][number]
    for _ in range(20):  # the inputs are random: it must never slip through
        with pytest.raises(NotYet, match=message):
            EXERCISES[name](answer)


@pytest.mark.parametrize("name", EXERCISES)
def test_the_right_answer_always_passes(name, capsys):
    for _ in range(50):
        EXERCISES[name](EXERCISES[name].right)
    assert capsys.readouterr().out == "✓ right\n" * 50


@pytest.mark.parametrize("name", EXERCISES)
@pytest.mark.parametrize("blank", [None, ...], ids=["None", "..."])
def test_a_function_that_returns_nothing_yet_is_told_whose_turn_it_is(name, blank, capsys):
    EXERCISES[name](lambda *arguments: blank)
    assert "your turn" in capsys.readouterr().out


@pytest.mark.parametrize("name", EXERCISES)
def test_every_named_mistake_is_one(name):
    """No entry of ``mistakes`` is a right answer or stops with an error of its own."""
    exercise = EXERCISES[name]
    for message, wrong in exercise.mistakes.items():
        with pytest.raises(NotYet) as told:
            exercise(wrong)
        assert "stopped with" not in str(told.value), message


def test_a_function_that_forgets_a_return_is_told_so():
    with pytest.raises(NotYet, match=r"returns nothing for \(\[3, 4\], \[3, 4\]\)"):
        checks.kept_tokens(lambda draft, said: next((i for i in range(len(draft)) if draft[i] != said[i]), None))


def test_an_error_in_the_answer_is_shown():
    with pytest.raises(NotYet, match="stopped with ZeroDivisionError: float division by zero"):
        checks.break_even(lambda t1, tn: t1 / 0)
    with pytest.raises(NotYet, match="stopped with TypeError"):
        checks.break_even(lambda t1: t1)


@pytest.mark.parametrize(
    "value",
    ["text", [None, 1], {}, float("nan"), object(), [[1], [2, 3]]],
    ids=["text", "list", "dict", "nan", "object", "lists"],
)
@pytest.mark.parametrize("name", EXERCISES)
def test_an_answer_of_another_kind_fails_with_the_hint(name, value):
    with pytest.raises(NotYet, match=r".{20}"):
        EXERCISES[name](lambda *arguments: value)


def test_an_answer_may_change_its_arguments(capsys):
    def answer(draft, said):
        kept = 0
        while draft and draft.pop(0) == said.pop(0):
            kept += 1
        return kept

    checks.kept_tokens(answer)
    assert "right" in capsys.readouterr().out


def test_messages_are_sentences_for_a_learner():
    for name, exercise in EXERCISES.items():
        for message in [*exercise.mistakes, exercise.hint]:
            assert 10 < len(message) < 130 and not message.endswith("."), (name, message)
        assert len(inspect.signature(exercise.right).parameters) or name == "acceptance_walk"
