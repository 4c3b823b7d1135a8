"""Measurements: fair turns, ratios of sums, and the proof that texts are the same."""

import json
from collections import Counter

import pytest
import torch
from conftest import EOS, random_tree

from medusa_nb import measurement
from medusa_nb.calibration import Calibration
from medusa_nb.decoding import Decoder, Generation, Step, greedy_generate
from medusa_nb.heads import MedusaHeads
from medusa_nb.measurement import (
    Timing,
    calibrated_tokens,
    compare,
    fastest_decoder,
    first_difference_gap,
    growing_decoder,
    identity,
    largest_gap,
    measure_latency,
    near_tie,
    speedup,
    standard_decoders,
    transformers_generate,
    without_loops,
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


def test_decoders_take_turns_in_an_order_that_rotates():
    calls = []
    decoders = {name: lambda ids, name=name: calls.append((name, ids.item())) or generation([1]) for name in "abc"}
    prompts = [torch.tensor([10]), torch.tensor([11])]
    timings = compare(decoders, prompts, repeats=2, after_each=lambda: calls.append(("|", 0)))
    order = "".join(name for name, _ in calls)
    assert order == "abc" + "abc" + "bca" + "|" + "bca" + "cab" + "|"
    assert [prompt for _, prompt in calls] == [10] * 9 + [0] + [11] * 6 + [0]
    for timing in timings.values():
        assert [len(repeats) for repeats in timing.seconds] == [2, 2]
        assert len(timing.generations) == 2


def test_tokens_per_pass_is_a_ratio_of_sums():
    timing = Timing("x", [[1.0], [1.0]], [generation([1] * 10, [1, 3, 3, 3]), generation([1] * 2, [1, 1])])
    assert timing.tokens_per_pass() == 10 / 4  # the mean of ratios would be 2
    assert timing.tokens_per_pass([False, True]) == 1
    assert timing.pass_counts() == [3, 3, 3, 1]


def test_tokens_per_second_uses_medians_and_sums():
    timing = Timing("x", [[1.0, 9.0, 2.0], [3.0, 3.0, 3.0]], [generation([1] * 10), generation([1] * 5)])
    slow = Timing("y", [[4.0] * 3, [6.0] * 3], timing.generations)
    assert timing.tokens_per_second() == 15 / 5
    assert timing.tokens_per_second([True, False]) == 10 / 2
    assert speedup(timing, slow) == 2
    assert timing.spread(slow) == (pytest.approx(10 / 12), pytest.approx(2.5))


def test_transformers_generate_counts_passes(small_model):
    plain = greedy_generate(small_model, PROMPT, 30, eos_token_id=[EOS])
    theirs = transformers_generate(small_model, PROMPT, 30, [EOS])
    assert theirs.new_tokens == plain.new_tokens
    assert theirs.tokens_per_pass == [1] * len(plain.new_tokens)
    end = plain.new_tokens[3]
    stopped = transformers_generate(small_model, PROMPT, 30, [EOS, end])
    assert stopped.new_tokens == plain.new_tokens[: plain.new_tokens.index(end) + 1]
    assert (stopped.stopped_by, theirs.stopped_by) == ("eos", "length")
    assert not small_model.base_model._forward_hooks


def test_all_standard_decoders_give_the_same_text(small_model):
    torch.manual_seed(0)
    heads = MedusaHeads.for_model(small_model, 3)
    torch.nn.init.normal_(heads.weight, std=0.5)
    medusa = Decoder(small_model, heads.requires_grad_(False), random_tree(3, 9), capacity=64)
    decoders = standard_decoders(medusa, Decoder(small_model, capacity=64), 40, [EOS])
    results = {name: decode(PROMPT) for name, decode in decoders.items()}
    for result in results.values():
        assert result.new_tokens == results["model.generate"].new_tokens
        assert sum(result.tokens_per_pass) == len(result.new_tokens)
    assert len(results["prompt lookup"].steps) <= len(results["model.generate"].steps)


def test_equal_texts_have_no_gap(small_model):
    text = greedy_generate(small_model, PROMPT, 12, eos_token_id=[])
    assert first_difference_gap(small_model, text, generation(text.new_tokens)) is None
    assert largest_gap(small_model, text) == pytest.approx(0, abs=1e-4)


def test_gap_is_the_distance_of_the_two_logits(small_model):
    text = greedy_generate(small_model, PROMPT, 12, eos_token_id=[])
    new = text.new_tokens
    other = generation(new[:4] + [(new[4] + 1) % 50] + new[5:])
    logits = small_model(text.sequences[:, :9]).logits[0, -1]
    expected = (logits[new[4]] - logits[(new[4] + 1) % 50]).item()
    assert expected > 0.1
    assert first_difference_gap(small_model, text, other) == pytest.approx(expected, abs=1e-3)
    assert first_difference_gap(small_model, other, text) == pytest.approx(expected, abs=1e-3)
    assert largest_gap(small_model, other) >= expected - 1e-3


def test_a_beginning_is_never_a_tie(small_model):
    text = greedy_generate(small_model, PROMPT, 12, eos_token_id=[])
    assert first_difference_gap(small_model, generation(text.new_tokens[:5]), text) == float("inf")


def test_identity_counts_texts(small_model):
    text = greedy_generate(small_model, PROMPT, 6, eos_token_id=[])
    wrong = generation([(token + 1) % 50 for token in text.new_tokens])
    result = identity(small_model, Timing("a", [], [text, wrong]), Timing("b", [], [text, text]))
    assert (result["prompts"], result["identical"], len(result["gaps"])) == (2, 1, 1)
    assert result["gaps"][0] > result["tie"] == near_tie(torch.float32)
    assert near_tie(torch.bfloat16) > near_tie(torch.float32)


def test_without_loops():
    timing = Timing("x", [], [generation(list(range(80))), generation([1, 2] * 40), generation([3] * 10)])
    assert without_loops(timing) == [True, False, True]


def test_where_every_answer_loops_all_of_them_count():
    timing = Timing("x", [[1.0], [3.0]], [generation([1, 2] * 40, [1, 79]), generation([3] * 60)])
    keep = without_loops(timing)
    assert keep == [False, False]
    assert timing.tokens_per_pass(keep) == timing.tokens_per_pass() == 138 / 60
    assert timing.tokens_per_second(keep) == 140 / 4 and timing.tokens_per_second([True, False]) == 80


def test_the_fastest_decoder_is_the_one_with_most_tokens_a_second(small_model, monkeypatch, tmp_path):
    heads, seconds, tried = MedusaHeads.for_model(small_model, 2), {2: 1.0, 4: 1.2, 5: 9.0}, []
    tokens = {2: 1.5, 4: 2.1, 5: 2.2}

    def step_times(decoders, past):
        tried.append(set(decoders))
        return {shape: seconds[shape[0]] for shape in decoders}

    monkeypatch.setattr(measurement, "time_steps", step_times)
    monkeypatch.setattr(measurement, "calibrated_tokens", lambda decoder, known: tokens[decoder.draft.size])
    known = Calibration(Counter(), torch.zeros(4, 3), torch.arange(20), [[1, 2]])

    shapes = [(2, 1), (4, 2), (5, 2)]

    def size(**options):
        return fastest_decoder(small_model, heads, known, shapes, 40, compiled=False, **options).draft.size

    assert size() == 4
    seconds[4] = 2.0
    assert size() == size(remember=tmp_path) == 2
    tokens[5] = 99
    assert size(remember=tmp_path) == 2 and len(tried) == 3  # what was measured is not measured again
    known.save(tmp_path)
    assert size(remember=tmp_path) == 5  # unless the heads were calibrated again


@pytest.mark.parametrize(
    ("how", "shapes"),
    [
        (dict(), measurement.SHAPES),
        (dict(compiled=False), measurement.WIDE_SHAPES),
    ],
)
def test_which_trees_are_tried_depends_on_how_they_run(small_model, monkeypatch, tmp_path, how, shapes):
    known = Calibration(Counter(), torch.zeros(4, 3), torch.arange(20), [[1, 2]])
    compiled, capacity = [], 40

    def step_times(decoders, past):
        assert 0 < past <= capacity - max(size for size, _ in shapes)
        return dict.fromkeys(decoders, 1.0)

    monkeypatch.setattr(measurement, "time_steps", step_times)
    monkeypatch.setattr(Decoder, "compile", lambda self: compiled.append(self.draft.size))
    heads = MedusaHeads.for_model(small_model, 4)
    fastest_decoder(small_model, heads, known, capacity=capacity, remember=tmp_path, **how)
    [(way, rates)] = json.loads((tmp_path / measurement.SPEEDS).read_text()).items()
    assert rates.keys() == {measurement.name_of(shape) for shape in shapes}
    assert compiled == ([size for size, _ in shapes] if how.get("compiled", True) else [])
    assert (", compiled," in way) == how.get("compiled", True) != (", eager," in way)


def test_tokens_per_pass_on_calibration_prompts(small_model):
    prompts = [PROMPT[0].tolist(), [1] * 500]  # the second does not fit
    known = Calibration(Counter(), torch.zeros(4, 3), torch.arange(20), prompts)
    decoder = Decoder(small_model, capacity=PROMPT.shape[1] + 20)
    assert calibrated_tokens(decoder, known, max_new_tokens=8) == 1.0
    medusa = growing_decoder(small_model, MedusaHeads.for_model(small_model, 2), known, (5, 2), PROMPT.shape[1] + 20)
    counts = medusa.generate([PROMPT[0]], 8)[0].tokens_per_pass[1:]
    assert calibrated_tokens(medusa, known, max_new_tokens=8) == sum(counts) / len(counts)


def test_latency_of_each_width(small_model):
    latency = measure_latency(small_model, widths=(1, 3), past=10, repeats=3)
    assert list(latency) == [1, 3]
    assert all(seconds > 0 for seconds in latency.values())
