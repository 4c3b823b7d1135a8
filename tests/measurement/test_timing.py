"""Speeds: fair turns, ratios of sums, intervals over prompts."""

import numpy as np
import pytest
import torch
from tiny_models import EOS, random_tree

from medusa_nb.decoding import Decoder, Generation, Step
from medusa_nb.errors import InputError
from medusa_nb.heads import MedusaHeads
from medusa_nb.measurement.timing import (
    Timing,
    bootstrap,
    compare,
    decode_all,
    decode_with,
    speedup,
    speedup_interval,
    tokens_difference,
    tokens_interval,
    transformers_generate,
)

PROMPT = torch.tensor([[5, 6, 7, 8, 9]])


def generation(new: list[int], passes: list[int] | None = None) -> Generation:
    """A text of these new tokens, emitted in passes of these sizes."""
    result = Generation(torch.cat([PROMPT, torch.tensor([new])], dim=1), PROMPT.shape[1])
    start = 0
    for size in passes or [1] * len(new):
        result.steps.append(Step([], [], new[start : start + size]))
        start += size
    return result


def in_passes(*sizes: int) -> Generation:
    """A text without a loop, emitted in passes of these sizes."""
    return generation(list(range(sum(sizes))), list(sizes))


def test_decoders_take_turns_in_an_order_that_rotates():
    calls = []
    decoders = {name: lambda ids, name=name: calls.append((name, ids.item())) or generation([1]) for name in "abc"}
    prompts = [torch.tensor([10]), torch.tensor([11])]
    timings = compare(decoders, prompts, repeats=2, after_each=lambda: calls.append(("|", 0)))
    order = "".join(name for name, _ in calls)
    assert order == "abc" + "abc" + "bca" + "|" + "bca" + "cab" + "|"  # the first round is the warm-up
    assert [prompt for _, prompt in calls] == [10] * 9 + [0] + [11] * 6 + [0]
    for timing in timings.values():
        assert [len(repeats) for repeats in timing.seconds] == [2, 2]
        assert len(timing.generations) == 2


@pytest.mark.parametrize(
    ("prompts", "repeats", "message"), [([], 1, "no prompt"), ([PROMPT], 0, "repeats=0"), ([PROMPT], -1, "repeats=-1")]
)
def test_nothing_to_measure_is_refused_before_anything_runs(prompts, repeats, message):
    with pytest.raises(InputError, match=message):
        compare({"a": lambda ids: pytest.fail("it ran")}, prompts, repeats)


def test_tokens_per_pass_is_a_ratio_of_sums_without_the_prompts_pass():
    timing = Timing("x", generations=[in_passes(1, 3, 3, 3), in_passes(1, 1)])
    assert timing.tokens_per_pass() == 10 / 4  # the mean of ratios would be 2
    assert Timing("x", generations=[in_passes(1)]).tokens_per_pass() == 1  # there was no other pass


def test_tokens_per_second_uses_medians_and_sums():
    timing = Timing("x", [[1.0, 9.0, 2.0], [3.0, 3.0, 3.0]], [generation([1] * 10), generation([1] * 5)])
    slow = Timing("y", [[4.0] * 3, [6.0] * 3], timing.generations)
    assert timing.tokens_per_second() == 15 / 5
    assert speedup(timing, slow) == 2


def test_a_speedup_counts_the_same_prompts_on_both_sides():
    generations = [in_passes(*[1] * 10), in_passes(*[1] * 40)]
    fast, slow = Timing("f", [[1.0], [1.0]], generations), Timing("s", [[1.0], [3.0]], generations)
    assert speedup(fast.at_least(20), slow) == 3
    assert speedup_interval(fast.at_least(20), slow) == pytest.approx((3, 3))


def test_answers_that_loop_do_not_count_unless_all_do():
    loop = generation([1, 2] * 40, [1, 79])
    some = Timing("x", [[1.0]] * 3, [in_passes(*[1] * 80), loop, generation([3] * 10)]).without_loops()
    assert some.counted == [0, 2] and some.tokens_per_pass() == 1
    every = Timing("x", [[1.0], [3.0]], [loop, generation([3] * 60)]).without_loops()
    assert every.counted == [0, 1] and every.tokens_per_pass() == 138 / 60
    assert Timing("x", [], [in_passes(1, 1)]).at_least(9).counted == [0]


