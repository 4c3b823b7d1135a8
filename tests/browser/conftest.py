"""JupyterLab on loopback and a real browser in front of it.

The notebooks run in their smoke form. To see them with trained heads, point ``MEDUSA_NB_BROWSER_RUN=learner`` and
``MEDUSA_NB_BROWSER_WORK=FOLDER`` at the artefacts of a run. Screenshots and response times go to ``build/browser``.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pytest
from notebook_page import CHROMIUM, FLAGS, LOOPBACK, OUT, RUN, SETTINGS, WORK
from playwright.sync_api import sync_playwright

from medusa_nb.storage import require_repository

ROOT = require_repository("the browser tests")


def prepare_folder() -> Path:
    """The notebooks without outputs and with this test's parameters, where JupyterLab will find them."""
    shutil.rmtree(OUT, ignore_errors=True)
    (OUT / "shots").mkdir(parents=True)
    folder = OUT / "lab" / "notebooks"
    shutil.copytree(ROOT / "notebooks", folder, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for path in folder.glob("*.ipynb"):
        notebook = nbformat.read(path, 4)
        for cell in notebook.cells:
            if "parameters" in cell.metadata.get("tags", []):
                cell.source = cell.source.replace('run = "learner"', f'run = "{RUN}"')
                cell.source = cell.source.replace('work = ""', f'work = "{WORK}"')
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, path)
    for name, values in SETTINGS.items():
        file = OUT / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    return OUT / "lab"


class Lab:
    """A running JupyterLab: its address, and its kernels, which are shut down between notebooks."""

    def __init__(self, url: str, token: str):
        self.url, self.token = url, token

    def call(self, path: str, method: str = "GET"):
        """Ask the server's own interface."""
        request = urllib.request.Request(
            self.url + path, method=method, headers={"Authorization": f"token {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            body = answer.read()
        return json.loads(body) if body else None

    def end_kernels(self) -> None:
        for session in self.call("/api/sessions"):
            self.call(f"/api/sessions/{session['id']}", "DELETE")


@pytest.fixture(scope="session")
def lab():
    """JupyterLab on a free port of the loopback interface, with a token."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, folder = secrets.token_hex(16), prepare_folder()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1"]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}"]
    command += [f"--LabApp.user_settings_dir={OUT / 'settings'}", f"--LabApp.workspaces_dir={OUT / 'workspaces'}"]
    command += ["--LabApp.news_url=None", "--LabApp.extension_manager=readonly"]
    command += ["--LabApp.expose_app_in_browser=True"]  # for its command that changes the theme
    command += ["--KernelManager.transport_encryption=auto"]
    environment = os.environ | dict(JUPYTER_TOKEN=token, HF_HUB_OFFLINE="1")
    environment.pop("MEDUSA_NB_HEADLESS", None)
    with open(OUT / "jupyter.log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        running = Lab(f"http://127.0.0.1:{port}", token)
        for _ in range(120):
            assert server.poll() is None, (OUT / "jupyter.log").read_text()[-2000:]
            try:
                running.call("/api/status")
                break
            except OSError:
                time.sleep(0.5)
        else:
            raise AssertionError("JupyterLab did not answer within a minute; see build/browser/jupyter.log")
        yield running
        running.end_kernels()
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium, without a window."""
    assert CHROMIUM, "no Chromium found; 'make test-browser' installs it, or set MEDUSA_NB_CHROMIUM to one"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A fresh page; at the end every request it made must have stayed on this machine."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.on("websocket", lambda socket: asked.append(socket.url))
    yield page
    outside = {url for url in asked if urlsplit(url).scheme not in ("data", "blob", "file", "about")}
    outside = sorted(url for url in outside if urlsplit(url).hostname not in LOOPBACK)
    context.close()
    assert not outside, f"requests left this machine: {outside}"


@pytest.fixture(scope="session")
def times():
    """Response times in milliseconds by what was done; written to ``build/browser/response_ms.json``."""
    measured: dict[str, list[float]] = {}
    yield measured
    rounded = {name: [round(value, 1) for value in values] for name, values in measured.items()}
    (OUT / "response_ms.json").write_text(json.dumps(rounded, indent=1))
