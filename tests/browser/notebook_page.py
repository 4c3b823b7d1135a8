"""A notebook as a person sees it in JupyterLab: run all cells, find a live piece, move it, take its picture."""

import os
import shutil
import time
from pathlib import Path

from medusa_nb.storage import require_repository

OUT = require_repository("the browser tests") / "build" / "browser"
WINDOWS = {"wide": 1280, "narrow": 720}
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
RUN = os.environ.get("MEDUSA_NB_BROWSER_RUN", "smoke")
WORK = Path(os.environ.get("MEDUSA_NB_BROWSER_WORK") or OUT / "work").resolve()
LOOPBACK = {"127.0.0.1", "localhost", ""}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("MEDUSA_NB_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
# without these a Chromium looks for updates and the like; the test is about our pages
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
FLAGS += ["--disable-component-update", "--disable-quic"]
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # all cells are in the page, whatever is scrolled to
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
}

PROMPTS = "() => [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(p => p.textContent.trim())"
ERRORS = "() => [...document.querySelectorAll('.jp-OutputArea-output')].filter(o => o.dataset.mimeType === "
ERRORS += "'application/vnd.jupyter.error' || o.dataset.mimeType === 'application/vnd.jupyter.stderr')"
ERRORS += ".map(o => o.textContent.slice(0, 2000))"


class NotebookPage:
    """One notebook open in one page."""

    def __init__(self, page, lab, name: str):
        self.page, self.name = page, name
        page.goto(f"{lab.url}/lab/tree/notebooks/{name}.ipynb?token={lab.token}&reset")
        page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=60_000)
        page.locator(".jp-MarkdownOutput h1").first.wait_for(timeout=60_000)
        page.wait_for_timeout(1500)

    def shot(self, name: str, part=None) -> None:
        """Keep a picture of the window, or of a part of the page."""
        file = OUT / "shots" / f"{self.name[:2]}_{name}.png"
        if part is None:
            self.page.screenshot(path=file)
        else:
            part.scroll_into_view_if_needed()
            self.page.wait_for_timeout(300)
            part.screenshot(path=file)

    def shots(self, **parts) -> None:
        """Pictures of parts of the page: wide and narrow, light and dark; afterwards wide and light again."""
        for theme in ("dark", "light"):
            self.theme(theme)
            for window in ("narrow", "wide"):
                self.page.set_viewport_size({"width": WINDOWS[window], "height": 900})
                self.page.wait_for_timeout(500)
                for name, part in parts.items():
                    self.shot(f"{name}_{window}_{theme}", part)

    def theme(self, name: str) -> None:
        """Choose JupyterLab's light or dark theme."""
        self.page.evaluate(
            "theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", THEMES[name]
        )
        light = str(name == "light").lower()
        self.page.wait_for_function(f"document.body.dataset.jpThemeLight === '{light}'")
        self.page.wait_for_timeout(500)

    def start(self) -> None:
        """Run all cells, from the menu."""
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

    def finish(self, minutes: float = 15) -> None:
        """Wait until every code cell has run; no cell may have failed or written to stderr."""
        deadline = time.monotonic() + 60 * minutes
        while time.monotonic() < deadline:
            prompts = self.page.evaluate(PROMPTS)
            assert not self.errors(), self.errors()
            if prompts and all(p.strip("[]:").isdigit() for p in prompts):
                break
            self.page.wait_for_timeout(200)
        else:
            raise AssertionError(f"{self.name} has not ended after {minutes} minutes: {prompts}")
        self.page.wait_for_timeout(1500)  # the last widgets' messages are still on their way
        assert not self.errors(), self.errors()

    def errors(self) -> list[str]:
        return self.page.evaluate(ERRORS)

    def output_of(self, text: str):
        """The output area of the first code cell whose source holds ``text``."""
        return self.page.locator(
            ".jp-CodeCell", has=self.page.locator(".jp-InputArea-editor", has_text=text)
        ).first.locator(".jp-Cell-outputWrapper")

    def slider(self, output, label: str):
        """The handle of a slider by its label; arrow keys move it."""
        return (
            output.locator(".widget-hslider", has=self.page.get_by_text(label, exact=True))
            .locator(".noUi-handle")
            .first
        )


def changed(page, part, act, timeout: float = 10_000) -> float:
    """Do something and wait until a part of the page looks different; returns the milliseconds that took."""
    handle = part.element_handle()
    page.evaluate(
        """part => { window.changedAt = null; window.watcher = new MutationObserver(() => {
        window.changedAt = window.changedAt || performance.now() });
        window.watcher.observe(part, {subtree: true, childList: true, attributes: true, characterData: true}) }""",
        handle,
    )
    started = page.evaluate("() => performance.now()")
    act()
    page.wait_for_function("() => window.changedAt", timeout=timeout)
    return page.evaluate("() => { window.watcher.disconnect(); return window.changedAt }") - started
