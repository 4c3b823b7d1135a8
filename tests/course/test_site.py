"""The site is complete and asks nothing of the network."""

import re

import pytest

from medusa_nb.course.run import notebooks
from medusa_nb.course.site import build_site

OUTSIDE = re.compile(
    r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"'](?:https?:)?//|@import\s+url\(['\"]?https?:"
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return {path.name: path.read_text(encoding="utf-8") for path in build_site(tmp_path_factory.mktemp("site"))}


def test_every_notebook_has_a_page_and_the_index_links_to_it(pages):
    for notebook in notebooks():
        assert f"{notebook.stem}.html" in pages
        assert f'href="{notebook.stem}.html"' in pages["index.html"]
    assert {"GLOSSARY.html", "SUMMARY.html", "TEACHING.html"} <= pages.keys()


def test_no_page_requests_anything_from_outside(pages):
    for name, text in pages.items():
        assert not OUTSIDE.search(text), (name, OUTSIDE.search(text))
        assert not re.findall(r"\b(?:require|import)\(['\"]https?:[^'\"]*", text), name


def test_the_check_for_outside_requests_sees_one():
    assert OUTSIDE.search('<script async src="https://example.org/x.js">') and OUTSIDE.search("<img src='//cdn.org/x'>")
    assert not OUTSIDE.search('<a href="https://example.org">') and not OUTSIDE.search('<img src="race.gif">')


def test_links_between_pages_lead_to_pages(pages):
    for name, text in pages.items():
        for target in re.findall(r'href="([\w./]+\.(?:html|md|ipynb))(?:#[^"]*)?"', text):
            assert target in pages, (name, target)


def test_figures_are_described_and_lessons_are_not_raw_markdown(pages):
    for name, text in pages.items():
        assert "No description has been provided" not in text, name
    index = re.sub(r"<style.*?</style>", "", pages["index.html"], flags=re.DOTALL)
    assert "`" not in index and "*this*" not in index


def test_a_page_shows_no_picture_that_is_not_there(pages, tmp_path):
    """The index once showed the race before any race was recorded."""
    folder = tmp_path / "site"
    names = {path.name for path in build_site(folder)} | {path.name for path in folder.iterdir()}
    for name, text in pages.items():
        for picture in re.findall(r'<img\b[^>]*\bsrc="([^":]+)"', text):
            assert picture in names, (name, picture)
