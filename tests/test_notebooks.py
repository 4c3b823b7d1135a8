"""The seven notebooks: they run in one go, their exercises work, and they keep to the style they were written in."""

import ast
import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
import torch
import torch.nn.functional as F

from medusa_nb.course import checks, report, run
from medusa_nb.course.checks import Exercise, NotYet
from medusa_nb.course.walk import RESULTS

REPOSITORY = Path(__file__).parents[1]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("0*.ipynb"))
WIDGET = "application/vnd.jupyter.widget-view+json"
LARGEST = 300_000  # bytes of a notebook with its outputs
MOST_NAMES = {"01": 8, "02": 10, "03": 12, "04": 14}
SOLUTION = re.compile(r"<details><summary>Solution</summary>(.*?)</details>", re.DOTALL)
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
# an address of this or any machine, and what looks like a key
PATH = re.compile(
    r"(?<![\w.])/(?:home|root|work|Users|tmp|usr|opt|var|private)/|[A-Z]:\\\\|(?:hf|sk|ghp|glpat)[_-]\w{16,}"
)
# words that give a translation away, see shared/STYLE.md; a line may break between them
STIFF = re.compile(
    r"\bdear(er|est)?\b|\bvices?\b|leaves?\s+the\s+house|here\s+and\s+now|\banew\b|\bfurther\s+ones\b|may\s+look\s+at|"
    r"\b(is|are)\s+asked\s+about|behind\s+(the|a|its)\s+(first|last|wrong|root|end|answer|token)|"
    r"\bnothing\s+to\s+guess\b|it\s+must\s+be\s+known",
    re.IGNORECASE,
)


def read(path: Path):
    return nbformat.read(path, 4)


def sources(path: Path, kind: str) -> list[str]:
    return [cell.source for cell in read(path).cells if cell.cell_type == kind]


def by_name(path: Path) -> str:
    return path.stem


def outputs(notebook) -> list:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.mark.slow
def test_all_seven_run_one_after_the_other(tmp_path, monkeypatch):
    """One smoke run, as ``medusa-nb run --all --smoke`` does it, and what is made of it afterwards."""
    monkeypatch.setattr(run, "build_folder", lambda: tmp_path)
    out = run.run_walk("smoke", every=True)
    results = json.loads((out / "results.json").read_text())
    assert results["minutes"].keys() == {path.name[:2] for path in NOTEBOOKS}
    assert RESULTS.keys() - results.keys() <= {"distillation"}, "a notebook records nothing"
    for rows in results["speed"].values():
        for row in rows.values():
            assert row["identical"]["identical"] + row["identical"]["ties"] == row["identical"]["prompts"]
    for path in sorted(out.glob("*.ipynb")):
        notebook = read(path)
        code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), path.name
        assert not [o.text for o in outputs(notebook) if o.get("name") == "stderr"], path.name
        assert not [o for o in outputs(notebook) if WIDGET in o.get("data", {})], f"{path.name}: a live widget"
        assert path.stat().st_size <= LARGEST, path.name
        assert 0.1 < notebook.metadata["peak_memory_gb"] < 8

    assert "times" not in report.summary(results) and results["run_id"] in report.summary(results)
    text = report.readme((REPOSITORY / "README.md").read_text(encoding="utf-8"), results)
    assert "**{:.2f} tokens per pass**".format(results["speed"]["eager"]["full"]["tokens_per_pass"]) in text

    kept = tmp_path / "notebooks"
    shutil.copytree(REPOSITORY / "notebooks", kept)
    monkeypatch.setattr(run, "notebooks", lambda: sorted(kept.glob("0*.ipynb")))
    before = {path.name: [cell.source for cell in read(path).cells] for path in run.notebooks()}
    run.keep_outputs(out)
    for path in run.notebooks():
        notebook = read(path)
        assert notebook.metadata["medusa_nb"]["run_id"] == results["run_id"]
        assert re.search(r"\*Takes \d+ minutes? on two CPU cores and \d\.\d GB", notebook.cells[0].source)
        assert [cell.source for cell in notebook.cells][1:] == before[path.name][1:]
        tags = {tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])}
        assert tags <= {"parameters", "exercise"} and "papermill" not in notebook.metadata
        assert not PATH.search(path.read_text(encoding="utf-8")), PATH.search(path.read_text(encoding="utf-8"))


def test_committed_outputs_are_of_one_run():
    shown = [path for path in NOTEBOOKS if outputs(read(path))]
    if not shown:
        pytest.skip("the notebooks have no outputs yet; make notebooks")
    runs = {path.name: read(path).metadata.get("medusa_nb", {}).get("run_id") for path in shown}
    recorded = json.loads((REPOSITORY / "data" / "results.json").read_text())
    assert set(runs.values()) == {recorded["run_id"]}, f"README and results.json are of another run: {runs}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_a_committed_notebook_is_small_and_clean(path):
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size <= LARGEST
    assert not PATH.search(text), PATH.search(text)
    kinds = [(output.output_type, output.get("name")) for output in outputs(read(path))]
    assert not [kind for kind in kinds if kind[0] == "error" or kind[1] == "stderr"]


# Exercises


def exercises() -> list[tuple[str, str, str]]:
    """For each exercise: where it stands, its cell, and the cell of prose above it."""
    found = []
    for path in NOTEBOOKS:
        cells = read(path).cells
        for number, cell in enumerate(cells):
            if "exercise" in cell.metadata.get("tags", []):
                found.append((f"{path.name[:2]}-{number}", cell.source, cells[number - 1].source))
    return found


