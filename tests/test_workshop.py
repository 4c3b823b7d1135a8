"""Workshop tools: blanks come from the solved notebooks, fail with a useful message, and seats are checked."""

import html

import nbformat
import pytest

from medusa_nb import workshop
from medusa_nb.__main__ import main
from medusa_nb.checks import NotYet
from medusa_nb.errors import InputError
from medusa_nb.run import notebooks
from medusa_nb.workshop import blank, blanked, is_exercise, pack, seat_checks


def exercises(path) -> list[str]:
    return [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code" and is_exercise(c.source)]


def prepared() -> dict:
    """The names that exercise cells use from earlier cells."""
    import torch
    import torch.nn.functional as F

    from medusa_nb import checks
    from medusa_nb.features import IGNORED

    return dict(torch=torch, F=F, checks=checks, IGNORED=IGNORED, latency={1: 1.0, 16: 2.0})


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_solved_exercises_pass_and_blank_ones_say_whose_turn_it_is(path, tmp_path, capsys):
    blank(tmp_path)
    solved, empty = exercises(path), exercises(tmp_path / path.name)
    assert len(solved) == len(empty) >= 1
    for answer, gap in zip(solved, empty, strict=True):
        exec(answer, prepared())
        assert "✓ right" in capsys.readouterr().out
        assert answer != gap
        with pytest.raises((NotImplementedError, NotYet), match="your turn"):
            exec(gap, prepared())
        folded = [html.unescape(c.source) for c in nbformat.read(tmp_path / path.name, 4).cells]
        taken = [line for line in answer.splitlines() if line.strip() and line not in gap]
        assert any(all(line.strip() in text for line in taken) for text in folded), "the answer is folded nowhere"


def test_blank_notebooks_have_no_outputs(tmp_path):
    for path in blank(tmp_path):
        cells = nbformat.read(path, 4).cells
        assert not any(c.get("outputs") or c.get("execution_count") for c in cells)
    assert (tmp_path / "GLOSSARY.md").exists() and (tmp_path / "SUMMARY.md").exists()


def test_only_the_answer_is_taken_out():
    source = "from medusa_nb import checks\n\ndef f(x):\n    y = x\n    return y\n\nchecks.some(f)"
    expected = f"from medusa_nb import checks\n\ndef f(x):\n    {workshop.YOUR_TURN}\n\nchecks.some(f)"
    assert blanked(source) == expected
    assert blanked("t1 = 1\nanswer = t1 + 1\nchecks.b(answer)") == "t1 = 1\nanswer = ...  # your turn\nchecks.b(answer)"
    assert not is_exercise("x = 1") and not is_exercise("")


def test_this_seat_is_ready(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "this seat is ready" and all(line.startswith("OK") for line in lines[:-1])


def test_a_seat_with_another_version_is_not(monkeypatch, capsys):
    monkeypatch.setattr(workshop, "check_requirements", lambda: ["FAIL torch 1.0, 2.13.0 is pinned"])
    assert main(["doctor"]) == 2
    assert "FAIL  torch: 1.0, 2.13.0 is pinned" in capsys.readouterr().out
    assert sum(not fine for fine, _, _ in seat_checks()) == 1


def test_a_bundle_needs_an_empty_folder(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(InputError, match="is not empty"):
        pack(tmp_path)
