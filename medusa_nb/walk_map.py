"""The map of the walk: which notebook makes what, and who uses it."""

from pathlib import Path

import matplotlib.pyplot as plt

from medusa_nb.display import BASE_COLOR, HEAD_COLORS, ink, show

STATIONS = {  # number: (place, title, question)
    "01": ((0, 0), "01 set-up", "what does a\nwide pass cost?"),
    "02": ((1, 0), "02 self-distillation", "what does this\nmodel say?"),
    "03": ((2, 0), "03 head training", "what does a state\nknow of the future?"),
    "04": ((3, 0), "04 speedup", "guess a tree,\ncheck it in one pass"),
    "05": ((1, -1), "05 benchmark", "what is left\non the table?"),
    "06": ((2, -1), "06 your own model", "servers, torchrun,\na 7B recipe"),
    "07": ((3, -1), "07 export and serve", "heads that\nleave the house"),
}
ROADS = {  # from, to: what is handed on
    ("01", "02"): "frozen\nmodel",
    ("02", "03"): "answers",
    ("03", "04"): "heads,\nranks",
    ("04", "05"): "",
    ("04", "06"): "",
    ("04", "07"): "",
}
WIDTH, HEIGHT = 0.74, 0.62


def draw_map(axes, here: str | None = None) -> None:
    """The stations and roads on matplotlib axes; the station ``here`` stands out."""
    for (start, end), cargo in ROADS.items():
        (x0, y0), (x1, y1) = STATIONS[start][0], STATIONS[end][0]
        if y0 == y1:
            tail, head = (x0 + WIDTH / 2, y0), (x1 - WIDTH / 2, y1)
        else:
            tail, head = (x0, y0 - HEIGHT / 2), (x1, y1 + HEIGHT / 2)
        style = dict(arrowstyle="->", color=BASE_COLOR, lw=1.2, ls="-" if cargo else ":")
        axes.annotate("", head, tail, arrowprops=style)
        axes.text((tail[0] + head[0]) / 2, y0 + 0.06, cargo, ha="center", va="bottom", fontsize=8, color=BASE_COLOR)
    for number, ((x, y), title, question) in STATIONS.items():
        fill = HEAD_COLORS[1] if number == here else "#dcebf5" if y == 0 else "#f2f2f2"
        corner = (x - WIDTH / 2, y - HEIGHT / 2)
        axes.add_patch(plt.Rectangle(corner, WIDTH, HEIGHT, fc=fill, ec=BASE_COLOR, lw=1))
        color = ink(fill)
        axes.text(x, y + 0.2, title, ha="center", va="center", fontsize=9, weight="bold", color=color)
        axes.text(x, y - 0.07, question, ha="center", va="center", fontsize=8, color=color)
    axes.set_xlim(-0.4, 3.4)
    axes.set_ylim(-1.4, 0.4)
    axes.axis("off")


def plot_map(here: str | None = None) -> None:
    """The map as a figure of a notebook."""
    _, axes = plt.subplots(figsize=(10.5, 3.2))
    draw_map(axes, here)
    roads = "; ".join(f"{a} hands {cargo.replace(chr(10), ' ')} to {b}" for (a, b), cargo in ROADS.items() if cargo)
    show(f"Map of the walk. {roads}. 05, 06 and 07 build on what 04 ends with.")


def save_map(file: Path) -> None:
    """The map as a file, for pages that are not notebooks."""
    figure, axes = plt.subplots(figsize=(10.5, 3.2))
    draw_map(axes)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, bbox_inches="tight")
    plt.close(figure)
