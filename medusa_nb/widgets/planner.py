"""The planner: from how often heads are right and what a wide pass costs to the speedup to expect."""

from collections import Counter

import matplotlib.pyplot as plt
from IPython.display import display

from medusa_nb.tree import build_tree, expected_tokens
from medusa_nb.widgets.live import watched
from medusa_nb.widgets.style import BASE, HEADS, MUTED, OURS, png, show


def planned(counts: Counter, latency: dict[int, float], draft: float, flatness: float = 1.0) -> dict[int, float]:
    """Expected speedup over plain decoding by tree size: tokens(n) t(1) / (t(n) + draft).

    Args:
        counts: rank counts of the heads, see :func:`medusa_nb.tree.count_ranks`.
        latency: measured t(n) in seconds by n, of the loop that will be used.
        draft: seconds that drafting adds to a step.
        flatness: what t(n) costs above t(1), times this: 0 is a machine on which width is free.
    """
    base = latency[min(latency)]
    speedups = {}
    for n, seconds in latency.items():
        cost = base + flatness * (seconds - base) + (draft if n > 1 else 0.0)
        speedups[n] = expected_tokens(build_tree(counts, n), counts) * base / cost
    return speedups


def draw_plan(axes, curve: dict[int, float], size: int) -> None:
    """Expected speedup against tree size; the best size and the chosen one are marked."""
    best = max(curve, key=lambda n: curve[n])
    axes.plot(list(curve), list(curve.values()), "o-", ms=3.5, color=OURS)
    axes.plot([best], [curve[best]], "o", ms=9, mfc="none", mec=HEADS[4], mew=1.6)
    axes.annotate(f"best: {best} nodes, {curve[best]:.2f} ×", (best, curve[best]), xytext=(4, 8),
                  textcoords="offset points", color=HEADS[4], fontsize=8.5)  # fmt: skip
    if size != best:
        axes.plot([size], [curve[size]], "s", ms=6, color=HEADS[1])
        chosen = f"{curve[size]:.2f} ×"
        axes.annotate(chosen, (size, curve[size]), xytext=(4, -12), textcoords="offset points", fontsize=8.5)
    axes.axhline(1, color=MUTED, lw=1, ls="--")
    axes.annotate("no gain", (max(curve), 1), ha="right", va="bottom", color=BASE, fontsize=8)
    axes.set(xlabel="nodes in the tree", ylabel="expected speedup", ylim=(0, max(curve.values()) * 1.25))


def planner(counts: Counter, latency: dict[int, float], draft: float, size: int = 16) -> dict[int, float]:
    """Sliders for the tree size and for how flat t(n) is, set to what was measured here at first."""
    curve = planned(counts, latency, draft)
    if not watched():
        figure, axes = plt.subplots()
        draw_plan(axes, curve, max(curve, key=lambda n: curve[n]))
        show(figure, "Expected speedup by nodes: " + ", ".join(f"{n}: {v:.2f}" for n, v in curve.items()))
        return curve
    import ipywidgets

    wide = dict(style={"description_width": "18em"}, layout={"width": "40em"})
    nodes = ipywidgets.SelectionSlider(options=list(latency), value=size, description="nodes in the tree", **wide)
    slope = ipywidgets.FloatSlider(value=1, max=8, description="cost of width, 1 = as measured", **wide)
    figure, axes = plt.subplots()
    plt.close(figure)
    image, words = ipywidgets.Image(format="png", layout={"max_width": "560px"}), ipywidgets.HTML()

    def move(*_) -> None:
        axes.clear()
        now = planned(counts, latency, draft, slope.value)
        draw_plan(axes, now, nodes.value)
        image.value = png(figure)
        tokens = expected_tokens(build_tree(counts, nodes.value), counts)
        shown = f"{nodes.value} node{'s' if nodes.value > 1 else ''}"
        words.value = f"{shown}: {tokens:.2f} tokens per pass, {now[nodes.value]:.2f} times as fast"

    for slider in (nodes, slope):
        slider.observe(move, names="value")
    move()
    display(ipywidgets.VBox([nodes, slope, words, image]))
    return curve
