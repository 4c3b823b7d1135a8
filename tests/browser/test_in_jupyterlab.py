"""Every notebook in a real browser: it runs from the first cell to the last, and its live pieces answer."""

import nbformat
import pytest
from notebook_page import OUT, WORK, NotebookPage, changed

MONITORED = """
import torch
from medusa_nb.base_model import load_base_model
from medusa_nb.display import set_style
from medusa_nb.features import Features
from medusa_nb.heads import MedusaHeads
from medusa_nb.monitor import TrainingMonitor
from medusa_nb.training import TrainingSettings, train_heads

set_style()
model, _ = load_base_model(dtype="float32")
heads = MedusaHeads.for_model(model, 4)
features = Features("FEATURES")
how = TrainingSettings(epochs=100_000)
log = await TrainingMonitor(4).watch(train_heads, heads, features, "stopped", how)
print("trained until step", log[-1]["step"], "of many; weights moved:", bool(heads.weight.abs().sum() > 0))
"""


@pytest.fixture
def opened(page, lab):
    """Open a notebook by its name, and end its kernel afterwards."""
    yield lambda name: NotebookPage(page, lab, name)
    lab.end_kernels()


def run(opened, name: str) -> NotebookPage:
    """A notebook, seen and run."""
    notebook = opened(name)
    notebook.shot("first_screen")
    notebook.start()
    notebook.finish()
    return notebook


def test_01_runs(opened):
    notebook = run(opened, "01_environment_setup")
    notebook.shot("map", notebook.output_of("plot_map("))
    notebook.shot("latency", notebook.output_of("plot_latency(latency)"))


def test_02_runs_and_its_answers_can_be_leafed_through(opened, page, times):
    notebook = run(opened, "02_self_distillation")
    output = notebook.output_of("browse(good + looping")
    answers = output.locator(".widget-html")
    assert output.get_by_text("answers", exact=False).first.is_visible()
    notebook.shot("distillation_browser", output)
    handle = notebook.slider(output, "answer")
    for _ in range(5):
        times.setdefault("distillation browser: next answer", []).append(
            changed(page, answers, lambda: handle.press("ArrowRight"))
        )
    before = output.get_by_text(" answers").first.inner_text()
    changed(page, output, lambda: output.locator("select").last.select_option("yes"))
    page.wait_for_timeout(300)
    assert output.get_by_text(" answers").first.inner_text() != before, "the filter for loops changes nothing"
    output.locator("select").first.select_option("stop")
    output.locator("select").last.select_option("no")
    page.wait_for_timeout(300)
    assert "ended by stop" in answers.inner_text() or "No answer" in answers.inner_text()
    notebook.shot("distillation_browser_filtered", output)


def test_03_runs_and_a_token_can_be_looked_through(opened, page, times):
    notebook = run(opened, "03_head_training")
    monitor = notebook.output_of("log = await TrainingMonitor")
    monitor.get_by_role("button", name="stop, keep what was learned").wait_for()
    drawn = "image => new Promise(done => { const look = () => image.naturalWidth > 300 ? done(true) : "
    monitor.locator("img").first.evaluate(drawn + "setTimeout(look, 100); look() })")
    notebook.shot("training_monitor", monitor)
    output = notebook.output_of("head_lens(model, heads")
    view = output.locator(".widget-html")
    assert view.locator("tr").count() == 4 and view.get_by_text("true:").count() == 4
    tokens = output.get_by_role("button")
    assert tokens.count() > 5
    for place in (0, 3, 2, 4):
        times.setdefault("head lens: another token", []).append(
            changed(page, view, lambda place=place: tokens.nth(place).click())
        )
    assert "From this state the next" in view.inner_text()
    notebook.shot("head_lens", output)


def test_04_runs_and_its_race_stepper_and_planner_answer(opened, page, times):
    notebook = run(opened, "04_speedup_measurement")
    check_planner(notebook, page, times)
    check_race(notebook, page, times)
    check_stepper(notebook, page, times)


def check_planner(notebook, page, times):
    output = notebook.output_of("planner(counts, latency)")
    notebook.shot("planner", output)
    words = output.locator(".widget-html").last
    assert "This tree pays as long as" in words.inner_text()
    handle = notebook.slider(output, "head 0 right")
    before = words.inner_text()
    for _ in range(5):
        times.setdefault("planner: another accuracy", []).append(
            changed(page, output.locator("img"), lambda: handle.press("ArrowRight"))
        )
    page.wait_for_timeout(300)
    assert words.inner_text() != before