def test_intervals_are_those_of_the_bootstrap_over_prompts():
    timing = Timing("x", [[1.0]] * 4, [in_passes(1, 4), in_passes(1, 2, 2), in_passes(1, 1, 1), in_passes(1, 3)])
    low, high = tokens_interval(timing)
    assert 1 < low < timing.tokens_per_pass() < high <= 4
    assert tokens_interval(timing) == (low, high)  # always the same draws
    alike = Timing("x", [[2.0]] * 9, [in_passes(1, 3, 3)] * 9)
    assert tokens_interval(alike) == (3, 3)
    assert speedup_interval(alike, Timing("y", [[3.0]] * 9, alike.generations)) == pytest.approx((1.5, 1.5))


def test_the_bootstrap_knows_the_error_of_a_mean():
    values = np.random.default_rng(1).normal(size=(400, 1))
    low, high = bootstrap(lambda rows: values[rows].mean(), values)
    assert high - low == pytest.approx(2 * 1.96 / 400**0.5, rel=0.15)


def test_a_paired_difference_is_sharper_than_its_parts():
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 6, size=40)
    one = Timing("a", generations=[in_passes(1, *[int(n) + 1] * 5) for n in sizes])
    other = Timing("b", generations=[in_passes(1, *[int(n)] * 5) for n in sizes])
    gap, (low, high) = tokens_difference(one, other)
    assert (gap, low, high) == pytest.approx((1, 1, 1))
    wide = tokens_interval(one)
    assert wide[1] - wide[0] > 0.5


def test_transformers_generate_counts_passes(small_model):
    [plain] = Decoder(small_model, max_length=64).generate([PROMPT[0]], 30, [EOS])
    theirs = transformers_generate(small_model, PROMPT, 30, [EOS])
    assert theirs.new_tokens == plain.new_tokens
    assert theirs.tokens_per_pass == [1] * len(plain.new_tokens)
    end = plain.new_tokens[3]
    stopped = transformers_generate(small_model, PROMPT, 30, [EOS, end])
    assert stopped.new_tokens == plain.new_tokens[: plain.new_tokens.index(end) + 1]
    assert (stopped.stopped_by, theirs.stopped_by) == ("eos", "length")
    assert not small_model.base_model._forward_pre_hooks


def test_all_ways_give_the_same_text_and_lose_no_token(small_model):
    torch.manual_seed(0)
    heads = MedusaHeads(small_model, 3).requires_grad_(False)
    torch.nn.init.normal_(heads.weight, std=0.5)
    medusa = Decoder(small_model, heads, random_tree(3, 9), max_length=64)
    plain = transformers_generate(small_model, PROMPT, 40, [EOS])
    lookup = transformers_generate(small_model, PROMPT, 40, [EOS], prompt_lookup_num_tokens=5)
    for result in (
        lookup,
        decode_with(medusa, 40, [EOS])(PROMPT),
        decode_all(medusa, [PROMPT], 40, [EOS]).generations[0],
    ):
        assert result.new_tokens == plain.new_tokens
        assert sum(result.tokens_per_pass) == len(result.new_tokens)
    assert len(lookup.steps) <= len(plain.steps)


def test_texts_that_share_a_pass_are_counted_as_if_alone(small_model):
    heads, tree = MedusaHeads(small_model, 3).requires_grad_(False), random_tree(3, 6)
    prompts = [torch.arange(5, 9 + i)[None] for i in range(5)]
    decoders = [Decoder(small_model, heads, tree, max_length=60, slots=slots) for slots in (1, 4)]
    one, four = (decode_all(decoder, prompts, 30, [EOS]) for decoder in decoders)
    assert [g.new_tokens for g in one.generations] == [g.new_tokens for g in four.generations]
    assert (one.table() == four.table()).all() and one.tokens_per_pass() == four.tokens_per_pass()
