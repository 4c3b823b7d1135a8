"""Figures and token views of the walk: static first, live only where somebody is watching."""

import html
from collections import Counter
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from IPython.display import HTML, Markdown, display

from medusa_nb.progress import is_headless
from medusa_nb.training import accuracy
from medusa_nb.tree import Tree

BASE_COLOR, BASELINE = "#4d4d4d", "#999999"
HEAD_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00")  # colour-blind safe (Okabe and Ito)
COPIED = "#dddddd"
OURS = ("own answers", "own batches, in process", "as in the walk")  # bars that stand out
TINTS = ("#cfe3f1", "#fbe7bf", "#c6e9dc", "#f3dbe7", "#f6d3bd")


def set_style() -> None:
    """One look for all figures."""
    plt.rcParams.update(
        {
            "figure.figsize": (5.2, 3.1),
            "figure.dpi": 100,
            "savefig.bbox": "tight",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e5e5e5",
            "axes.axisbelow": True,
            "font.size": 10,
            "axes.titlesize": 10,
            "legend.frameon": False,
        }
    )


def plot_latency(latency: dict[int, float], chosen: int | None = None) -> None:
    """t(n) in milliseconds against n, with the line it would follow if tokens were paid one by one."""
    widths, base = list(latency), latency[min(latency)]
    plt.plot(widths, [latency[n] * 1e3 for n in widths], "o-", color=HEAD_COLORS[0], label="measured t(n)")
    top = max(latency.values()) * 1e3 * 1.15
    plt.plot(widths, [base * n * 1e3 for n in widths], "--", color=BASELINE, label="n passes of one token")
    if chosen:
        plt.axvline(chosen, color=HEAD_COLORS[4], lw=1, label=f"chosen tree: {chosen}")
    plt.ylim(0, top)
    plt.xlabel("n, tokens in one forward pass")
    plt.ylabel("milliseconds")
    plt.legend()
    plt.show()


def token_view(pieces: list[str], groups: list[int | None], legend: dict[int, str]) -> None:
    """Tokens in a row, tinted by group (a number into the palette; None: no tint)."""
    spans = []
    for piece, group in zip(pieces, groups, strict=True):
        text = html.escape(piece).replace("\n", "⏎\n")
        spans.append(f'<span style="{tint_of(group)}border-right:1px solid #ddd;color:#222">{text}</span>')
    keys = " &nbsp; ".join(
        f'<span style="{tint_of(g)}color:#222;padding:0 .5em">{html.escape(name)}</span>' for g, name in legend.items()
    )
    body = "".join(spans)
    display(HTML(f'<div>{keys}</div><pre style="white-space:pre-wrap;line-height:1.6;background:#fff">{body}</pre>'))


def decoded_view(tokenizer, generation) -> None:
    """A generated text, each token tinted by who guessed it: head 0, 1, ..., an n-gram, or (plain) the base model."""
    pieces, groups = [], []
    for step in generation.steps:
        pieces += [tokenizer.decode([token]) for token in step.emitted]
        groups += step.guessed_by
    used = sorted({g for g in groups if g is not None}, key=lambda g: (g < 0, g))
    token_view(pieces, groups, {g: f"guessed by head {g}" if g >= 0 else "copied from the text" for g in used})


def tint_of(group: int | None) -> str:
    """The CSS of a token's background: by head, grey for copied tokens, none for the base model's own."""
    if group is None:
        return ""
    return f"background:{TINTS[group % len(TINTS)] if group >= 0 else COPIED};"


