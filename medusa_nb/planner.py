"""The planner: from the accuracy of heads and the price of a wide pass to the speedup to expect."""

import heapq
from collections import Counter

import matplotlib.pyplot as plt
from IPython.display import display

from medusa_nb.display import BASELINE, HEAD_COLORS, png_of, show
from medusa_nb.progress import is_headless
from medusa_nb.tree import build_tree, expected_tokens

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def planned_tokens(accuracy: float, decay: float, size: int, heads: int = 4, branch: int = 10) -> float:
    """Tokens per pass of the best tree of ``size`` nodes, for heads of a simple kind.

    Head k's best guess is right with probability ``accuracy * decay**k``; each further guess is right with that
    same probability among the cases the ones before it missed. Heads err independently of each other.
    """
    chances = [[a * (1 - a) ** rank for rank in range(branch)] for a in (accuracy * decay**k for k in range(heads))]
    total, grown = 1.0, 1
    frontier = [(-chances[0][0], 1.0, 0, 0)]  # worth of the node, worth of its parent, depth, rank
    while frontier and grown < size:
        worth, parent, depth, rank = heapq.heappop(frontier)
        total, grown = total - worth, grown + 1
        if rank + 1 < branch:
            heapq.heappush(frontier, (-parent * chances[depth][rank + 1], parent, depth, rank + 1))
        if depth + 1 < heads:
            heapq.heappush(frontier, (worth * chances[depth + 1][0], -worth, depth + 1, 0))
    return total


def draw_plan(axes, accuracy: float, decay: float, size: int, cost: float, counts: Counter, latency: dict) -> float:
    """Expected speedup against tree size: as planned, and as counted and timed here; returns the planned one.

    Args:
        cost: what one more node adds to a pass, in passes of a single token.
        counts: rank counts of real heads, see :func:`medusa_nb.tree.count_ranks`.
        latency: measured t(n) in seconds by n.
    """
    planned = [planned_tokens(accuracy, decay, n) / (1 + cost * (n - 1)) for n in WIDTHS]
    here = planned_tokens(accuracy, decay, size) / (1 + cost * (size - 1))
    measured = {n: expected_tokens(build_tree(counts, n), counts) * latency[1] / latency[n] for n in latency}
    best = max(measured, key=measured.get)
    axes.plot(WIDTHS, planned, color=HEAD_COLORS[1], label="planned")
    axes.plot([size], [here], "o", color=HEAD_COLORS[1], ms=9)
    axes.plot(
        *zip(*measured.items(), strict=True), "s--", color=HEAD_COLORS[0], ms=4, label="these heads, this machine"
    )
    axes.plot([best], [measured[best]], "*", color=HEAD_COLORS[0], ms=14)
    axes.axhline(1, color=BASELINE, lw=1)
    axes.annotate("break-even", (WIDTHS[-1], 1), ha="right", va="bottom", color="#555555", fontsize=9)
    axes.annotate(f"{here:.2f} ×", (size, here), xytext=(6, 6), textcoords="offset points", fontsize=9)
    axes.set_xlabel("nodes in the tree")
    axes.set_ylabel("expected speedup over plain decoding")
    axes.set_ylim(0, max(3.0, *planned, *measured.values()) * 1.1)
    axes.legend(fontsize=8, loc="upper left", ncols=2)
    return here


def break_even_cost(accuracy: float, decay: float, size: int) -> float:
    """The price of a node, in passes of a single token, at which a tree of ``size`` nodes gains nothing."""
    return (planned_tokens(accuracy, decay, size) - 1) / (size - 1)


def planner(counts: Counter, latency: dict[int, float]) -> None:
    """Sliders for accuracy, tree size and the price of a node, set to what was measured here at first."""
    top = counts[(0,)] / counts[()]
    second = counts[(0, 0)] / counts[(0,)] if counts[(0,)] else top
    widest = max(latency)
    cost = max(0.0, (latency[widest] / latency[1] - 1) / (widest - 1))
    start = dict(accuracy=round(top, 2), decay=round(min(1.0, second / top if top else 1.0), 2), cost=round(cost, 2))
    sizes = [n for n in WIDTHS if n > 1]
    if is_headless():
        _, axes = plt.subplots(figsize=(6, 3.4))
        here = draw_plan(axes, **start, size=8, counts=counts, latency=latency)
        show(f"Expected speedup against tree size; with 8 nodes {here:.2f} as planned. Above the line 1 guessing pays.")
        return
    import ipywidgets

    wide = dict(style={"description_width": "15em"}, layout={"width": "36em"})
    sliders = dict(
        accuracy=ipywidgets.FloatSlider(
            value=start["accuracy"], min=0.05, max=0.95, step=0.01, description="head 0 right", **wide
        ),
        decay=ipywidgets.FloatSlider(
            value=start["decay"], min=0.3, max=1, step=0.01, description="each next head, times", **wide
        ),
        size=ipywidgets.SelectionSlider(options=sizes, value=8, description="nodes in the tree", **wide),
        cost=ipywidgets.FloatSlider(
            value=start["cost"], min=0, max=1, step=0.01, description="price of one more node, t(1)", **wide
        ),
    )
    figure, axes = plt.subplots(figsize=(6, 3.4))
    plt.close(figure)
    image, words = ipywidgets.Image(format="png", layout={"max_width": "600px"}), ipywidgets.HTML()

    def move(*_) -> None:
        values = {name: slider.value for name, slider in sliders.items()}
        axes.clear()
        here = draw_plan(axes, **values, counts=counts, latency=latency)
        image.value = png_of(figure)
        tokens = planned_tokens(values["accuracy"], values["decay"], values["size"])
        limit = break_even_cost(values["accuracy"], values["decay"], values["size"])
        words.value = (
            f"{tokens:.2f} tokens per pass for the price of {1 + values['cost'] * (values['size'] - 1):.2f} passes: "
            f"<b>{here:.2f} ×</b>. This tree pays as long as a node costs less than {limit:.2f} t(1)."
        )

    for slider in sliders.values():
        slider.observe(move, names="value")
    move()
    display(ipywidgets.VBox([*sliders.values(), words, image]))
