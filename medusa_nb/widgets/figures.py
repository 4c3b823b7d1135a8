"""The figures of the walk. Each shows one thing and takes plain numbers."""

import statistics
from typing import Any

import matplotlib.pyplot as plt
import pandas
import torch
from matplotlib.patches import FancyBboxPatch, Rectangle

from medusa_nb.tree import Tree
from medusa_nb.widgets.style import BASE, HEADS, MUTED, OURS, drafted_by, in_order, ink, show, tint, visible

MONO: dict[str, Any] = dict(family="monospace")
CHARACTER = 0.0724  # inches: the width of a monospaced character at 8.65 points


def tokens(pieces: list[str], groups: list[int | None], names: dict | None = None, width: int = 84) -> None:
    """Tokens in a row, monospaced, tinted by group (a head's number, -1 for copied, None for no tint)."""
    figure, axes = draw_tokens(pieces, groups, width)
    left = 0
    for group in in_order(groups):
        name = (names or {}).get(group, drafted_by(group))
        axes.add_patch(Rectangle((left, -1.4), len(name) + 1, 0.9, fc=tint(group), ec="#cccccc", lw=0.6))
        axes.text(left + 0.5, -0.95, name, va="center", fontsize=8, color="#222222")
        left += len(name) + 3
    pairs = zip(pieces, groups, strict=True)
    show(figure, "".join(piece if group is None else f"[{piece}]" for piece, group in pairs))