def plot_tree(tree: Tree, tokens: list[str] | None = None, path: list[int] | None = None, title: str = "") -> None:
    """The candidate tree, depth to the right; accepted nodes dark, rejected ones pale."""
    heights, next_row = {}, 0
    for node in _preorder(tree):
        if not tree.children[node]:
            heights[node], next_row = next_row, next_row + 1
    for node in reversed(_preorder(tree)):
        if tree.children[node]:
            heights[node] = sum(heights[c] for c in tree.children[node]) / len(tree.children[node])
    figure, axes = plt.subplots(figsize=(1.9 * (tree.depth + 1), max(1.6, 0.33 * next_row + 0.6)))
    accepted = set(path or [])
    for node, parent in enumerate(tree.parents):
        depth = len(tree.paths[node])
        color = BASE_COLOR if node == 0 else HEAD_COLORS[(depth - 1) % len(HEAD_COLORS)]
        strong = path is None or node in accepted
        if parent >= 0:
            axes.plot(
                [depth - 1, depth],
                [-heights[parent], -heights[node]],
                color=color if strong else "#dddddd",
                lw=1.5,
                zorder=1,
            )
        label = visible(tokens[node]) if tokens else (str(tree.paths[node]) if node else "root")
        axes.text(
            depth,
            -heights[node],
            label,
            ha="center",
            va="center",
            fontsize=8,
            family="monospace",
            color="white" if strong else "#777777",
            zorder=2,
            bbox=dict(boxstyle="round,pad=0.25", fc=color if strong else "#eeeeee", ec="none"),
        )
    axes.set_xlim(-0.5, tree.depth + 0.5)
    axes.set_ylim(-next_row + 0.4, 0.6)
    axes.axis("off")
    axes.set_title(title)
    plt.show()


def _preorder(tree: Tree) -> list[int]:
    order, stack = [], [0]
    while stack:
        node = stack.pop()
        order.append(node)
        stack.extend(reversed(tree.children[node]))
    return order


def visible(text: str) -> str:
    """A token with its spaces and line ends made visible."""
    return text.replace(" ", "␣").replace("\n", "⏎") or "∅"


def plot_mask(tree: Tree, labels: list[str]) -> None:
    """Which candidate (row) may look at which (column)."""
    _, axes = plt.subplots(figsize=(3.4, 3.2))
    axes.imshow(~tree.mask().numpy(), cmap="gray", vmin=-0.6, vmax=1)
    names = [f"{node}: {visible(label)}" for node, label in enumerate(labels)]
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("may be looked at")
    axes.set_ylabel("looks")
    axes.grid(False)
    plt.show()


def plot_training(log: list[dict], num_heads: int) -> None:
    """Loss of every head over the training steps."""
    for k in range(num_heads):
        points = [(r["step"], r[f"head{k}_loss"]) for r in log if f"head{k}_loss" in r]
        plt.plot(*zip(*points, strict=True), color=HEAD_COLORS[k], label=f"head {k}")
    plt.xlabel("training step")
    plt.ylabel("cross entropy (nats)")
    plt.ylim(bottom=0)
    plt.legend()
    plt.show()


