"""Every notebook runs in its smoke form, and is the kind of notebook papermill can be trusted with."""

import json

import nbformat
import pytest

from medusa_nb.errors import InputError
from medusa_nb.run import check_parameters, execute, find, keep_outputs, walk


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """All notebooks of the walk, executed in order in one work folder."""
    work, out = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("out")
    return work, [execute(notebook, dict(run="smoke", work=str(work)), out) for notebook in walk()]


def test_walk_runs_and_records_results(executed):
    work, notebooks = executed
    assert [n.name[:2] for n in notebooks] == ["01", "02", "03", "04"]
    results = json.loads((work / "results.json").read_text())
    assert {"machine", "latency_ms", "distillation", "data", "training", "accuracy", "speed"} <= results.keys()
    assert (
        results["speed"]["float32"]["identical_to_greedy"]["identical"]
        == results["speed"]["float32"]["identical_to_greedy"]["prompts"]
    )


def test_outputs_are_clean(executed):
    _, notebooks = executed
    for path in notebooks:
        cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code" and c.source.strip()]
        assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
        outputs = [o for c in cells for o in c.outputs]
        assert not [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"], path.name
        assert path.stat().st_size <= 300_000


@pytest.mark.parametrize("notebook", walk(), ids=lambda n: n.stem)
def test_shape_of_a_notebook(notebook):
    cells = nbformat.read(notebook, 4).cells
    check_parameters(notebook, {"run": "smoke"})
    code = [c.source for c in cells if c.cell_type == "code"]
    assert max(len(source.splitlines()) for source in code) <= 30
    assert "checks." in "\n".join(code)
    assert not any(source.lstrip().startswith(("!pip", "%pip")) for source in code)


def test_misspelled_parameter_is_refused():
    with pytest.raises(InputError, match="no parameter 'sed'"):
        check_parameters(find("01"), {"sed": 1})


def test_unknown_notebook_is_refused():
    with pytest.raises(InputError, match="no notebook '99'"):
        find("99")


def test_notebook_without_parameters_cell_is_refused(tmp_path):
    path = tmp_path / "none.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]), path)
    with pytest.raises(InputError, match="0 cells tagged"):
        check_parameters(path, {})


@pytest.mark.parametrize(
    ("source", "message"),
    [("1 / 0", "ZeroDivisionError"), ("import sys\nsys.exit(0)", "ended early|SystemExit")],
)
def test_failing_cell_is_named(tmp_path, source, message):
    parameters = nbformat.v4.new_code_cell("run = 'x'", metadata={"tags": ["parameters"]})
    cells = [parameters, nbformat.v4.new_code_cell(source), nbformat.v4.new_code_cell("print('after')")]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path = tmp_path / "bad.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
    with pytest.raises(InputError, match=message):
        execute(path, {}, tmp_path / "out")


def test_kept_outputs_have_no_traces_of_papermill(executed, tmp_path, monkeypatch):
    monkeypatch.setattr("medusa_nb.run.NOTEBOOKS", tmp_path)
    keep_outputs(executed[1][0].parent)
    for path in walk_of(tmp_path):
        notebook = nbformat.read(path, 4)
        tags = [tag for c in notebook.cells for tag in c.metadata.get("tags", [])]
        code = [c for c in notebook.cells if c.cell_type == "code"]
        assert tags == ["parameters"]
        assert [c.execution_count for c in code] == list(range(1, len(code) + 1))


def walk_of(folder):
    notebooks = sorted(folder.glob("*.ipynb"))
    assert len(notebooks) == 4
    return notebooks
