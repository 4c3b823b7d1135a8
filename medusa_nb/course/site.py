"""The executed notebooks as web pages: self-contained, no request leaves the page."""

import shutil
from pathlib import Path

import nbformat
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html

from medusa_nb.course.report import LESSONS
from medusa_nb.course.run import notebooks

OTHERS = {"SUMMARY": "The walk on one page", "GLOSSARY": "Glossary", "TEACHING": "Teaching"}
TEMPLATES = Path(__file__).parent / "templates"
FIGURES = ("race.gif",)
_PAGES = Environment(loader=PackageLoader("medusa_nb.course"), autoescape=True)


def exporter() -> HTMLExporter:
    """nbconvert with our template: no scripts from elsewhere, descriptions for figures, room on narrow screens."""
    return HTMLExporter(extra_template_basedirs=[str(TEMPLATES)], template_name="site", embed_images=True)


def build_site(folder: Path) -> list[Path]:
    """Write a page for each notebook and each Markdown page beside them, and an index; returns the files."""
    paths = notebooks()
    folder.mkdir(parents=True, exist_ok=True)
    convert, pages = exporter(), []
    for path in paths:
        notebook = nbformat.read(path, 4)
        pages.append(_write(convert, notebook, folder / f"{path.stem}.html"))
    for file in sorted(paths[0].parent.glob("*.md")):
        cell = nbformat.v4.new_markdown_cell(file.read_text(encoding="utf-8"))
        pages.append(_write(convert, nbformat.v4.new_notebook(cells=[cell]), folder / f"{file.stem}.html"))
    figures = paths[0].parent.parent / "data" / "figures"
    shown = [name for name in FIGURES if (figures / name).is_file()]
    for name in shown:
        shutil.copy(figures / name, folder / name)
    entries = [
        (path.stem, path.stem.replace("_", " "), Markup(markdown2html(LESSONS[path.name[:2]]))) for path in paths
    ]
    index = _PAGES.get_template("index.html.jinja").render(entries=entries, others=OTHERS, figures=shown)
    (folder / "index.html").write_text(index, encoding="utf-8")
    return [*pages, folder / "index.html"]


def _write(convert: HTMLExporter, notebook, file: Path) -> Path:
    for cell in notebook.cells:
        if cell.cell_type == "markdown":  # links between pages of the repository become links between pages of the site
            cell.source = cell.source.replace(".ipynb)", ".html)").replace(".md)", ".html)").replace(".md#", ".html#")
            cell.source = cell.source.replace("(../README.html)", "(index.html)").replace("(../data/figures/", "(")
    body, _ = convert.from_notebook_node(notebook, {"metadata": {"name": file.stem}})
    file.write_text(body, encoding="utf-8")
    return file
