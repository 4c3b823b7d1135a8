"""Figures and token views of the walk: static first, live only where somebody is watching."""

import base64
import html
import io
from collections import Counter
from collections.abc import Collection

import matplotlib.pyplot as plt
import torch
from IPython.display import HTML, Markdown, display
from PIL import Image

from medusa_nb.training import accuracy

BASE_COLOR, BASELINE = "#4d4d4d", "#999999"
HEAD_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00")  # colour-blind safe (Okabe and Ito)
COPIED = "#dddddd"
TINTS = ("#cfe3f1", "#fbe7bf", "#c6e9dc", "#f3dbe7", "#f6d3bd")


def png_of(figure) -> bytes:
    """A matplotlib figure as the bytes of a PNG, for outputs and image widgets."""
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def show(alt: str) -> None:
    """Show the current matplotlib figure, described by ``alt`` for those who cannot see it."""
    drawn, small = io.BytesIO(png_of(plt.gcf())), io.BytesIO()
    plt.close()
    Image.open(drawn).convert("RGB").quantize(128).save(small, "png", optimize=True)  # about half the size
    picture = {"image/png": base64.b64encode(small.getvalue()).decode(), "text/plain": alt}
    display(picture, raw=True, metadata={"image/png": {"alt": alt}})


def ink(fill: str) -> str:
    """Black or white, whichever stands out more on a colour ``#rrggbb`` (contrast as WCAG 2 defines it)."""
    parts = [int(fill[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#ffffff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#000000"


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
    show("t(n) in milliseconds: " + ", ".join(f"{n}: {t * 1e3:.1f}" for n, t in latency.items()))


def token_view(pieces: list[str], groups: list[int | None], legend: dict[int | None, str]) -> None:
    """Tokens in a row, tinted by group (a number into the palette; None: no tint)."""
    spans = []
    for piece, group in zip(pieces, groups, strict=True):
        text = html.escape(piece).replace("\n", "⏎\n")
        spans.append(f'<span style="{tint_of(group)}border-right:1px solid #ddd;color:#222">{text}</span>')
    body = "".join(spans)
    display(
        HTML(f'{legend_html(legend)}<pre style="white-space:pre-wrap;line-height:1.6;background:#fff">{body}</pre>')
    )


def decoded_view(tokenizer, generation) -> None:
    """A generated text, each token tinted by who guessed it: head 0, 1, ..., an n-gram, or (plain) the base model."""
    pieces, groups = [], []
    for step in generation.steps:
        pieces += [tokenizer.decode([token]) for token in step.emitted]
        groups += step.guessed_by
    token_view(pieces, groups, {g: guesser(g) for g in in_order(groups)})


def guesser(group: int | None) -> str:
    """Who guessed a token, by its number in ``guessed_by``."""
    if group is None:
        return "said by the base model"
    return f"guessed by head {group}" if group >= 0 else "copied from the text"


def in_order(groups) -> list[int | None]:
    """Each group once: the base model, the heads, n-grams."""
    return sorted(set(groups), key=lambda g: (g is not None, g is not None and g < 0, g or 0))


def legend_html(groups: dict[int | None, str]) -> str:
    """What the tints of tokens mean, in one line."""
    keys = (
        f'<span style="{tint_of(g)}color:#222;padding:0 .5em;border:1px solid #ddd">{html.escape(name)}</span>'
        for g, name in groups.items()
    )
    return f"<div>{' '.join(keys)}</div>"


def tint_of(group: int | None) -> str:
    """The CSS of a token's background: by head, grey for copied tokens, none for the base model's own."""
    if group is None:
        return ""
    return f"background:{TINTS[group % len(TINTS)] if group >= 0 else COPIED};"


def visible(text: str) -> str:
    """A token with its spaces and line ends made visible."""
    return text.replace(" ", "␣").replace("\n", "⏎") or "∅"


def draw_training(figure, log: list[dict], num_heads: int) -> None:
    """Loss and top-1 of every head over the training steps, side by side, on a matplotlib figure."""
    left, right = figure.subplots(1, 2)
    for axes, name, label in ((left, "loss", "cross entropy (nats)"), (right, "top1", "top-1 on training batches")):
        for k in range(num_heads):
            points = [(r["step"], r[f"head{k}_{name}"]) for r in log if f"head{k}_{name}" in r]
            if points:
                style = dict(color=HEAD_COLORS[k % len(HEAD_COLORS)], marker="o" if len(points) < 3 else "")
                axes.plot(*zip(*points, strict=True), label=f"head {k}", **style)
        axes.set_xlabel("training step")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    if log:
        right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()


def plot_training(log: list[dict], num_heads: int) -> None:
    """Loss and top-1 of every head over the training steps."""
    draw_training(plt.figure(figsize=(8, 2.8)), log, num_heads)
    last = [r for r in log if "head0_loss" in r][-1:]
    ends = ", ".join(f"head {k} {r[f'head{k}_loss']:.2f}" for r in last for k in range(num_heads))
    show(f"Loss and top-1 of each head over the training steps; the loss ends at {ends}")


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
    show(
        "; ".join(
            f"head {k}: " + ", ".join(f"top-{n} {scores[f'top{n}']:.2f}" for n in tops)
            for k, scores in enumerate(accuracy(ranks, tops))
        )
    )


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
    show("; ".join(f"{name}: {sum(v) / len(v):.2f} tokens per pass on average" for name, v in counts.items()))


def plot_bars(values: dict[str, float], unit: str, baseline: float | None = None, ours: Collection[str] = ()) -> None:
    """Labelled horizontal bars, with a line at the baseline; those named in ``ours`` stand out."""
    plt.figure(figsize=(5.2, 0.45 * len(values) + 0.9))
    names = list(values)[::-1]
    bars = plt.barh(
        names,
        [values[n] for n in names],
        color=[HEAD_COLORS[0] if n in ours else BASELINE for n in names],
    )
    written = {name: f"{value:,.0f}" if value >= 100 else f"{value:.2f}" for name, value in values.items()}
    if baseline is not None:
        plt.axvline(baseline, color=BASE_COLOR, lw=1)
    behind = dict(facecolor="white", edgecolor="none", pad=0.5)  # a line must not cross a number
    plt.bar_label(bars, [written[name] for name in names], padding=4, bbox=behind)
    plt.xlim(0, max(values.values()) * 1.15)
    plt.xlabel(unit)
    plt.grid(axis="y", visible=False)
    show(f"Bars, {unit}: " + ", ".join(f"{name} {value}" for name, value in written.items()))


def plot_parts(rows: dict[str, dict]) -> None:
    """Stacked bars of an average pass's milliseconds: verify and accept, draft, its share of the prompt, the rest."""
    parts = {"ms_verify_accept": "verify and accept", "ms_draft": "draft", "ms_prompt": "prompt", "ms_rest": "the rest"}
    names = list(rows)[::-1]
    left = [0.0] * len(names)
    plt.figure(figsize=(5.2, 0.45 * len(names) + 0.9))
    for (part, label), color in zip(parts.items(), (*HEAD_COLORS[:3], BASELINE), strict=True):
        values = [max(0.0, rows[name][part]) for name in names]
        plt.barh(names, values, left=left, color=color, label=label)
        left = [a + b for a, b in zip(left, values, strict=True)]
    plt.xlabel("milliseconds per pass")
    plt.grid(axis="y", visible=False)
    plt.legend(loc="upper center", bbox_to_anchor=(0.4, -1.3 / len(names)), ncols=4, fontsize=9)
    written = (f"{name} " + ", ".join(f"{row[part]:.1f}" for part in parts) for name, row in rows.items())
    show(f"Milliseconds per pass, {', '.join(parts.values())}: " + "; ".join(written))


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
    show(
        f"Histogram of {len(lengths)} answer lengths, at most {limit} tokens, "
        f"median {sorted(lengths)[len(lengths) // 2]}"
    )
