"""Every notebook runs in its smoke form, and is the kind of notebook papermill can be trusted with."""

import inspect
import json
import re
import shutil
import subprocess
import sys

import nbformat
import pytest

from medusa_nb.decoding import Decoder, longest_right_path
from medusa_nb.errors import InputError
from medusa_nb.run import check_parameters, execute, find, keep_outputs, notebooks, peak_memory, provenance, walk
from medusa_nb.site import WIDGET


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """All notebooks of the walk, executed in order in one work folder."""
    work, out = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("out")
    return work, [execute(notebook, dict(run="smoke", work=str(work)), out) for notebook in walk()]


def test_walk_runs_and_records_results(executed):
    work, done = executed
    assert [n.name[:2] for n in done] == ["01", "02", "03", "04"]
    results = json.loads((work / "results.json").read_text())
    assert {"machine", "latency_ms", "distillation", "data", "training", "accuracy", "speed"} <= results.keys()
    assert (
        results["speed"]["float32"]["identical_to_greedy"]["identical"]
        == results["speed"]["float32"]["identical_to_greedy"]["prompts"]
    )


def later(executed, number: str, tmp_path_factory):
    """A notebook after the walk, executed on the walk's work folder: the folder and the executed copy."""
    work, _ = executed
    return work, execute(find(number), dict(run="smoke", work=str(work)), tmp_path_factory.mktemp("later"))


@pytest.fixture(scope="module")
def benchmark(executed, tmp_path_factory):
    """The benchmark notebook, executed on what the walk made.

    Its decoders stay eager: compiling them takes minutes, and test_benchmark.py does it on a smaller model.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        return later(executed, "05", tmp_path_factory)


def test_benchmark_reports_every_contestant(benchmark):
    work, _ = benchmark
    reports = json.loads((work / "benchmark" / "benchmark.json").read_text())
    for report in reports.values():
        rows = report["rows"]
        assert {
            "model.generate",
            "our loop, eager",
            "our loop, compiled",
            "our loop, library's kernels",
            "prompt lookup",
        } < rows.keys()
        assert len(rows) == 13
        # only what is compiled, as the blind decoders are, can be taken apart
        assert ("ms_draft" in rows["Medusa, eager"]) == (report["compile_seconds"] == 0)
        assert "ms_draft" in rows["+ n-grams in the tree (Medusa)"]
        for row in rows.values():
            assert row["identical"]["identical"] == row["identical"]["prompts"] == report["prompts"]
        assert rows["our loop, compiled"]["vs_loop"] == rows["model.generate"]["vs_generate"] == 1
    assert "| model.generate |" in (work / "benchmark" / "benchmark.md").read_text()


@pytest.fixture(scope="module")
def exported(executed, tmp_path_factory):
    """The export notebook, executed on what the walk made."""
    return later(executed, "07", tmp_path_factory)


def test_exports_are_made_and_checked(exported):
    work, notebook = exported
    assert {path.name for path in (work / "exports").iterdir()} == {"tgi", "vllm", "model"}
    text = notebook.read_text()
    assert "read back as tgi does" in text and "read back as vllm does" in text


@pytest.fixture(scope="module")
def own_model(executed, tmp_path_factory):
    """The notebook on a model of one's own, with its server and torchrun."""
    return later(executed, "06", tmp_path_factory)


def test_the_road_to_a_model_of_your_own(own_model):
    work, _ = own_model
    assert (work / "own_model" / "heads" / "medusa_lm_head.safetensors").is_file()
    rows = (work / "own_model" / "answers.jsonl").read_text().splitlines()
    assert len(rows) == len({json.loads(row)["id"] for row in rows}) > 5


def test_outputs_are_clean(executed, benchmark, exported, own_model):
    for path in [*executed[1], benchmark[1], exported[1], own_model[1]]:
        cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code" and c.source.strip()]
        assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
        outputs = [o for c in cells for o in c.outputs]
        assert not [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"], path.name
        assert not [o for o in outputs if WIDGET in o.get("data", {})], f"{path.name}: a live widget"
        assert path.stat().st_size <= 300_000


@pytest.mark.parametrize("notebook", notebooks(), ids=lambda n: n.stem)
def test_shape_of_a_notebook(notebook):
    cells = nbformat.read(notebook, 4).cells
    check_parameters(notebook, {"run": "smoke"})
    outputs = [o for c in cells if c.cell_type == "code" for o in c.outputs]
    assert outputs and not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not [o for o in outputs if WIDGET in o.get("data", {})]
    code = [c.source for c in cells if c.cell_type == "code"]
    assert max(len(source.splitlines()) for source in code) <= 30
    assert "checks." in "\n".join(code)
    assert not any(source.lstrip().startswith(("!pip", "%pip")) for source in code)


def test_the_step_that_notebook_04_shows_is_todays():
    cells = nbformat.read(find("04"), 4).cells
    text = "".join(o.text for c in cells if c.cell_type == "code" for o in c.outputs if o.output_type == "stream")
    for shown in (Decoder.step, longest_right_path):
        assert inspect.getsource(shown).strip() in text, "run 'make notebooks': notebook 04 shows older code"


def test_the_memory_of_children_is_sampled():
    code = "x = bytearray(200_000_000); import time; time.sleep(1)"
    with peak_memory(every=0.05) as peak:
        subprocess.run([sys.executable, "-c", code], check=True)
    assert 200_000_000 < peak["bytes"] < 2_000_000_000


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


def notebook_of(source: str, folder):
    """A notebook with a parameters cell, a cell of this source, and one that prints "after"."""
    parameters = nbformat.v4.new_code_cell("run = 'x'", metadata={"tags": ["parameters"]})
    cells = [parameters, nbformat.v4.new_code_cell(source), nbformat.v4.new_code_cell("print('after')")]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path = folder / "small.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
    return path


@pytest.mark.parametrize(
    ("source", "message"),
    [("1 / 0", "ZeroDivisionError"), ("import sys\nsys.exit(0)", "ended early|SystemExit")],
)
def test_failing_cell_is_named(tmp_path, source, message):
    with pytest.raises(InputError, match=message):
        execute(notebook_of(source, tmp_path), {}, tmp_path / "out")


def test_what_goes_to_a_kernel_is_encrypted(tmp_path):
    source = "from ipykernel.kernelapp import IPKernelApp\nassert IPKernelApp.instance().curve_secretkey"
    execute(notebook_of(source, tmp_path), {}, tmp_path / "out")


def test_kept_outputs_have_no_traces_of_papermill(executed, tmp_path, monkeypatch):
    for notebook in walk():
        shutil.copy(notebook, tmp_path)
    monkeypatch.setattr("medusa_nb.run.NOTEBOOKS", tmp_path)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    keep_outputs(executed[1][0].parent, only=["02"])
    changed = [path.name for path in tmp_path.iterdir() if path.read_text() != before[path.name]]
    assert changed == ["02_self_distillation.ipynb"]
    keep_outputs(executed[1][0].parent)
    for path in walk_of(tmp_path):
        notebook = nbformat.read(path, 4)
        assert notebook.metadata["executed_with"] == provenance()
        assert re.search(r"\*Took \d+ minutes? on two CPU cores, \d\.\d GB of memory", notebook.cells[0].source)
        tags = [tag for c in notebook.cells for tag in c.metadata.get("tags", [])]
        code = [c for c in notebook.cells if c.cell_type == "code"]
        assert tags == ["parameters"]
        assert [c.execution_count for c in code] == list(range(1, len(code) + 1))


def walk_of(folder):
    found = sorted(folder.glob("*.ipynb"))
    assert len(found) == 4
    return found