def draw_tokens(pieces: list[str], groups: list[int | None], width: int, lines: int | None = None) -> tuple:
    """Figure and axes of :func:`tokens` without its legend, with room for so many ``lines``."""
    cells = _cells(pieces, width)
    lines = lines or lines_of(pieces, width)
    figure = plt.figure(figsize=(width * CHARACTER, 0.19 * (lines + 1.8)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(lines + 0.3, -1.5))
    axes.axis("off")
    for token, line, left, text in cells:
        axes.add_patch(Rectangle((left, line - 0.45), len(text), 0.9, fc=tint(groups[token]), ec="#ffffff", lw=0.8))
        color = "#aaaaaa" if text == "⏎" else "#222222"
        axes.text(left, line, text, va="center", fontsize=8.65, color=color, **MONO)
    return figure, axes


def _cells(pieces: list[str], width: int) -> list[tuple[int, int, int, str]]:
    """Where each token's text stands in lines of ``width`` characters: token number, line, column, text."""
    cells, line, column = [], 0, 0
    for token, piece in enumerate(pieces):
        for i, part in enumerate(piece.replace("\t", "    ").split("\n")):
            if i:
                cells.append((token, line, column, "⏎"))
                line, column = line + 1, 0
            if column and column + len(part) > width:
                line, column = line + 1, 0
            if part:
                cells.append((token, line, column, part))
            column += len(part)
    return cells


def lines_of(pieces: list[str], width: int) -> int:
    """How many lines tokens take."""
    return 1 + max((line for _, line, _, _ in _cells(pieces, width)), default=0)


def timeline() -> None:
    """Plain decoding against speculative decoding: passes along a time axis, tokens above them."""
    figure, axes = plt.subplots(figsize=(6.4, 2.1))
    words = ["def", "write", "_", "json", "(", "path", ",", "data", ")"]
    for i, word in enumerate(words):
        axes.add_patch(Rectangle((i, 1.25), 0.94, 0.5, fc="#e6e6e6", ec=BASE, lw=0.8))
        axes.text(i + 0.47, 1.5, word, ha="center", va="center", fontsize=8, **MONO)
    for i in range(3):
        axes.add_patch(Rectangle((1.18 * i, 0.0), 1.12, 0.8, fc="#cfe3f1", ec=OURS, lw=0.8))
        part = "\n".join(words[3 * i : 3 * i + 3])
        axes.text(1.18 * i + 0.56, 0.4, part, ha="center", va="center", fontsize=6.8, **MONO)
    axes.text(-0.15, 1.5, "plain", ha="right", va="center")
    axes.text(-0.15, 0.4, "speculative", ha="right", va="center")
    axes.annotate("", (9.3, -0.15), (0, -0.15), arrowprops=dict(arrowstyle="->", color=BASE))
    axes.text(9.3, -0.38, "time: one box is one pass over all weights", ha="right", va="center", fontsize=8, color=BASE)
    axes.set(xlim=(-1.6, 9.5), ylim=(-0.6, 2))
    axes.axis("off")
    show(figure, "Plain decoding: one pass for each of nine tokens. Speculative: three wider passes of three tokens.")


def trunk_and_heads(num_heads: int = 4) -> None:
    """Medusa: the frozen trunk gives a hidden state; lm_head and K heads read it."""
    figure, axes = plt.subplots(figsize=(5.6, 2.9))
    centre = num_heads / 2

    def box(x, y, text, color, width=0.86):
        frame = dict(boxstyle="round,pad=0.02", fc=color, ec=BASE)
        axes.add_patch(FancyBboxPatch((x - width / 2, y - 0.2), width, 0.4, **frame))
        axes.text(x, y, text, ha="center", va="center", fontsize=8.5, color=ink(color))

    box(centre, 0, "… the text up to token t", "#f2f2f2", 2.6)
    box(centre, 0.8, "base model, frozen", "#d9d9d9", 2.6)
    box(centre, 1.6, "hidden state of t", "#ffffff", 1.9)
    for i in range(num_heads + 1):
        color = BASE if i == 0 else HEADS[i - 1]
        axes.annotate("", (i, 2.35), (centre, 1.84), arrowprops=dict(arrowstyle="->", color=color))
        box(i, 2.6, "lm_head" if i == 0 else f"head {i - 1}", color)
        axes.text(i, 3.05, f"t+{i + 1}", ha="center", fontsize=9, color=color, weight="bold")
    for y in (0.24, 1.04):
        axes.annotate("", (centre, y + 0.32), (centre, y), arrowprops=dict(arrowstyle="->", color=BASE))
    axes.text(0, 3.38, "certain", ha="center", fontsize=8, color=BASE)
    axes.text((num_heads + 1) / 2, 3.38, "draft tokens", ha="center", fontsize=8, color=BASE)
    axes.set(xlim=(-0.6, num_heads + 0.6), ylim=(-0.3, 3.6))
    axes.axis("off")
    show(figure, f"The base model turns the text into a hidden state; lm_head gives t+1, {num_heads} heads t+2 on.")


def label_grid(pieces: list[str], num_heads: int = 3) -> None:
    """Which token each head must predict at each position: the sequence, shifted once more for every head."""
    rows = ["input", "lm_head", *(f"head {k}" for k in range(num_heads))]
    figure, axes = plt.subplots(figsize=(0.86 * len(pieces) + 0.9, 0.36 * len(rows) + 0.5))
    for row, name in enumerate(rows):
        color = "#f2f2f2" if row == 0 else "#e0e0e0" if row == 1 else tint(row - 2)
        axes.text(-0.1, row, name, ha="right", va="center", fontsize=8.5)
        for t in range(len(pieces)):
            there = t + row < len(pieces)
            word = visible(pieces[t + row]) if there else "·"
            axes.add_patch(Rectangle((t, row - 0.42), 0.96, 0.84, fc=color if there else "#ffffff", ec="#dddddd"))
            axes.text(t + 0.48, row, word, ha="center", va="center", fontsize=8, **MONO)
    for t in range(len(pieces)):
        axes.text(t + 0.48, -0.75, f"t={t}", ha="center", fontsize=7.5, color=MUTED)
    axes.set(xlim=(-1.1, len(pieces)), ylim=(len(rows) - 0.4, -1))
    axes.axis("off")
    show(figure, f"Label grid: the row of head k is the input shifted by k + 2 places, for {num_heads} heads")


def rows_of(tree: Tree) -> list[float]:
    """The row of every node: leaves one below the other, a parent in the middle of its children."""
    order, stack = [], [0]
    while stack:
        order.append(stack.pop())
        stack.extend(reversed(tree.children[order[-1]]))
    rows, leaves = [0.0] * len(tree), 0
    for node in order:
        if not tree.children[node]:
            rows[node], leaves = float(leaves), leaves + 1
    for node in reversed(order):
        if tree.children[node]:
            rows[node] = sum(rows[child] for child in tree.children[node]) / len(tree.children[node])
    return rows


def tree(parents: list[int], labels: list[str], accepted: list[int] | None = None, bonus: str = "") -> None:
    """A candidate tree with a column for each head, and beside it the mask its pass uses.

    Args:
        parents: the number of each node's parent; the root's entry is ignored.
        labels: what stands in each node.
        accepted: numbers of the accepted nodes; all others are pale.
        bonus: the token the base model says after the accepted path, the "+1".
    """
    tree, labels, bonus = (
        Tree.from_parents(parents),
        [visible_label(label) for label in labels],
        bonus and visible(bonus),
    )
    height = max(2.0, 0.27 * (max(rows_of(tree)) + (3.2 if bonus else 2.2)))
    left, right = 1.25 * (tree.depth + 1) + (0.6 if bonus else 0), 0.21 * len(tree) + 1.3
    figure, panels = plt.subplots(1, 2, figsize=(min(9.6, left + right), height), width_ratios=(left, right))
    draw_tree(panels[0], tree, labels, accepted, bonus)
    draw_mask(panels[1], tree, labels)
    figure.tight_layout()
    kept = f"; accepted: {' '.join(labels[n] for n in accepted)} + {bonus}" if accepted else ""
    show(figure, f"Candidate tree of {len(tree)} nodes, {tree.depth} deep: {' | '.join(labels)}{kept}")


def visible_label(label: str) -> str:
    """A token with its probability behind it, the token's white space made visible."""
    token, _, chance = label.rpartition(" ") if label.endswith("%") else (label, "", "")
    return f"{visible(token)} {chance}".strip()


def draw_tree(axes, tree: Tree, labels: list[str], accepted: list[int] | None = None, bonus: str = "") -> None:
    """The tree on matplotlib axes, depth to the right; the "+1" hangs at the accepted path like one more node."""
    if bonus and accepted:
        labels, drawn = [*labels, f"+1 {bonus}"], Tree.from_parents([*tree.parents, accepted[-1]])
    else:
        drawn = tree
    rows = rows_of(drawn)
    for node, parent in enumerate(drawn.parents):
        depth, kept = len(drawn.paths[node]), accepted is None or node in accepted
        fill, edge = (HEADS[(depth - 1) % len(HEADS)] if depth else BASE) if kept else "#eeeeee", "none"
        if node == len(tree):
            kept, fill, edge = True, "#ffffff", BASE
        if parent >= 0:
            line = BASE if node == len(tree) else fill if kept else "#dddddd"
            axes.plot([depth - 1, depth], [-rows[parent], -rows[node]], color=line, lw=1.4, zorder=1)
        box = dict(boxstyle="round,pad=0.22", fc=fill, ec=edge)
        axes.text(depth, -rows[node], labels[node], color=ink(fill) if kept else "#666666", bbox=box, ha="center",
                  va="center", fontsize=7.6, zorder=2, **MONO)  # fmt: skip
    for depth in range(tree.depth + 1):
        axes.text(depth, 1.0, "root" if depth == 0 else f"head {depth - 1}", ha="center", fontsize=8, color=BASE)
    axes.set(xlim=(-0.5, drawn.depth + 0.5), ylim=(-max(rows) - 0.6, 1.4))
    axes.axis("off")


def draw_mask(axes, tree: Tree, labels: list[str]) -> None:
    """Which candidate (row) sees which columns: the whole prompt, and its own path. Positions stand on the right."""
    size = len(tree)
    seen = torch.ones(size, size + 2)
    seen[:, 2:] = tree.mask().float()
    for row in range(size):
        for column in range(size + 2):
            if column != 1:
                color = "#4d4d4d" if seen[row, column] else "#f4f4f4"
                axes.add_patch(Rectangle((column, row), 1, 1, fc=color, ec="#ffffff", lw=0.8))
        axes.text(-0.2, row + 0.5, labels[row].split()[0], ha="right", va="center", fontsize=6.8, **MONO)
        axes.text(size + 2.3, row + 0.5, f"t+{len(tree.paths[row])}", va="center", fontsize=6.8, color=MUTED)
    axes.text(0.5, -0.3, "prompt", rotation=60, fontsize=7, va="bottom")
    axes.text(2 + size / 2, -0.4, "candidates", ha="center", fontsize=7)
    axes.text(size + 2.3, -0.4, "position", fontsize=7, color=MUTED)
    axes.set(xlim=(-3.6, size + 5), ylim=(size + 0.2, -2.4), aspect="equal")
    axes.axis("off")


def listed(values: dict, scale: float = 1) -> str:
    """Numbers with their names, for descriptions."""
    return ", ".join(f"{name} {value * scale:.2f}" for name, value in values.items())


def latency(curves: dict[str, dict[int, float]], read: float | None = None) -> None:
    """t(n) in milliseconds for one or several loops, with the time of reading all weights once as a line."""
    figure, axes = plt.subplots()
    most = max(max(curve) for curve in curves.values())
    for color, (name, seconds) in zip((MUTED, OURS, HEADS[4]), curves.items(), strict=False):
        times = [value * 1e3 for value in seconds.values()]
        axes.plot(list(seconds), times, "o-", ms=3.5, color=color)
        axes.annotate(f" {name}", (max(seconds), times[-1]), color=color, va="center")
    if read:
        axes.axhline(read * 1e3, color=HEADS[2], lw=1.2, ls="--")
        axes.text(1, read * 1e3, "reading all weights once", va="bottom", color=HEADS[2], fontsize=8.5)
    axes.set(xlabel="n, tokens in one pass", ylabel="milliseconds", ylim=(0, None), xlim=(0, most * 1.22))
    written = "; ".join(f"{name}: {listed(seconds, 1e3)}" for name, seconds in curves.items())
    weights = f"; reading all weights {read * 1e3:.2f}" if read else ""
    show(figure, f"Milliseconds of a pass over n tokens. {written}{weights}")


def lengths(counts: list[int], limit: int) -> None:
    """How long answers are, with the median and the limit."""
    figure, axes = plt.subplots()
    axes.hist(counts, bins=range(0, limit + 8, 8), color=OURS)
    median = statistics.median_high(counts)
    axes.axvline(median, color=HEADS[4], lw=1.2)
    axes.annotate(f" median {median}", (median, axes.get_ylim()[1] * 0.95), color=HEADS[4])
    axes.set(xlabel="answer length (tokens)", ylabel="answers", xlim=(0, limit + 8))
    show(figure, f"{len(counts)} answers of at most {limit} tokens, median {median}")


def training(log: list[dict], num_heads: int, uniform: float | None = None) -> None:
    """Loss and top-1 of every head over the training steps; ``uniform`` is the loss of guessing blindly, ln V."""
    figure = plt.figure(figsize=(7.6, 2.7))
    draw_training(figure, log, num_heads, uniform)
    last = [record for record in log if "head0_loss" in record][-1:]
    ends = ", ".join(f"head {k} {r[f'head{k}_loss']:.2f}" for r in last for k in range(num_heads))
    show(figure, f"Loss and top-1 of each head over the training steps; the loss ends at {ends}")


def draw_training(figure, log: list[dict], num_heads: int, uniform: float | None = None) -> None:
    """The same on a figure that is already there."""
    panels = figure.subplots(1, 2)
    labels = dict(loss="cross entropy (nats)", top1="top-1 on training batches")
    for axes, (name, label) in zip(panels, labels.items(), strict=True):
        ends = []
        for k in range(num_heads):
            points = {r["step"]: r[f"head{k}_{name}"] for r in log if f"head{k}_{name}" in r}
            smooth = pandas.Series(points, dtype=float).rolling(7, min_periods=1).mean()
            axes.plot(smooth, color=HEADS[k % len(HEADS)], lw=1.6)
            ends += [(value, step, k) for step, value in smooth[-1:].items()]
        axes.set(xlabel="training step", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.set_xlim(right=axes.get_xlim()[1] * 1.16)
        free, apart = 0.0, 0.06 * axes.get_ylim()[1]
        for value, step, k in sorted(ends):  # labels of neighbouring lines must not cover each other
            free = max(free, value) + apart
            axes.annotate(f" head {k}", (step, free - apart), color=HEADS[k % len(HEADS)], fontsize=8, va="center")
    if uniform and log:
        panels[0].axhline(uniform, color=MUTED, ls="--", lw=1)
        panels[0].text(
            panels[0].get_xlim()[1], uniform, "uniform: ln V", ha="right", va="bottom", color="#777777", fontsize=8
        )
    figure.tight_layout()


def grouped(
    groups: dict[str, dict[str, float]], ylabel: str, baseline: float | None = None, errors: dict | None = None
) -> None:
    """Bars in groups: for each group a bar for every series, labelled with its number.

    ``errors``: for a group and series the interval ``(low, high)``.
    """
    names = list(next(iter(groups.values())))
    figure, axes = plt.subplots(figsize=(max(3.6, 1.1 + 0.62 * len(groups) * len(names)), 2.9))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        color = (MUTED, OURS, HEADS[4], HEADS[2], HEADS[1])[i]
        for place, (group, values) in enumerate(groups.items()):
            if name not in values:
                continue
            at, value = place + i * width, values[name]
            interval = (errors or {}).get(group, {}).get(name, ())
            axes.bar(at, value, width * 0.92, color=color, label="" if place else name)
            axes.plot([at] * len(interval), interval, color="#222222", lw=1)
            axes.text(at, max(value, *interval, 0), f"{value:.2f}", ha="center", va="bottom", fontsize=8)
    if baseline is not None:
        axes.axhline(baseline, color=BASE, lw=1, ls="--")
    axes.set_xticks([g + 0.4 - width / 2 for g in range(len(groups))], list(groups))
    axes.set_ylabel(ylabel)
    axes.grid(axis="x", visible=False)
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.02), ncols=len(names))
    show(figure, f"{ylabel}. " + "; ".join(f"{group}: {listed(values)}" for group, values in groups.items()))


