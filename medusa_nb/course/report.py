"""The front page's figures: written from a run's ``results.json`` by this module, never by hand."""

import re
import shutil
from pathlib import Path

import nbformat

from medusa_nb.course.run import notebooks
from medusa_nb.course.walk import read_results
from medusa_nb.errors import InputError
from medusa_nb.storage import build_folder, read_text, require_repository, write_json, write_text

FOLDED, WORD = re.compile(r"<details>.*?</details>", re.DOTALL), re.compile(r"[A-Za-z]\w*")
WORDS_A_MINUTE = 150  # a calm voice
START, END = "<!-- written by medusa_nb.course.report: {name} -->", "<!-- end of {name} -->"
LESSONS = {
    "01": "you are the head: checking sixteen tokens takes nowhere near sixteen times as long as making one",
    "02": "heads must learn what *this* model says, in the domain it will be used in",
    "03": "head k reads the hidden state of token t and predicts token t+k+2; the base model never changes",
    "04": "draft a tree, check it in one pass, keep the longest right path; then measure honestly",
    "05": "what better drafts are worth: the path, a growing tree, copied tokens, a draft vocabulary, compiling",
    "06": "the full-size road: memory first, a server answers, `torchrun` trains",
    "07": "heads in other people's engines: transformers, vLLM, an HTTP server",
}


def reading_minutes(notebook: Path) -> float:
    """Minutes to read a notebook aloud: its prose without folded parts, and its code at half the pace."""
    cells = nbformat.read(notebook, 4).cells
    prose = " ".join(FOLDED.sub("", c.source) for c in cells if c.cell_type == "markdown")
    code = " ".join(c.source for c in cells if c.cell_type == "code")
    return (len(WORD.findall(prose)) + 2 * len(WORD.findall(code))) / WORDS_A_MINUTE


def notebook_table(results: dict) -> str:
    """The notebooks, what they teach, and how long they take to read and to run."""
    lines = ["| notebook | you learn | minutes to read | to run |", "|---|---|---|---|"]
    for path in notebooks():
        number, name = path.stem.split("_", 1)
        minutes = results.get("minutes", {}).get(number)
        title = f"{number} {name.replace('_', ' ').capitalize()}"
        shown = "" if minutes is None else f"{minutes:.1f}"
        lines.append(
            f"| [{title}](notebooks/{path.name}) | {LESSONS[number]} | {reading_minutes(path):.0f} | {shown} |"
        )
    return "\n".join(lines)


def headline(results: dict) -> str:
    """The two numbers of the front page: tokens per pass, and the speedup over the same loop without heads."""
    full, machine = results["speed"]["eager"]["full"], results["machine"]
    tokens, ratio = full["tokens_per_pass"], full["vs_loop"]
    return (
        f"**{tokens:.2f} tokens per pass** ({_interval(full, 'tokens_per_pass')}) and **{ratio:.2f} times the speed of "
        f"the same loop without heads** ({_interval(full, 'vs_loop')}), in {machine['dtype']} on {machine['cores']} "
        f"cores ({machine['processor']}), in one run of the walk with heads trained in that run."
    )


def result_table(results: dict) -> str:
    """Tokens per pass and speedups of the walk's decoders, eager and compiled."""
    lines = ["| | tokens per pass | × the same loop without heads | × `model.generate` |", "|---|---|---|---|"]
    names = dict(plain="plain Medusa", full="full version")
    for way, rows in results["speed"].items():
        for kind, name in names.items():
            if kind in rows:
                row = rows[kind]
                cells = [f"{row[k]:.2f} ({_interval(row, k)})" for k in ("tokens_per_pass", "vs_loop", "vs_generate")]
                lines.append(f"| {name}, {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _interval(row: dict, key: str) -> str:
    low, high = row[f"{key}_interval"]
    return f"{low:.2f} to {high:.2f}"


def summary(results: dict) -> str:
    """The walk's main figures as plain text, for the terminal."""
    if "speed" not in results:
        return f"run {results['run_id']}: nothing was measured yet"
    same = results["identity"]
    lines = [f"run {results['run_id']}, {results['machine']['dtype']}"]
    for way, rows in results["speed"].items():
        for kind in ("plain", "full"):
            if kind in rows:
                row = rows[kind]
                lines.append(
                    f"  {kind:5} {way:9} {row['tokens_per_pass']:.2f} tokens per pass, "
                    f"{row['vs_loop']:.2f} x the same loop, {row['vs_generate']:.2f} x generate"
                )
    lines.append(f"  identical texts: {same['identical']} of {same['prompts']}, near-ties {same['ties']}")
    return "\n".join(lines)


def fill(text: str, blocks: dict[str, str]) -> str:
    """A text with its marked blocks rewritten."""
    for name, block in blocks.items():
        start, end = START.format(name=name), END.format(name=name)
        if start not in text or end not in text:
            raise InputError(f"there is no block between '{start}' and '{end}'; put the two lines back")
        before, after = text.split(start)[0], text.split(end)[1]
        text = f"{before}{start}\n{block}\n{end}{after}"
    return text


def readme(text: str, results: dict) -> str:
    """The README with the figures of a run."""
    blocks = dict(headline=headline(results), notebooks=notebook_table(results), results=result_table(results))
    return fill(text, blocks)


def publish(out: Path) -> None:
    """Take a learner run's results and its race into ``data/``, and write the README from them."""
    root, results = require_repository("publishing a run"), read_results(out / "results.json")
    write_json(root / "data" / "results.json", results)
    race = build_folder() / "walk" / "learner" / "race.gif"
    if race.is_file():
        (root / "data" / "figures").mkdir(exist_ok=True)
        shutil.copy(race, root / "data" / "figures")
    write_text(root / "README.md", readme(read_text(root / "README.md"), results))
