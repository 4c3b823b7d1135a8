"""Running notebooks headlessly: what goes wrong is one sentence that names the notebook, with an exit code."""

import json

import nbformat
import pytest

from medusa_nb import cli
from medusa_nb.course import run, walk
from medusa_nb.errors import InputError

PARAMETERS = 'run = "learner"\nwork = ""\nsize = 1'


def write(folder, name: str, *cells: str, parameters: str = PARAMETERS):
    """A notebook of code cells, the first of them its parameters."""
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    made = [nbformat.v4.new_markdown_cell("# A page\n\n*Takes 9 minutes on two CPU cores and 9.9 GB of memory.*")]
    made += [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})] * bool(parameters)
    made += [nbformat.v4.new_code_cell(source) for source in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=made, metadata=metadata), folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


@pytest.fixture
def course(tmp_path, monkeypatch):
    """An empty folder of notebooks, and a build folder beside it, in place of the repository's."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(run, "notebooks", lambda: sorted(folder.glob("*.ipynb")))
    monkeypatch.setattr(run, "build_folder", lambda: tmp_path / "build")
    return folder


RECORD = f"""
import json, pathlib
pathlib.Path(work).mkdir(parents=True, exist_ok=True)
(pathlib.Path(work) / "results.json").write_text(json.dumps(dict(schema={walk.SCHEMA}, run_id="abc", size=size)))
print("nobody watches")
"""


def test_a_run_records_its_minutes_and_its_outputs_are_kept(course, tmp_path):
    write(course, "01_first", RECORD)
    out = run.run_walk("smoke", parameters=dict(size=3))
    results = json.loads((out / "results.json").read_text())
    assert results["size"] == 3 and results["minutes"].keys() == {"01"}
    run.keep_outputs(out)
    kept = nbformat.read(course / "01_first.ipynb", 4)
    assert kept.cells[1].source == PARAMETERS, "the injected parameters stay out"
    assert kept.cells[2].outputs[0].text == "nobody watches\n"
    assert "*Takes 1 minute on two CPU cores" in kept.cells[0].source and "9.9 GB" not in kept.cells[0].source
    assert kept.metadata.medusa_nb.run_id == "abc" and "papermill" not in kept.metadata


def test_an_unknown_parameter_is_refused_before_anything_runs(course, tmp_path, capsys):
    write(course, "01_first", "raise SystemExit")
    assert cli.main(["run", "--smoke", "-p", "sise", "3"]) == 2
    assert "this run has no parameter 'sise'; it has run, size, work" in capsys.readouterr().err
    assert not (tmp_path / "build").exists()


def test_a_failing_cell_is_named_with_its_notebook(course, capsys):
    write(course, "01_first", "x = 1", "1 / 0", "y = 2")
    assert cli.main(["run", "--smoke"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    # the parameters given and those of the notebook are two cells
    assert said.startswith("error: 01_first.ipynb failed in cell 4: ZeroDivisionError: division by zero"), said


def test_a_cell_that_ends_the_notebook_early_is_an_error(tmp_path):
    page = write(tmp_path, "01_first", "import sys\nsys.exit(0)", "print('never')")
    with pytest.raises(InputError, match=r"01_first.ipynb (failed in cell 3|ended early|was not finished)"):
        run.execute(page, {}, tmp_path / "out")


def test_a_kernel_that_dies_is_an_error(tmp_path):
    page = write(tmp_path, "01_first", "import os\nos._exit(1)")
    with pytest.raises(InputError, match="01_first.ipynb was not finished"):
        run.execute(page, {}, tmp_path / "out")


def test_a_cell_that_takes_too_long_is_an_error(tmp_path):
    page = write(tmp_path, "01_first", "import time\ntime.sleep(60)")
    with pytest.raises(InputError, match="01_first.ipynb was not finished"):
        run.execute(page, {}, tmp_path / "out", timeout=1)


def test_a_notebook_without_its_cell_of_parameters_is_refused(tmp_path):
    page = write(tmp_path, "01_first", "x = 1", parameters="")
    with pytest.raises(InputError, match="01_first.ipynb has 0 cells tagged 'parameters'"):
        run.execute(page, {}, tmp_path / "out")


def test_a_notebook_that_is_not_there_is_named(capsys):
    assert cli.main(["run", "--only", "99"]) == 2
    assert "there is no notebook '99'; there are 01_environment_setup" in capsys.readouterr().err


def test_a_record_of_another_version_is_refused(tmp_path):
    (tmp_path / "results.json").write_text('{"schema": 1}')
    with pytest.raises(InputError, match="another version"):
        walk.read_results(tmp_path / "results.json")


def test_a_walk_records_only_what_its_schema_names(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(dict(schema=walk.SCHEMA, run_id="abc")))
    ours = walk.Walk(walk.RUNS["smoke"], tmp_path)
    ours.record(read_ms=3)
    assert ours.results()["read_ms"] == 3 and ours.id == "abc"
    with pytest.raises(InputError, match="no entry 'speeed'"):
        ours.record(speeed=1)


def test_an_unknown_run_is_refused():
    with pytest.raises(InputError, match="unknown run 'long'; choose one of learner, smoke"):
        walk.start("long")


@pytest.mark.parametrize("command", [["run", "--smoke"], ["site", "SITE"]])
def test_outside_a_clone_it_says_that_the_repository_is_needed(command, tmp_path, monkeypatch, capsys):
    """Once ``run`` said "walk done" there, having run nothing."""
    monkeypatch.setattr("medusa_nb.storage.repository", lambda: None)
    assert cli.main([word.replace("SITE", str(tmp_path / "site")) for word in command]) == 2
    assert "needs the repository" in capsys.readouterr().err
