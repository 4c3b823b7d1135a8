"""The site of executed notebooks, in a wide and a narrow window: complete, readable, asking nothing of the network."""

import pytest
from notebook_page import OUT

from medusa_nb.course.site import build_site

WINDOWS = {"wide": 1280, "narrow": 390}


@pytest.fixture(scope="module")
def site():
    return build_site(OUT / "site")


@pytest.mark.parametrize("window", WINDOWS)
def test_every_page_fits_its_window(site, page, window):
    page.set_viewport_size({"width": WINDOWS[window], "height": 900})
    for file in site:
        page.goto(file.as_uri())
        page.wait_for_load_state("networkidle")
        page.screenshot(path=OUT / "shots" / f"site_{file.stem}_{window}.png")
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= WINDOWS[window] + 1, f"{file.name} is {width} pixels wide"


def test_every_figure_is_described(site, page):
    for file in site:
        page.goto(file.as_uri())
        alts = page.eval_on_selector_all("img", "images => images.map(image => image.alt)")
        assert all(len(alt) > 10 and "No description" not in alt for alt in alts), (file.name, alts)


def test_pages_are_readable_at_twice_the_size(site, page):
    page.set_viewport_size({"width": 640, "height": 450})  # what a window of 1280 shows at 200 %
    for file in site:
        page.goto(file.as_uri())
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 641, f"{file.name} is {width} pixels wide"
