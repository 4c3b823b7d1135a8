"""The benchmark's contestants, compiled, on a tiny model: the notebook's smoke run leaves them eager."""

import warnings

import torch
from conftest import EOS
from test_heads import random_heads, seeing_heads

from medusa_nb.benchmark import (
    GENERATE,
    LIBRARY,
    LIBRARY_LOOP,
    LOOP,
    MEDUSA,
    WIDE,
    WIDER,
    prepare,
    run,
    speedup_breakdown,
)
from medusa_nb.calibration import Calibration
from medusa_nb.tree import count_ranks


def test_every_contestant_compiles_and_says_the_same(small_model, compiler_works):
    ranks = count_ranks(torch.randint(0, 3, (200, 2), generator=torch.Generator().manual_seed(0)))
    known = Calibration(ranks, torch.full((4, 3), 0.3), torch.arange(20), [[5, 6, 7]])
    plain, heads = random_heads(small_model, K=2).requires_grad_(False), seeing_heads(small_model, K=2)
    sizes = dict(shapes=((4, 2),), capacity=64, max_new_tokens=12, eos=[EOS])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        contestants = prepare(small_model, plain, known, heads, known, **sizes)
    assert not [str(warning.message) for warning in seen if "TypedStorage" in str(warning.message)]
    eager = {name for name, decoder in contestants.decoders.items() if not decoder.compiled}
    assert eager == {"our loop, eager", "Medusa, eager"}
    assert contestants.blind.keys() == {4, WIDE} and all(decoder.compiled for decoder in contestants.blind.values())
    prompts = [torch.tensor([[5, 6, 7, 5, 6]]), torch.tensor([[9, 30, 31]])]
    report = run(contestants, small_model, prompts, repeats=2)
    rows = report["rows"]
    assert rows.keys() == contestants.calls.keys() and all(row["identical"]["identical"] == 2 for row in rows.values())
    assert {name: rows[name]["tree"] for name in (LOOP, MEDUSA, WIDER)} == {LOOP: 1, MEDUSA: 4, WIDER: WIDE}
    assert "share_of_achievable" in rows[WIDER]["without_loops"] and "tree" not in rows[GENERATE]
    assert rows[LIBRARY_LOOP]["tree"] == 1 and contestants.decoders[LIBRARY].library
    # what is not compiled as the blind ones are cannot be taken apart by them
    assert "ms_draft" not in rows[LIBRARY] | rows["Medusa, eager"]
    # the parts of a pass add up, and what is left of the gain without them is the achievable one
    parts = ("ms_verify_accept", "ms_draft", "ms_prompt", "ms_rest")
    assert all(abs(row["ms_per_pass"] - sum(row[part] for part in parts)) < 0.01 for row in (rows[LOOP], rows[MEDUSA]))
    assert rows[MEDUSA]["ms_prompt"] > 0 and len(contestants.first_tokens[MEDUSA].seconds) == 1 + 2 * len(prompts)
    steps = speedup_breakdown(report)
    achievable = rows[MEDUSA]["tokens_per_pass"] * rows[LOOP]["ms_verify_accept"] / rows[MEDUSA]["ms_verify_accept"]
    assert abs(steps["and without the rest: achievable"] - achievable) < 0.05 * achievable
    assert abs(steps["measured"] - rows[MEDUSA]["vs_loop"]) < 0.05 * steps["measured"]
