"""For a workshop: entries that count, standings, a bundle, and whether a seat is ready."""

import json
import subprocess
from collections import Counter

import pytest
import torch

from medusa_nb import cli
from medusa_nb.course import doctor, workshop
from medusa_nb.errors import InputError
from medusa_nb.heads import MedusaHeads
from medusa_nb.heads_file import save_heads
from medusa_nb.training.calibration import Calibration


def test_standings_show_each_name_s_best_entry_best_first(tmp_path):
    entries = [("Ada", 1.5), ("Bob", 1.75), ("Ada", 2.0), ("Ada", 1.25)]
    rows = [dict(name=name, heads="MedusaHeads", tokens_per_pass=tokens) for name, tokens in entries]
    board = tmp_path / "board.jsonl"
    board.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert workshop.standings(board) == "  1. 2.000  Ada (MedusaHeads)\n  2. 1.750  Bob (MedusaHeads)"
    board.write_text("")
    assert workshop.standings(board) == "nobody has entered yet"


def test_an_entry_needs_a_name(tmp_path):
    with pytest.raises(InputError, match="--name"):
        workshop.enter(tmp_path, tmp_path / "board.jsonl", " ")


def test_a_bundle_needs_an_empty_folder(tmp_path):
    (tmp_path / "x").write_text("")
    for folder in (tmp_path, tmp_path / "x"):
        with pytest.raises(InputError, match="is not an empty folder"):
            workshop.pack(folder)


def test_wheels_that_cannot_be_fetched_are_one_sentence(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(workshop.subprocess, "run", lambda command, **how: failed)
    with pytest.raises(InputError, match="some wheels could not be fetched"):
        workshop.pack(tmp_path / "bundle")


def checks(*lines):
    return lambda: iter(lines)


@pytest.fixture
def quick(monkeypatch):
    """A doctor who does not load the base model."""
    monkeypatch.setattr(doctor, "model_checks", checks((True, "the base model loads", "0.1 s")))


def test_versions_are_those_that_are_pinned(monkeypatch):
    assert all(fine for fine, _, _ in doctor.versions()), "this environment is not the pinned one"
    monkeypatch.setattr(doctor, "version", lambda name: "0.0.1")
    found = {what.split()[0]: (fine, detail) for fine, what, detail in doctor.versions()}
    assert found["torch"] == (False, "0.0.1") and "vllm" not in found and "pytest" not in found


def test_a_machine_that_is_not_ready_says_so_and_exits_non_zero(quick, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "versions", checks((False, "torch ==2.13.0", "1.0")))
    assert cli.main(["doctor"]) == 2
    said = capsys.readouterr()
    assert "FAIL  torch ==2.13.0: 1.0" in said.out and "not ready" in said.out + said.err


def test_a_ready_machine_says_so(quick, monkeypatch, capsys):
    for name in ("versions", "machine_checks"):
        monkeypatch.setattr(doctor, name, checks((True, name, "fine")))
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "this machine is ready"


def test_the_machine_s_checks_all_say_what_was_found():
    rows = list(doctor.machine_checks())
    assert len(rows) == 5 and all(what and detail for _, what, detail in rows)


@pytest.fixture
def seat(tiny_model, tokenizer, tmp_path, monkeypatch):
    """Heads of the tiny model, and the fixed task made small."""
    heads = MedusaHeads(tiny_model, 2)
    save_heads(heads, tmp_path / "heads")
    counts = Counter({(): 8, (0,): 6, (1,): 2, (0, 0): 4})
    Calibration(counts, torch.zeros(1, 1), torch.arange(4)).save(tmp_path / "heads")
    monkeypatch.setattr(workshop, "load_base_model", lambda: (tiny_model, tokenizer))
    monkeypatch.setattr(workshop, "PROMPTS", 2)
    monkeypatch.setattr(workshop, "TOKENS", 8)
    return tmp_path


def test_an_entry_is_measured_and_written_down(seat):
    board = seat / "room" / "board.jsonl"
    entry = workshop.enter(seat / "heads", board, "Ada")
    assert entry["name"] == "Ada" and 1 <= entry["tokens_per_pass"] <= 3
    assert json.loads(board.read_text()) == entry and "Ada (MedusaHeads)" in workshop.standings(board)


def test_a_decoder_that_cheats_does_not_enter(seat, monkeypatch):
    monkeypatch.setattr(workshop, "first_difference_gap", lambda model, ours, theirs: 1.0)
    with pytest.raises(InputError, match="does not count"):
        workshop.enter(seat / "heads", seat / "board.jsonl", "Ada")
    assert not (seat / "board.jsonl").exists()
