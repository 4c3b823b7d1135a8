"""The site is complete and asks nothing of the network."""

import re

import nbformat
import pytest

from medusa_nb.run import notebooks
from medusa_nb.site import OUTSIDE, WIDGET, build_site, page


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return {path.name: path.read_text() for path in build_site(tmp_path_factory.mktemp("site"))}


def test_every_notebook_has_a_page_and_the_index_links_to_it(pages):
    for notebook in notebooks():
        assert f"{notebook.stem}.html" in pages
        assert f'href="{notebook.stem}.html"' in pages["index.html"]
    assert "GLOSSARY.html" in pages


def test_no_page_requests_anything_from_outside(pages):
    for name, text in pages.items():
        assert not OUTSIDE.search(text), name
        assert not re.search(r"@import\s+url\(['\"]?https?:", text), name
        loaded = re.findall(r"\b(?:require|import)\(['\"]https?:[^'\"]*", text)
        assert not loaded, (name, loaded)


def test_links_between_pages_lead_to_pages(pages):
    for name, text in pages.items():
        for target in re.findall(r'href="([\w]+\.html)"', text):
            assert target in pages, (name, target)


def test_figures_are_described_and_lessons_are_not_raw_markdown(pages):
    for name, text in pages.items():
        assert "No description has been provided" not in text and "a figure without a description" not in text, name
    assert "<em>this</em>" in pages["index.html"] and "`" not in pages["index.html"]


def test_a_live_widget_leaves_nothing_to_fetch(tmp_path):
    live = nbformat.v4.new_output("display_data", {WIDGET: {"model_id": "bar"}, "text/plain": "0%|    | 0/9"})
    cell = nbformat.v4.new_code_cell("train()", outputs=[live, nbformat.v4.new_output("stream", text="trained")])
    state = {"bar": {"model_name": "HBoxModel", "model_module": "@jupyter-widgets/controls", "state": {}}}
    widgets = {"application/vnd.jupyter.widget-state+json": {"version_major": 2, "version_minor": 0, "state": state}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata={"widgets": widgets}), tmp_path / "bar.ipynb")
    text = page(tmp_path / "bar.ipynb")
    assert "trained" in text and "html-manager" not in text and "0/9" not in text