def plot_accuracy(ranks: torch.Tensor, trivial: list[float], tops: tuple[int, ...] = (1, 2, 3, 5, 10)) -> None:
    """Per head: how often the true token is among its best n guesses; the trivial guess as a line."""
    for k, scores in enumerate(accuracy(ranks, tops)):
        plt.plot(tops, [scores[f"top{n}"] for n in tops], "o-", color=HEAD_COLORS[k], label=f"head {k}")
        plt.axhline(trivial[k], color=HEAD_COLORS[k], ls=":", lw=1)
    plt.xlabel("n, best guesses looked at")
    plt.ylabel("share right (held out)")
    plt.ylim(0, 1)
    plt.xticks(tops)
    plt.legend(title="dotted: trivial guess", fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    plt.show()


def plot_tokens_per_pass(counts: dict[str, list[int]]) -> None:
    """How many tokens the passes of each series emitted, as shares."""
    width = 0.8 / len(counts)
    for i, (name, values) in enumerate(counts.items()):
        tally = Counter(values)
        numbers = range(1, max(tally) + 1)
        mean = sum(values) / len(values)
        heights = [tally[n] / len(values) for n in numbers]
        plt.bar(
            [n + i * width for n in numbers],
            heights,
            width,
            color=HEAD_COLORS[i],
            label=f"{name}: {mean:.2f} on average",
        )
    plt.xticks(range(1, max(max(v) for v in counts.values()) + 1))
    plt.xlabel("tokens emitted by one pass")
    plt.ylabel("share of passes")
    plt.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    plt.show()


def plot_bars(values: dict[str, float], unit: str, baseline: float | None = None) -> None:
    """Labelled horizontal bars, with a line at the baseline."""
    plt.figure(figsize=(5.2, 0.45 * len(values) + 0.9))
    names = list(values)[::-1]
    bars = plt.barh(
        names,
        [values[n] for n in names],
        color=[HEAD_COLORS[0] if "Medusa" in n or n in OURS else BASELINE for n in names],
    )
    plt.bar_label(bars, fmt=" %.2f")
    if baseline is not None:
        plt.axvline(baseline, color=BASE_COLOR, lw=1)
    plt.xlim(0, max(values.values()) * 1.15)
    plt.xlabel(unit)
    plt.grid(axis="y", visible=False)
    plt.show()


def plot_parts(rows: dict[str, dict]) -> None:
    """Stacked bars of an average pass's milliseconds: verify and accept, draft, the rest."""
    names = list(rows)[::-1]
    left = [0.0] * len(names)
    plt.figure(figsize=(5.2, 0.45 * len(names) + 0.9))
    for i, (part, label) in enumerate(
        (("ms_verify_accept", "verify and accept"), ("ms_draft", "draft"), ("ms_rest", "the rest"))
    ):
        values = [max(0.0, rows[name][part]) for name in names]
        plt.barh(names, values, left=left, color=(*HEAD_COLORS[:2], BASELINE)[i], label=label)
        left = [a + b for a, b in zip(left, values, strict=True)]
    plt.xlabel("milliseconds per pass")
    plt.grid(axis="y", visible=False)
    plt.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=3, fontsize=9)
    plt.show()


def plot_candidates(candidates, tokenizer) -> None:
    """The first text's candidate tree as a draft made it, with its tokens."""
    plot_tree(
        Tree.from_parents(candidates.parents[0].tolist()),
        [tokenizer.decode([token]) for token in candidates.tokens[0].tolist()],
    )


def show_markdown(text: str) -> None:
    """Markdown, rendered where a front end does so."""
    display(Markdown(text))


def plot_lengths(lengths: list[int], limit: int) -> None:
    """Distribution of answer lengths, with the limit."""
    plt.hist(lengths, bins=range(0, limit + 9, 8), color=HEAD_COLORS[0])
    plt.axvline(limit, color=HEAD_COLORS[4], lw=1, label="limit")
    plt.xlabel("answer length (tokens)")
    plt.ylabel("answers")
    plt.legend()
    plt.show()


def conversation_html(row: dict) -> str:
    """A conversation as HTML: each turn in a box, with how the answer ended."""
    boxes = []
    for message in row["messages"]:
        tint = TINTS[0] if message["role"] == "assistant" else "#f5f5f5"
        boxes.append(
            f'<pre style="white-space:pre-wrap;background:{tint};color:#222;padding:.4em;margin:0">'
            f"{html.escape(message['content'])}</pre>"
        )
    end = row.get("finish_reason", "")
    note = f"{html.escape(row['id'])} · ended by {end}{' · repetition loop' if row.get('loop') else ''}"
    return f"<div><small>{note}</small>{''.join(boxes)}</div>"


def browse(rows: list, render: Callable[[object], str] = conversation_html, shown: int = 1) -> None:
    """Leaf through rows with a slider; the first ``shown`` as a static view where no front end answers."""
    for row in rows[:shown]:
        display(HTML(render(row)))
    if is_headless() or len(rows) <= shown:
        return
    import ipywidgets

    slider = ipywidgets.IntSlider(min=1, max=len(rows), description="answer", continuous_update=False)
    view = ipywidgets.HTML(render(rows[0]))
    slider.observe(lambda change: setattr(view, "value", render(rows[change["new"] - 1])), names="value")
    display(ipywidgets.VBox([slider, view]))
