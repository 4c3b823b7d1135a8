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
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:46em;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
    "a{color:#0072B2}li{margin:.6em 0}img{max-width:100%}"
)


def page(notebook_file: Path) -> str:
    """One notebook as HTML. Links to other notebooks become links to their pages."""
    notebook = nbformat.read(notebook_file, 4)
    exporter = HTMLExporter(template_name="lab", embed_images=True)
    exporter.require_js_url = exporter.mathjax_url = exporter.jquery_url = exporter.mermaid_js_url = ""
    text, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": notebook_file.stem}})
    text = OUTSIDE.sub("", text)
    text = re.sub(r'href="([0-9]{2}_\w+)\.ipynb"', r'href="\1.html"', text)
    return text.replace('href="GLOSSARY.md"', 'href="GLOSSARY.html"')


def build_site(folder: Path) -> list[Path]:
    """Write a page for each notebook, the glossary, and an index; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = []
    for notebook in notebooks():
        target = folder / f"{notebook.stem}.html"
        target.write_text(page(notebook))
        pages.append(target)
    glossary = HTMLExporter(template_name="basic")
    cell = nbformat.v4.new_markdown_cell((ROOT / "notebooks" / "GLOSSARY.md").read_text())
    body, _ = glossary.from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
    pages.append(folder / "GLOSSARY.html")
    pages[-1].write_text(frame("Glossary", body))
    figure = folder / "walk.png"
    figure.write_bytes((ROOT / "data" / "figures" / "walk.png").read_bytes())
    entries = "".join(
        f'<li><a href="{n.stem}.html">{n.stem.replace("_", " ")}</a>: {html.escape(LESSONS[n.stem[:2]])}</li>'
        for n in notebooks()
    )
    index = f'<h1>Medusa in notebooks</h1><img src="walk.png" alt="the walk in one picture"><ul>{entries}</ul>'
    pages.append(folder / "index.html")
    pages[-1].write_text(frame("Medusa in notebooks", index + '<p><a href="GLOSSARY.html">Glossary</a></p>'))
    return pages


def frame(title: str, body: str) -> str:
    """A plain page around ``body``."""
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    body = OUTSIDE.sub("", body)
    head = f"<head>{meta}<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
    return f"<!doctype html><html lang=en>{head}<body>{body}</body></html>"
