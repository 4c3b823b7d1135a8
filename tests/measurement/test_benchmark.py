"""The benchmark on a tiny model: every way of decoding says the same, and the parts of a pass add up."""

import pytest
import torch
from tiny_models import EOS

from medusa_nb.decoding import Decoder
from medusa_nb.heads import MedusaHeads
from medusa_nb.measurement.benchmark import (
    EAGER_FULL,
    EAGER_LOOP,
    EAGER_PLAIN,
    FULL,
    GENERATE,
    LOOKUP,
    LOOP,
    PLAIN,
    STEPS_UP,
    heads_rows,
    markdown,
    measure,
    prepare,
    run,
)
from medusa_nb.path_heads import PathHeads
from medusa_nb.training.calibration import Calibration
from medusa_nb.tree import count_ranks

PROMPTS = [torch.tensor([[5, 6, 7, 5, 6]]), torch.tensor([[9, 30, 31]])]


@pytest.fixture(scope="module")
def pairs(small_model) -> list:
    """Random plain heads and random heads that see the path, each with a calibration."""
    ranks = count_ranks(torch.randint(0, 3, (200, 2), generator=torch.Generator().manual_seed(0)))
    known = Calibration(ranks, torch.full((4, 3), 0.3), torch.arange(20))
    heads = [MedusaHeads(small_model, 2), PathHeads(small_model, 2)]
    torch.manual_seed(0)
    for parameter in (parameter for each in heads for parameter in each.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    return [(each.requires_grad_(False), known) for each in heads]


def test_every_contestant_says_the_same_and_the_parts_add_up(small_model, pairs):
    how = dict(size=4, max_new_tokens=12, eos=[EOS], compiled=False, steps_up=True)
    report = measure(small_model, *pairs, PROMPTS, repeats=2, **how)
    rows = report["rows"]
    assert rows.keys() == {GENERATE, LOOKUP, EAGER_LOOP, EAGER_PLAIN, EAGER_FULL, *STEPS_UP[:3]}
    assert all(
        row["identical"] | dict(gaps=0, tie=0) == dict(prompts=2, identical=2, ties=0, gaps=0, tie=0)
        for row in rows.values()
    )
    assert {name: row.get("tree") for name, row in rows.items()} == {
        name: None if name in (GENERATE, LOOKUP) else 1 if name == EAGER_LOOP else 4 for name in rows
    }
    for name in (EAGER_LOOP, EAGER_PLAIN, EAGER_FULL):
        parts = sum(rows[name][part] for part in ("ms_verify_accept", "ms_draft", "ms_prompt", "ms_rest"))
        assert rows[name]["ms_per_pass"] == pytest.approx(parts, abs=0.01)
    assert rows[EAGER_LOOP]["vs_loop"] == 1 and rows[EAGER_LOOP]["ms_draft"] == 0
    assert rows[EAGER_PLAIN]["tokens_per_pass"] >= 1 == rows[EAGER_LOOP]["tokens_per_pass"]
    low, high = rows[EAGER_PLAIN]["vs_generate_interval"]
    assert low <= rows[EAGER_PLAIN]["vs_generate"] <= high
    assert report["steps_ms"].keys() == {"t(1) eager", "t(4) eager"}
    assert heads_rows(report) == {"eager": {"plain": rows[EAGER_PLAIN], "full": rows[EAGER_FULL]}}


def test_prompts_are_watched_once_for_each_repeat(small_model, pairs):
    contestants = prepare(small_model, *pairs, size=3, max_length=40, max_new_tokens=6, eos=[EOS], compiled=False)
    run(contestants, small_model, PROMPTS, repeats=2)
    run(contestants, small_model, PROMPTS, repeats=2)  # a second run starts anew
    for watch in contestants.first_tokens.values():
        assert len(watch.seconds) == 1 + 2 * len(PROMPTS)  # the first was the warm-up
        assert all(seconds > 0 for seconds in watch.seconds)


def test_short_answers_count_for_identity_only(small_model, pairs):
    how = dict(size=3, max_new_tokens=12, eos=[EOS], compiled=False)
    report = measure(small_model, *pairs, PROMPTS, repeats=1, at_least=1000, **how)
    assert report["counted"] == 2  # all of them where none would be left
    assert report["rows"][EAGER_PLAIN]["identical"]["prompts"] == 2


def test_the_table_shows_ratios_with_intervals_and_says_where_texts_part():
    same = dict(identical=2, prompts=3, ties=1)
    rows = {
        "a": dict(tokens_per_pass=1.0, tokens_per_second=1234.5, vs_generate=1.5, identical=same),
        "b": dict(vs_loop=2.0, vs_loop_interval=[1.5, 2.5], identical=same | dict(ties=0)),
    }
    table = markdown(dict(rows=rows), ("tokens/s", "× the same loop")).splitlines()
    assert table[0] == "| | tokens/s | × the same loop | identical text |"
    assert table[2] == "| a | 1,234.50 |  | 2 of 3, 1 near-ties |"
    assert table[3] == "| b |  | 2.00 (1.50 to 2.50) | 2 of 3 |"


def test_compiled_contestants_are_compared_with_the_compiled_loop(small_model, pairs, monkeypatch):
    def compile(decoder):  # what compiling does to the text is tested with the decoder
        decoder.compile_seconds = 1.25

    monkeypatch.setattr(Decoder, "compile", compile)
    how = dict(size=4, max_length=64, max_new_tokens=12, eos=[EOS], steps_up=True)
    contestants = prepare(small_model, *pairs, **how)
    eager = {name for name, decoder in contestants.decoders.items() if not decoder.compiled}
    assert eager == {EAGER_LOOP, EAGER_PLAIN, EAGER_FULL}
    assert contestants.loops == {name: EAGER_LOOP if name in eager else LOOP for name in contestants.decoders}
    assert {key: decoder.compiled for key, decoder in contestants.blind.items()} == {
        (n, how): how for n in (1, 4) for how in (True, False)
    }
    report = run(contestants, small_model, PROMPTS, repeats=1)
    rows = report["rows"]
    assert rows.keys() >= {LOOP, PLAIN, FULL, *STEPS_UP[:3]} and rows[LOOP]["vs_loop"] == 1
    assert rows[PLAIN]["share_of_achievable"] > 0 and rows[FULL]["compile_seconds"] == 1.2
    assert heads_rows(report).keys() == {"eager", "compiled"}
