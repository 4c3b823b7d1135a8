"""Every figure is drawn, described, small, and lies inside its picture."""

import base64
import io

import pytest
import torch
from PIL import Image

from medusa_nb.tree import Tree
from medusa_nb.widgets import figures, style

PARENTS, LABELS = [-1, 0, 0, 1, 1, 3], ["def", " write 60%", "\n 9%", "(", " 100%", "x"]
LATENCY = {1: 0.010, 8: 0.012, 16: 0.015}
LOG = [dict(step=s, head0_loss=9.0 / (s + 1), head0_top1=s / 20, head1_loss=9.5, head1_top1=0.1) for s in range(12)]
DRAWN = {
    "tokens": (lambda: figures.tokens(["def", " f", "\n", "\tx"], [None, 0, -1, 1]), "def[ f][\n][\tx]"),
    "no tokens": (lambda: figures.tokens([], []), ""),
    "named tokens": (lambda: figures.tokens(["a"] * 200, [0] * 200, {0: "drafted by you"}), "[a][a]"),
    "timeline": (figures.timeline, "three wider passes"),
    "trunk": (lambda: figures.trunk_and_heads(num_heads=4), "4 heads t+2 on"),
    "labels": (lambda: figures.label_grid(["def", "area", "("], num_heads=3), "shifted by k + 2 places"),
    "tree": (lambda: figures.tree(PARENTS, LABELS, [0, 1, 3], " path"), "accepted: def ␣write 60% ( + ␣path"),
    "chain": (lambda: figures.tree([-1, 0], ["a", "b"]), "Candidate tree of 2 nodes, 1 deep: a | b"),
    "root only": (lambda: figures.tree([-1], ["a"], [0], "b"), "tree of 1 nodes, 0 deep"),
    "latency": (lambda: figures.latency({"eager": LATENCY, "compiled": LATENCY}, 0.004), "16 15.00"),
    "latency alone": (lambda: figures.latency({"eager": LATENCY}), "eager: 1 10.00, 8 12.00"),
    "lengths": (lambda: figures.lengths([3, 9, 160], 160), "median 9"),
    "training": (lambda: figures.training(LOG, 2, uniform=9.0), "head 0 0.75, head 1 9.50"),
    "no training": (lambda: figures.training([], 2, uniform=9.0), "ends at "),
    "grouped": (
        lambda: figures.grouped({"eager": {"plain": 1.2, "full": 2.0}, "compiled": {"plain": 1.1}}, "times", 1,
                                {"eager": {"plain": (1.0, 1.4)}}),
        "times. eager: plain 1.20, full 2.00; compiled: plain 1.10",
    ),
    "ladder": (lambda: figures.ladder({"plain": 1.5, "+ path": 2.0}, "tokens", {"plain": (1, 2)}), "+ path 2.00"),
    "curve": (lambda: figures.curve({10: 1.5, 100: 2.0}, "data", "tokens", {10: (1, 2)}, log=True), "by data: 10 1.50"),
}  # fmt: skip


@pytest.fixture
def pictures(monkeypatch):
    """Figures as they are shown: the PNG, its description, its width in the page."""
    kept = []

    def display(thing, raw, metadata):
        assert raw
        about = metadata["image/png"]
        kept.append((base64.b64decode(thing["image/png"]), thing["text/plain"], about["width"]))
        assert about["alt"] == thing["text/plain"]

    monkeypatch.setattr(style, "display", display)
    style.set_style()
    return kept


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_is_drawn_described_and_small(name, pictures):
    draw, described = DRAWN[name]
    draw()
    [(data, alt, width)] = pictures
    picture = Image.open(io.BytesIO(data))
    assert described in alt
    assert picture.width // 2 == width and 100 < width < 1000 and len(data) < 60_000
    assert not figures.plt.get_fignums(), "the figure was left open"


def test_every_figure_of_the_notebooks_is_tried_here():
    names = {name for name in vars(figures) if callable(getattr(figures, name)) and name.islower()}
    drawing = {name for name in names if getattr(figures, name).__module__ == figures.__name__}
    helpers = {
        "draw_tokens",
        "draw_tree",
        "draw_mask",
        "draw_training",
        "lines_of",
        "rows_of",
        "listed",
        "visible_label",
    }
    shown = {draw.__name__ for draw, _ in DRAWN.values()} | {
        code for draw, _ in DRAWN.values() for code in draw.__code__.co_names
    }
    assert {name for name in drawing - helpers if not name.startswith("_")} <= shown


def test_long_lines_are_wrapped_and_line_ends_seen():
    pieces = ["ab"] * 6 + ["\n"] + ["c" * 30, "\td"]
    cells = figures._cells(pieces, 10)
    assert [cell[1:3] for cell in cells[:6]] == [(0, 0), (0, 2), (0, 4), (0, 6), (0, 8), (1, 0)]
    assert cells[6] == (6, 1, 2, "⏎") and cells[7][1:3] == (2, 0) and cells[8][1] == 3
    assert figures.lines_of(pieces, 10) == 4 and figures.lines_of([], 10) == 1


def test_no_two_nodes_of_a_tree_stand_on_each_other():
    tree = Tree.from_parents([-1, 0, 0, 1, 1, 2, 3, 3])
    places = list(zip(map(len, tree.paths), figures.rows_of(tree), strict=True))
    assert len(set(places)) == len(places)
    for node, children in enumerate(tree.children):
        if children:
            rows = [figures.rows_of(tree)[child] for child in children]
            assert min(rows) <= figures.rows_of(tree)[node] <= max(rows)


def test_colours_can_be_read():
    fills = [*style.HEADS, style.BASE, *style.TINTS, style.COPIED]
    for fill, color in [(fill, style.ink(fill)) for fill in fills] + [("#eeeeee", "#555555")]:
        lights = []
        for shade in (fill, color):
            parts = [int(shade[i : i + 2], 16) / 255 for i in (1, 3, 5)]
            linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
            lights.append(torch.dot(torch.tensor([0.2126, 0.7152, 0.0722]), torch.tensor(linear)).item())
        assert (max(lights) + 0.05) / (min(lights) + 0.05) >= 4.5, (fill, color)  # WCAG 2, level AA


def test_white_space_is_seen():
    assert style.visible(" a\n\tb") == "␣a⏎⇥b" and style.visible("") == "∅"
    assert figures.visible_label(" x 60%") == "␣x 60%" and figures.visible_label("x") == "x"


def test_groups_are_named_and_in_order():
    assert style.in_order([-1, 2, None, 0, 2]) == [None, 0, 2, -1]
    assert [style.drafted_by(group) for group in (None, 1, -1)] == ["base model", "head 1", "copied"]
