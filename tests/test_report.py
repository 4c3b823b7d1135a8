"""The README's and the card's figures come from recorded runs."""

import json

import pytest

from medusa_nb.errors import InputError
from medusa_nb.report import CARD, README, RECIPE, RESULTS, card, draw, fill, readme


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


def test_figure_is_drawn(tmp_path):
    draw(json.loads(RESULTS.read_text()), tmp_path / "new" / "walk.png")
    assert (tmp_path / "new" / "walk.png").stat().st_size > 10_000
