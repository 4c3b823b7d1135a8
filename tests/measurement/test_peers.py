"""Other engines beside ours. The real ones are asked by ``make peers``; here stand-ins speak as they do."""

import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from tiny_models import EOS

from medusa_nb.decoding import Decoder
from medusa_nb.errors import InputError
from medusa_nb.heads import MedusaHeads
from medusa_nb.measurement import peers
from medusa_nb.measurement.peers import LOOP, Vllm, generation, report, run_peers
from medusa_nb.path_heads import PathHeads
from medusa_nb.training.calibration import Calibration
from medusa_nb.tree import count_ranks

PROMPTS = [torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[9, 30, 31]])]

ECHO = """
import json, sys
if "broken" in sys.argv:
    print("loading", file=sys.stderr)
    print("ValueError: Following weights were not initialized from checkpoint", file=sys.stderr)
    sys.exit("RuntimeError: Engine core initialization failed. See root cause above.")
print(json.dumps(dict(version="0.0")), flush=True)
for line in sys.stdin:
    prompt, limit = json.loads(line)
    counters = {"vllm:spec_decode_num_drafts": [limit // 2], "per_pos": [2, 1]} if len(sys.argv) > 4 else {}
    print(json.dumps(dict(tokens=prompt[:1] * limit, counters=counters)), flush=True)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Path:
    """A program that speaks as ``vllm_runner.py`` does, and repeats the prompt's first token."""
    file = tmp_path / "echo.py"
    file.write_text(ECHO)
    monkeypatch.setattr(peers, "RUNNER", file)
    return Path(sys.executable)


@pytest.mark.parametrize(
    ("tokens", "passes", "per_pass"),
    [([7] * 5, None, [1] * 5), ([7] * 6, 2, [1, 3, 2]), ([7], None, [1, 0]), ([7] * 3, 9, [1, 1, 1])],
)
def test_an_answer_keeps_its_tokens_and_its_number_of_passes(tokens, passes, per_pass):
    result = generation(PROMPTS[0], tokens, passes)
    assert result.new_tokens == tokens and result.tokens_per_pass == per_pass


def test_a_vllm_answers_waits_without_working_and_counts_its_drafts(stand_in, tmp_path):
    engine = Vllm(stand_in, "model", "float32", "eager", tmp_path, 4)
    process = psutil.Process(engine.process.pid)
    for _ in range(2):
        assert engine.decode(PROMPTS[0], 9).tokens_per_pass == [1, 2, 2, 2, 2]
        deadline = time.monotonic() + 10
        while process.status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.status() == psutil.STATUS_STOPPED
    assert engine.counters == {"vllm:spec_decode_num_drafts": [8], "per_pos": [4, 2]}
    engine.close()
    assert engine.process.returncode == 0


def test_a_vllm_that_does_not_start_says_the_cause_not_the_consequence(stand_in):
    with pytest.raises(InputError, match="vLLM ended: ValueError: Following weights were not initialized"):
        Vllm(stand_in, "model", "float32", "broken")


@pytest.fixture
def ours(small_model, monkeypatch) -> tuple:
    """What :func:`run_peers` needs of ours; nothing is compiled, and llama.cpp is not there."""
    monkeypatch.setattr(Decoder, "compile", lambda decoder: None)
    monkeypatch.setattr(peers, "installed", lambda package: "")
    ranks = count_ranks(torch.randint(0, 4, (200, 2), generator=torch.Generator().manual_seed(0)))
    known = Calibration(ranks, torch.full((4, 3), 0.3), torch.arange(20))
    torch.manual_seed(0)
    heads = [MedusaHeads(small_model, 2), PathHeads(small_model, 2)]
    for parameter in (parameter for each in heads for parameter in each.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    return tuple((each.requires_grad_(False), known) for each in heads)


def test_ours_and_transformers_stand_in_one_table(small_model, ours):
    rows = run_peers(small_model, PROMPTS, *ours, eos=[EOS], max_new_tokens=12, repeats=2)
    assert len(rows) == 6 and not any(row.differs for row in rows.values())
    speeds = [row.timing.tokens_per_second() for row in rows.values()]
    assert speeds == sorted(speeds)
    table = report(small_model, rows, 2)
    assert table.count("\n| ") == 7 and table.count("| float32, eager | 2 of 2 |") == 4
    assert f"| {LOOP} |" in table and "2 held-out prompts, 2 repeats" in table and "threads" in table


def test_an_engine_that_says_something_else_is_found_out(small_model, ours, stand_in, tmp_path, capsys):
    how = dict(eos=[EOS], max_new_tokens=12, repeats=1)
    rows = run_peers(small_model, PROMPTS, *ours, vllm=(stand_in, tmp_path), **how)
    wrong = {name for name, row in rows.items() if row.differs}
    assert wrong == {f"vLLM{heads}, {mode}" for heads in ("", ", plain heads") for mode in ("eager", "compiled")}
    assert "vLLM, plain heads, eager: vllm:spec_decode_num_drafts" in report(small_model, rows, 1)
    rows["vLLM, eager"].engine.exact = False
    assert not rows["vLLM, eager"].differs


def test_an_engine_that_does_not_start_is_left_out_and_said_so(small_model, ours, tmp_path, capsys):
    rows = run_peers(
        small_model, PROMPTS[:1], *ours, eos=[EOS], max_new_tokens=3, repeats=1, vllm=(Path(sys.executable), tmp_path)
    )
    assert len(rows) == 6
    assert "vLLM, eager is left out: vLLM ended: ModuleNotFoundError" in capsys.readouterr().out
