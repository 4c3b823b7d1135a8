"""Other engines beside ours. The real ones are asked by ``make peers``; here stand-ins speak as they do."""

import sys
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import torch
from tiny_models import EOS

from medusa_nb.decoding import Decoder
from medusa_nb.errors import InputError
from medusa_nb.heads import MedusaHeads
from medusa_nb.measurement import peers
from medusa_nb.measurement.peers import LOOP, Peer, generation, report, run_peers
from medusa_nb.packaged_model import gguf_file
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
    monkeypatch.setattr(peers, "VLLM", file)
    return Path(sys.executable)


@pytest.mark.parametrize(
    ("tokens", "passes", "per_pass"),
    [([7] * 5, None, [1] * 5), ([7] * 6, 2, [1, 3, 2]), ([7], None, [1, 0]), ([7] * 3, 9, [1, 1, 1])],
)
def test_an_answer_keeps_its_tokens_and_its_number_of_passes(tokens, passes, per_pass):
    result = generation(PROMPTS[0], tokens, passes)
    assert result.new_tokens == tokens and result.tokens_per_pass == per_pass


def test_a_vllm_answers_waits_without_working_and_counts_its_drafts(stand_in, tmp_path):
    engine = Peer("vLLM", stand_in, peers.VLLM, "model", "float32", "eager", tmp_path, 4)
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
        Peer("vLLM", stand_in, peers.VLLM, "model", "float32", "broken")


@pytest.fixture
def ours(small_model, monkeypatch) -> tuple:
    """What :func:`run_peers` needs of ours; nothing is compiled, and llama.cpp is not there."""
    monkeypatch.setattr(Decoder, "compile", lambda decoder: None)
    monkeypatch.setattr(peers, "LLAMA", Path("missing.py"))
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


def test_llama_cpp_answers_from_a_process_of_its_own(small_model, ours, stand_in, monkeypatch):
    monkeypatch.setattr(peers, "LLAMA", peers.VLLM)
    monkeypatch.setattr(peers, "gguf_file", lambda: "model.gguf")
    rows = run_peers(small_model, PROMPTS, *ours, eos=[EOS], max_new_tokens=12, repeats=1)
    assert len(rows) == 8 and not any(row.differs for row in rows.values())
    table = report(small_model, rows, 1)
    assert table.count("| 4 bits (Q4_1), xllamacpp 0.0 | its own (other arithmetic) |") == 2
    assert not [child for child in psutil.Process().children() if "echo.py" in " ".join(child.cmdline())]


def test_the_real_llama_cpp_says_how_many_passes_it_took():
    pytest.importorskip("xllamacpp")
    prompt = torch.tensor([[1, 4093, 198, 20766, 260, 1452, 338, 2, 198, 1, 520, 9531, 198]])
    for more in ((), ("ngrams",)):
        with closing(Peer("llama.cpp", sys.executable, peers.LLAMA, gguf_file(), 2, 2, *more)) as engine:
            answer = engine.decode(prompt, 24)
        assert 1 < len(answer.new_tokens) <= 24 and sum(answer.tokens_per_pass) == len(answer.new_tokens)
        assert more or set(answer.tokens_per_pass) == {1}
