"""The README's and the card's figures come from recorded runs."""

import json
import shutil

import nbformat
import pytest

from medusa_nb import report
from medusa_nb.errors import InputError
from medusa_nb.report import (
    CARD,
    README,
    RECIPE,
    RESULTS,
    WORDS_A_MINUTE,
    card,
    draw,
    fill,
    reading_minutes,
    readme,
)


def test_readme_says_what_the_recorded_run_measured():
    assert README.read_text() == readme(README.read_text(), json.loads(RESULTS.read_text()))


def test_card_says_what_the_recipe_reported():
    assert CARD.read_text() == card(CARD.read_text(), json.loads(RECIPE.read_text()))


def test_another_result_would_be_noticed():
    results = json.loads(RESULTS.read_text())
    next(iter(results["speed"].values()))["in_domain"]["tokens_per_pass"] += 1
    assert readme(README.read_text(), results) != README.read_text()


def test_missing_block_is_named():
    with pytest.raises(InputError, match="no block between.*facts"):
        fill("nothing here", {"facts": "x"})


def test_prose_and_code_are_read_folded_answers_are_not(tmp_path):
    prose = nbformat.v4.new_markdown_cell("one two <details><summary>Hint</summary>three four</details> five")
    code = nbformat.v4.new_code_cell("x = six(seven)")
    nbformat.write(nbformat.v4.new_notebook(cells=[prose, code]), tmp_path / "n.ipynb")
    assert reading_minutes(tmp_path / "n.ipynb") == (3 + 2 * 3) / WORDS_A_MINUTE


def test_a_run_of_some_notebooks_keeps_the_minutes_of_the_others(tmp_path, monkeypatch):
    for name, file in dict(RESULTS=RESULTS, README=README, CARD=CARD).items():
        shutil.copy(file, tmp_path / name)
        monkeypatch.setattr(report, name, tmp_path / name)
    monkeypatch.setattr(report, "FIGURE", tmp_path / "walk.png")
    monkeypatch.setattr(report, "MAP", tmp_path / "map.png")
    out, before = tmp_path / "out", json.loads(RESULTS.read_text())
    out.mkdir()
    (out / "results.json").write_text(json.dumps(before | dict(minutes={})))
    executed = nbformat.v4.new_notebook(metadata=dict(papermill=dict(duration=600)))
    nbformat.write(executed, out / "02_self_distillation.ipynb")
    report.publish(out)
    after = json.loads((tmp_path / "RESULTS").read_text())["minutes"]
    assert after == before["minutes"] | {"02": 10.0} and len(after) > 4
    assert "| 10.0 |" in (tmp_path / "README").read_text()
    assert (tmp_path / "walk.png").stat().st_size > 10_000 and (tmp_path / "map.png").stat().st_size > 10_000


def test_figure_is_drawn(tmp_path):
    draw(json.loads(RESULTS.read_text()), tmp_path / "new" / "walk.png")
    assert (tmp_path / "new" / "walk.png").stat().st_size > 10_000