def check_race(notebook, page, times):
    output = notebook.output_of("lanes = race(")
    view = output.locator(".widget-html").first
    text = view.inner_text()
    assert text.count("tokens/s") == 2 and "tokens per pass" in text and "said by the base model" in text
    notebook.shot("race_finished", output)
    handle = notebook.slider(output, "time, %")
    for _ in range(5):
        times.setdefault("race: replay moved", []).append(changed(page, view, lambda: handle.press("PageDown")))
    handle.press("Home")
    page.wait_for_timeout(500)
    assert view.inner_text().count("0 tokens") >= 2
    output.locator("select").select_option("fast")
    output.locator(".jupyter-widget-play button, .widget-play button").first.click()
    page.wait_for_timeout(1500)
    assert "tokens/s" in view.inner_text(), "the replay does not play"
    notebook.shot("race_replay", output)
    field = output.locator("textarea")
    field.fill('def close(self):\n    """Close the file and tell the log."""')
    page.evaluate("window.frames_seen = []")
    page.evaluate(
        """view => { new MutationObserver(() => window.frames_seen.push(view.innerText.length))
        .observe(view, {subtree: true, childList: true}) }""",
        view.element_handle(),
    )
    again = output.get_by_role("button", name="race again")
    times.setdefault("race: first token after 'race again'", []).append(changed(page, view, again.click))
    page.wait_for_function("() => !document.querySelector('button:disabled.jupyter-button')")
    page.wait_for_timeout(500)
    frames = page.evaluate("window.frames_seen")
    assert len(set(frames)) > 2, f"the race does not stream: {frames}"
    notebook.shot("race_again", output)
    field.fill("word " * 3000)
    again.click()
    view.get_by_role("alert").wait_for()
    assert "tokens" in view.inner_text()
    notebook.shot("race_too_long", output)


def check_stepper(notebook, page, times):
    output = notebook.output_of("step_through(medusa")
    view = output.locator(".widget-html")
    handle = notebook.slider(output, "pass")
    for key in ("ArrowRight", "ArrowLeft", "ArrowLeft", "ArrowLeft", "ArrowRight"):
        times.setdefault("tree stepper: another pass", []).append(
            changed(page, view, lambda key=key: handle.press(key))
        )
    nodes = view.locator(".node")
    assert nodes.count() > 3 and view.locator("svg").count() == 2
    assert view.get_by_text("Point at a node").is_visible()
    nodes.nth(2).hover()
    note = view.locator(".note:visible")
    assert note.count() == 1 and "rank path" in note.inner_text()
    assert view.get_by_text("Point at a node").is_hidden()
    notebook.shot("tree_stepper", output)
    page.mouse.move(0, 0)
    nodes.nth(0).focus()
    page.keyboard.press("Tab")
    assert "rank path" in view.locator(".note:visible").inner_text(), "Tab does not reach the nodes"


def test_stop_ends_training_and_keeps_what_was_learned(opened, page, lab):
    features = next(WORK.rglob("features.json"))
    cell = nbformat.v4.new_code_cell(MONITORED.strip().replace("FEATURES", str(features.parent)))
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    title = nbformat.v4.new_markdown_cell("# Stop")
    notebook = nbformat.v4.new_notebook(cells=[title, cell], metadata=metadata)
    nbformat.write(notebook, OUT / "lab" / "notebooks" / "stop.ipynb")
    shown = opened("stop")
    shown.start()
    stop = page.get_by_role("button", name="stop, keep what was learned")
    stop.wait_for(timeout=120_000)
    page.get_by_text("step ", exact=False).first.wait_for(timeout=60_000)
    page.wait_for_timeout(3000)
    shown.shot("monitor_running")
    stop.click()
    shown.finish(minutes=1)
    text = page.locator(".jp-OutputArea-output").last.inner_text()
    assert "trained until step" in text and "weights moved: True" in text
    assert (OUT / "lab" / "notebooks" / "stopped" / "medusa_lm_head.safetensors").is_file()
    assert not (OUT / "lab" / "notebooks" / "stopped" / "checkpoints").exists()


@pytest.mark.parametrize("name", ["05_benchmark", "06_your_own_model", "07_export_and_serve"])
def test_later_notebooks_run(opened, name):
    notebook = run(opened, name)
    notebook.shot("last_screen")
