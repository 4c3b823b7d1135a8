"""The README's figures come from a recorded run."""

import json

import pytest

from medusa_nb.errors import InputError
from medusa_nb.report import README, RESULTS, draw, fill


def test_readme_says_what_the_recorded_run_measured():
    assert README.read_text() == fill(README.read_text(), json.loads(RESULTS.read_text()))


def test_another_result_would_be_noticed():
    results = json.loads(RESULTS.read_text())
    next(iter(results["speed"].values()))["in_domain"]["tokens_per_pass"] += 1
    assert fill(README.read_text(), results) != README.read_text()


def test_missing_block_is_named():
    with pytest.raises(InputError, match="no block between.*notebooks"):
        fill("nothing here", json.loads(RESULTS.read_text()))


def test_figure_is_drawn(tmp_path):
    draw(json.loads(RESULTS.read_text()), tmp_path / "new" / "walk.png")
    assert (tmp_path / "new" / "walk.png").stat().st_size > 10_000
