"""The executed notebooks as web pages: self-contained, no request leaves the page."""

import html
import re
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter

from medusa_nb.base_model import ROOT
from medusa_nb.report import LESSONS
from medusa_nb.run import notebooks

OUTSIDE = re.compile(r"<(?:script|link|img)\b[^>]*\b(?:src|href)\s*=\s*[\"']?(?:https?:)?//[^>]*>(?:\s*</script>)?")
UNDESCRIBED = 'alt="No description has been provided for this image"'
WIDGET = "application/vnd.jupyter.widget-view+json"
OTHERS = {"SUMMARY": "The walk on one page", "GLOSSARY": "Glossary", "TEACHING": "Teaching"}
FIGURES = ("map.png", "walk.png")
NARROW = (  # what is wider than a narrow window scrolls in its own box
    ".jp-RenderedHTMLCommon{overflow-x:auto}.jp-RenderedText pre,.jp-InputArea-editor{overflow-x:auto}"
    ".jp-RenderedImage img{max-width:100%;height:auto}"
    "@media(max-width:700px){main{padding:0!important}.jp-InputPrompt,.jp-OutputPrompt{display:none!important}}"
)
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:46em;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
    "a{color:#0072B2}li{margin:.6em 0}img{max-width:100%}.anchor-link{display:none}"
    "table{border-collapse:collapse;display:block;overflow-x:auto}"
    "td,th{border:1px solid #ddd;padding:.3em .6em;text-align:left;vertical-align:top}"
)


def page(notebook_file: Path) -> str:
    """One notebook as HTML. Links to other pages become links to their HTML."""
    notebook = without_widgets(nbformat.read(notebook_file, 4))
    exporter = HTMLExporter(template_name="lab", embed_images=True)
    exporter.require_js_url = exporter.mathjax_url = exporter.jquery_url = exporter.mermaid_js_url = ""
    text, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": notebook_file.stem}})
    for alt in descriptions(notebook):
        text = text.replace(UNDESCRIBED, f'alt="{html.escape(alt)}"', 1)
    return relinked(OUTSIDE.sub("", text).replace("</head>", f"<style>{NARROW}</style></head>", 1))


def without_widgets(notebook):
    """Leave out what only a running kernel can show: its stand-in in HTML would be fetched from outside."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    return notebook


def descriptions(notebook) -> list[str]:
    """What the notebook's figures show, in their order; nbconvert's template leaves that out."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    return [figure.metadata.get("image/png", {}).get("alt", "a figure without a description") for figure in figures]


def relinked(text: str) -> str:
    """Links to notebooks, Markdown pages and figures of the repository become links inside the site."""
    text = re.sub(r'href="(\w+)\.(?:ipynb|md)"', r'href="\1.html"', text)
    text = text.replace('href="../README.md"', 'href="index.html"')
    return re.sub(r'src="\.\./data/figures/(\w+\.png)"', r'src="\1"', text)


def build_site(folder: Path) -> list[Path]:
    """Write a page for each notebook and each Markdown page beside them, and an index; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = []
    for notebook in notebooks():
        pages.append(folder / f"{notebook.stem}.html")
        pages[-1].write_text(page(notebook))
    basic = HTMLExporter(template_name="basic")
    for file in sorted((ROOT / "notebooks").glob("*.md")):
        cell = nbformat.v4.new_markdown_cell(file.read_text())
        body, _ = basic.from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
        pages.append(folder / f"{file.stem}.html")
        pages[-1].write_text(frame(file.stem.capitalize(), relinked(body)))
    for figure in FIGURES:
        (folder / figure).write_bytes((ROOT / "data" / "figures" / figure).read_bytes())
    entries = "".join(
        f'<li><a href="{n.stem}.html">{n.stem.replace("_", " ")}</a>: {inline(LESSONS[n.stem[:2]])}</li>'
        for n in notebooks()
    )
    others = " · ".join(f'<a href="{name}.html">{title}</a>' for name, title in OTHERS.items())
    index = (
        '<h1>Medusa in notebooks</h1><img src="map.png" alt="Map of the walk: which notebook hands what to which">'
        f"<ul>{entries}</ul><p>{others}</p>"
        '<img src="walk.png" alt="What one run of the walk measured">'
    )
    pages.append(folder / "index.html")
    pages[-1].write_text(frame("Medusa in notebooks", index))
    return pages


def inline(text: str) -> str:
    """A line of Markdown with *emphasis* and `code` as HTML."""
    text = re.sub(r"\*([^*]+)\*", r"<em>\1</em>", html.escape(text))
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)


def frame(title: str, body: str) -> str:
    """A plain page around ``body``."""
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    body = OUTSIDE.sub("", body)
    head = f"<head>{meta}<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
    return f"<!doctype html><html lang=en>{head}<body>{body}</body></html>"
