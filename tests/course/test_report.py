"""The front page's figures are those of the recorded run."""

import json
from pathlib import Path

import nbformat
import pytest

from medusa_nb.course import report
from medusa_nb.course.walk import SCHEMA
from medusa_nb.errors import InputError

REPOSITORY = Path(__file__).parents[2]
README, RECORDED = REPOSITORY / "README.md", REPOSITORY / "data" / "results.json"


def row(tokens: float, ratio: float) -> dict:
    values = dict(tokens_per_pass=tokens, vs_loop=ratio, vs_generate=ratio + 1)
    return values | {f"{name}_interval": [value - 0.1, value + 0.1] for name, value in values.items()}


RESULTS = dict(
    schema=SCHEMA,
    run_id="abcd1234",
    machine=dict(dtype="float32", cores=2, processor="a processor"),
    speed=dict(eager=dict(plain=row(1.5, 1.3), full=row(2.25, 1.75)), compiled=dict(full=row(2.25, 1.9))),
    identity=dict(identical=11, prompts=12, ties=1),
    minutes={"01": 1.5},
)


def test_the_readme_says_what_the_recorded_run_measured():
    results = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.is_file() else {}
    if results.get("schema") != SCHEMA or "speed" not in results:
        pytest.skip("no whole walk is recorded yet; make notebooks")
    text = README.read_text(encoding="utf-8")
    assert report.headline(results) in text and report.result_table(results) in text


def test_another_result_would_be_noticed():
    text = report.readme(README.read_text(encoding="utf-8"), RESULTS)
    assert "**2.25 tokens per pass** (2.15 to 2.35) and **1.75 times" in text
    assert "| full version, compiled | 2.25 (2.15 to 2.35) | 1.90 (1.80 to 2.00) |" in text
    other = RESULTS | dict(speed=dict(eager=dict(full=row(2.5, 1.75))))
    assert report.readme(text, other) != text
    assert report.readme(text, RESULTS) == text, "filling it in twice changes something"


def test_the_table_names_every_notebook_and_what_ran():
    lines = report.notebook_table(RESULTS).splitlines()[2:]
    assert len(lines) == len(report.LESSONS) == 7
    assert lines[0].endswith("| 1.5 |") and lines[1].endswith("|  |")
    assert all((REPOSITORY / line.split("](")[1].split(")")[0]).is_file() for line in lines)


def test_the_summary_says_what_was_measured_and_that_nothing_was():
    assert "plain eager     1.50 tokens per pass, 1.30 x the same loop, 2.30 x generate" in report.summary(RESULTS)
    assert "identical texts: 11 of 12, near-ties 1" in report.summary(RESULTS)
    assert report.summary(dict(run_id="abcd1234")) == "run abcd1234: nothing was measured yet"


def test_a_missing_block_is_named():
    with pytest.raises(InputError, match="no block between.*facts"):
        report.fill("nothing here", {"facts": "x"})


def test_prose_and_code_are_read_folded_answers_are_not(tmp_path):
    prose = nbformat.v4.new_markdown_cell("one two <details><summary>Hint</summary>three four</details> five")
    code = nbformat.v4.new_code_cell("x = six(seven)")
    nbformat.write(nbformat.v4.new_notebook(cells=[prose, code]), tmp_path / "n.ipynb")
    assert report.reading_minutes(tmp_path / "n.ipynb") == (3 + 2 * 3) / report.WORDS_A_MINUTE


def test_publishing_writes_the_record_the_race_and_the_readme(tmp_path, monkeypatch):
    root = tmp_path / "clone"
    (root / "data").mkdir(parents=True)
    (root / "README.md").write_text(README.read_text(encoding="utf-8"), encoding="utf-8")
    race = root / "build" / "walk" / "learner" / "race.gif"
    race.parent.mkdir(parents=True)
    race.write_bytes(b"GIF")
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    monkeypatch.setattr(report, "require_repository", lambda what: root)
    monkeypatch.setattr(report, "build_folder", lambda: root / "build")
    report.publish(tmp_path)
    assert json.loads((root / "data" / "results.json").read_text()) == RESULTS
    assert (root / "data" / "figures" / "race.gif").read_bytes() == b"GIF"
    assert "**2.25 tokens per pass**" in (root / "README.md").read_text(encoding="utf-8")