def ladder(values: dict[str, float], unit: str, errors: dict | None = None) -> None:
    """Labelled horizontal bars, one idea after the other, what each adds in a darker shade."""
    figure, axes = plt.subplots(figsize=(5.6, 0.36 * len(values) + 0.7))
    before = next(iter(values.values()))
    for row, (name, value) in enumerate(values.items()):
        gain, interval = max(0.0, value - before), (errors or {}).get(name, ())
        axes.barh(row, value, 0.62, color="#cfe3f1")
        axes.barh(row, gain, 0.62, left=value - gain, color=OURS)
        axes.plot(interval, [row] * len(interval), color="#222222", lw=1)
        axes.text(max(value, *interval, 0), row, f"  {value:.2f}", va="center", fontsize=8.5)
        before = value
    axes.set_yticks(range(len(values)), list(values))
    axes.set(xlabel=unit, ylim=(len(values) - 0.5, -0.5), xlim=(0, max(values.values()) * 1.15))
    axes.grid(axis="y", visible=False)
    show(figure, f"{unit}: {listed(values)}")


def curve(points: dict[float, float], xlabel: str, ylabel: str, errors: dict | None = None, log: bool = False) -> None:
    """One curve through measured points, each labelled."""
    figure, axes = plt.subplots()
    axes.plot(list(points), list(points.values()), "o-", color=OURS, ms=4)
    for x, y in points.items():
        interval = (errors or {}).get(x, ())
        axes.plot([x] * len(interval), interval, color=OURS, lw=1)
        axes.annotate(f"{y:.2f}", (x, y), xytext=(7, -9), textcoords="offset points", fontsize=8)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if log:
        axes.set_xscale("log")
        axes.set_xticks(list(points), [f"{x:,.0f}" for x in points])
        axes.minorticks_off()
    axes.margins(y=0.18)
    show(figure, f"{ylabel} by {xlabel}: {listed(points)}")