EXERCISES = exercises()


def test_every_check_belongs_to_an_exercise_and_every_exercise_has_one():
    known = {name for name, value in vars(checks).items() if isinstance(value, Exercise)}
    used = [re.findall(r"checks\.(\w+)\(", source) for _, source, _ in EXERCISES]
    assert all(len(names) == 1 for names in used) and {names[0] for names in used} == known
    for path in NOTEBOOKS:
        loose = [cell for cell in read(path).cells if "checks." in cell.source and cell.cell_type == "code"]
        assert all("exercise" in cell.metadata.get("tags", []) for cell in loose), f"{path.name}: not tagged"


@pytest.mark.parametrize(("source", "prose"), [e[1:] for e in EXERCISES], ids=[e[0] for e in EXERCISES])
def test_an_exercise_is_blank_and_its_folded_solution_passes(source, prose, capsys):
    names = {"torch": torch, "F": F, "checks": checks}
    exec(source, names)  # blank: says whose turn it is, and the run goes on
    assert "your turn" in capsys.readouterr().out
    function = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    assert ast.unparse(function.body[-1]) in ("...", "return ..."), "the exercise is not blank"
    folded = SOLUTION.search(prose)
    assert folded, "there is no folded solution in the cell above"
    [solution] = BLOCK.findall(folded[1])
    exec(solution, names)
    exec(source.splitlines()[-1], names)
    assert capsys.readouterr().out == "✓ right\n"


@pytest.mark.parametrize(("source", "prose"), [e[1:] for e in EXERCISES], ids=[e[0] for e in EXERCISES])
def test_a_bug_hunt_s_bug_is_found(source, prose):
    """What the colleague wrote stands beside the blank; taken as the answer it must fail."""
    shown = re.search(r"the colleague wrote: (.*)", source)
    if not shown:
        pytest.skip("not a bug hunt")
    names = {"torch": torch, "checks": checks}
    with pytest.raises(NotYet, match="still"):
        exec(source.replace("return ...", f"return {shown[1]}"), names)


# Style


def imported(path: Path) -> dict[str, int]:
    """Names that a notebook imports from the package, and the cell where each comes in."""
    names: dict[str, int] = {}
    for number, cell in enumerate(read(path).cells):
        if cell.cell_type == "code":
            for node in ast.walk(
                compile(cell.source, path.name, "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            ):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("medusa_nb"):
                    for alias in node.names:
                        names.setdefault(alias.asname or alias.name, number)
    return names


@pytest.mark.parametrize("path", NOTEBOOKS[:4], ids=by_name)
def test_a_notebook_teaches_the_idea_not_the_package(path):
    names = imported(path)
    assert len(names) <= MOST_NAMES[path.name[:2]], sorted(names)


SPOKEN_OF = {  # names whose work the prose describes in other words
    "Decoder": "The same with heads",
    "doctor": "Is this machine ready?",
    "browse": "Leaf through them",
    "fingerprint": "*frozen*",
    "encode_answer": "the tinted tokens are the model's own",
    "planner": "the speedup to expect",
    "timing": "tested on the same held-out prompts",
    "gains": "What are heads worth?",
    "heads_rows": "What are heads worth?",
    "markdown": "What are heads worth?",
    "measure": "The measurement follows four rules",
}


def test_an_imported_name_is_spoken_of_where_it_first_comes_in():
    """The prose next to the cell has the name, the beginning of one of its words, or says it in other words."""
    known = {"figures"}  # draws what the prose speaks of
    for path in NOTEBOOKS[:4]:
        cells, names = read(path).cells, imported(path)
        for name, number in names.items():
            near = [cell.source for cell in cells[max(0, number - 2) : number + 3] if cell.cell_type == "markdown"]
            words = [word[:5].lower() for word in re.findall(r"[A-Z]?[a-z]+", name) if len(word) > 3] or [name]
            words.append(SPOKEN_OF.get(name, name).lower())
            spoken_of = any(word in " ".join(near).lower() for word in words)
            assert name in known or spoken_of, f"{path.name}: nothing is said about {name}"
        known |= names.keys()


@pytest.mark.parametrize("number", ["03", "04"])
def test_there_is_more_prose_than_code(number):
    path = next(path for path in NOTEBOOKS if path.name.startswith(number))
    prose, code = (sum(map(len, sources(path, kind))) for kind in ("markdown", "code"))
    assert prose >= 1.2 * code, f"{prose} characters of prose, {code} of code: {prose / code:.2f}"


def test_the_longest_notebook_can_be_walked_in_one_sitting():
    assert len(read(NOTEBOOKS[3]).cells) <= 60


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_a_notebook_can_be_parametrised_and_installs_nothing(path):
    assert {"run", "work"} <= run.known_parameters(path)
    code = sources(path, "code")
    assert not [source for source in code if source.lstrip().startswith(("!pip", "%pip", "!git"))]
    assert max(len(source.splitlines()) for source in code) <= 32


def pages() -> list[Path]:
    files = [*NOTEBOOKS, REPOSITORY / "README.md", *(REPOSITORY / "notebooks").glob("*.md")]
    return files + [*REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("data/*.md"), *REPOSITORY.glob("medusa_nb/**/*.py")]


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_no_word_gives_a_translation_away(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join(cell.source for cell in read(path).cells)
    assert not STIFF.search(text), text[max(0, STIFF.search(text).start() - 60) :][:140]
