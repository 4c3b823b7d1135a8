"""Pictures of a candidate tree: static ones in matplotlib, and one as SVG that answers to pointer and keyboard."""

import html

import matplotlib.pyplot as plt

from medusa_nb.display import BASE_COLOR, HEAD_COLORS, ink, show, visible
from medusa_nb.tree import Tree

REJECTED, REJECTED_INK = "#eeeeee", "#555555"
ROW, LETTER = 24, 6.8  # pixels of the SVG: height of a row of nodes, width of a letter


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


def colors_of(tree: Tree, path: list[int] | None) -> list[tuple[str, str]]:
    """Fill and ink of every node: by the head that guessed it, pale where it is not on the accepted ``path``."""
    colors = []
    for node, ranks in enumerate(tree.paths):
        fill = HEAD_COLORS[(len(ranks) - 1) % len(HEAD_COLORS)] if node else BASE_COLOR
        colors.append((fill, ink(fill)) if path is None or node in path else (REJECTED, REJECTED_INK))
    return colors


def draw_tree(axes, tree: Tree, labels: list[str], path: list[int] | None = None) -> None:
    """The tree on matplotlib axes, depth to the right; accepted nodes in their head's colour, rejected ones pale."""
    rows, colors = rows_of(tree), colors_of(tree, path)
    for node, parent in enumerate(tree.parents):
        depth, (fill, color) = len(tree.paths[node]), colors[node]
        if parent >= 0:
            line = "#cccccc" if fill == REJECTED else fill
            axes.plot([depth - 1, depth], [-rows[parent], -rows[node]], color=line, lw=1.5, zorder=1)
        box = dict(boxstyle="round,pad=0.25", fc=fill, ec="none")
        place = dict(ha="center", va="center", fontsize=8, family="monospace", zorder=2)
        axes.text(depth, -rows[node], labels[node], color=color, bbox=box, **place)
    axes.set_xlim(-0.5, tree.depth + 0.5)
    axes.set_ylim(-max(rows) - 0.6, 0.6)
    axes.axis("off")


def plot_tree(tree: Tree, tokens: list[str] | None = None, path: list[int] | None = None, title: str = "") -> None:
    """The candidate tree, with its tokens or else its rank paths."""
    labels = [visible(token) for token in tokens] if tokens else [str(ranks or "root") for ranks in tree.paths]
    _, axes = plt.subplots(figsize=(1.9 * (tree.depth + 1), max(1.6, 0.33 * (max(rows_of(tree)) + 1) + 0.6)))
    draw_tree(axes, tree, labels, path)
    axes.set_title(title)
    accepted = f", accepted: {' '.join(labels[node] for node in path)}" if path else ""
    show(f"Candidate tree of {len(tree)} nodes, {tree.depth} deep: {' '.join(labels)}{accepted}")


def draw_mask(axes, tree: Tree, labels: list[str]) -> None:
    """Which candidate (row) may look at which (column), on matplotlib axes."""
    axes.imshow(~tree.mask().numpy(), cmap="gray", vmin=-0.6, vmax=1)
    names = [f"{node}: {visible(label)}" for node, label in enumerate(labels)]
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("may be looked at")
    axes.set_ylabel("looks")
    axes.grid(False)


def plot_mask(tree: Tree, labels: list[str]) -> None:
    """The tree mask as a figure of its own."""
    _, axes = plt.subplots(figsize=(3.4, 3.2))
    draw_mask(axes, tree, labels)
    show(f"Tree mask of {len(tree)} candidates: each may look at itself and at the nodes above it")


def plot_candidates(candidates, tokenizer) -> None:
    """The first text's candidate tree as a draft made it, with its tokens."""
    plot_tree(
        Tree.from_parents(candidates.parents[0].tolist()),
        [tokenizer.decode([token]) for token in candidates.tokens[0].tolist()],
    )


def tree_svg(tree: Tree, labels: list[str], notes: list[str], path: list[int], label: str) -> str:
    """Tree and mask side by side; pointing at a node, or moving to it with Tab, lights up what it may look at.

    Args:
        labels: what stands in each node.
        notes: a sentence about each node, shown below while it is pointed at.
        path: accepted nodes.
        label: a description of the whole picture for screen readers.
    """
    rows, colors = rows_of(tree), colors_of(tree, path)
    depths = [len(ranks) for ranks in tree.paths]
    texts = [visible(text) for text in labels]
    widths = [max(len(t) for t, d in zip(texts, depths, strict=True) if d == at) for at in range(tree.depth + 1)]
    lefts = [sum(w * LETTER + 40 for w in widths[:at]) for at in range(tree.depth + 1)]
    edges, nodes = [], []
    for node, parent in enumerate(tree.parents):
        x, y, width = lefts[depths[node]], rows[node] * ROW + 4, len(texts[node]) * LETTER + 10
        fill, color = colors[node]
        above = " ".join(f"u{n}" for n in range(len(tree)) if tree.mask()[n, node])  # lit when a node below is
        if parent >= 0:
            right = lefts[depths[parent]] + len(texts[parent]) * LETTER + 10
            line = "#bbbbbb" if fill == REJECTED else fill
            start, end = rows[parent] * ROW + 13, y + 9
            edges.append(
                f'<path class="{above}" d="M{right:.0f} {start:.0f} C{right + 18:.0f} {start:.0f} {x - 18:.0f} '
                f'{end:.0f} {x:.0f} {end:.0f}" fill="none" stroke="{line}" stroke-width="1.5"/>'
            )
        nodes.append(
            f'<g class="node n{node} {above}" tabindex="0" role="img" aria-label="{html.escape(notes[node])}">'
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="18" rx="4" fill="{fill}"/>'
            f'<text x="{x + 5:.0f}" y="{y + 13:.0f}" fill="{color}">{html.escape(texts[node])}</text></g>'
        )
    width, height = lefts[-1] + widths[-1] * LETTER + 14, (max(rows) + 1) * ROW + 8
    picture = (
        f'<svg width="{width:.0f}" height="{height:.0f}" role="group" aria-label="{html.escape(label)}">'
        f"{''.join(edges)}{''.join(nodes)}</svg>"
    )
    sentences = "".join(f'<p class="note t{node}">{html.escape(note)}</p>' for node, note in enumerate(notes))
    hint = '<p class="hint">Point at a node, click it, or move to it with Tab: what does it look at?</p>'
    body = f'<div class="pictures">{picture}{_mask_svg(tree, texts)}</div>{sentences}{hint}'
    return f'<div class="medusa-tree"><style>{_rules(len(tree))}</style>{body}</div>'


def _mask_svg(tree: Tree, texts: list[str]) -> str:
    mask, side, cells = tree.mask(), 16, []
    left = max(map(len, texts)) * LETTER + 8
    for row in range(len(tree)):
        cells.append(
            f'<text x="{left - 6:.0f}" y="{row * side + 16}" text-anchor="end">{html.escape(texts[row])}</text>'
        )
        for column in range(len(tree)):
            fill = "#4d4d4d" if mask[row, column] else "#f2f2f2"
            at = f'x="{left + column * side:.0f}" y="{row * side + 4}"'
            cells.append(f'<rect class="m{row}" {at} width="{side - 2}" height="{side - 2}" fill="{fill}"/>')
    width, height = left + len(tree) * side + 6, len(tree) * side + 8
    label = "Tree mask: a row looks at its dark columns"
    return f'<svg width="{width:.0f}" height="{height:.0f}" role="img" aria-label="{label}">{"".join(cells)}</svg>'


def _rules(count: int) -> str:
    """The picture's style: what lights up while node n is pointed at or has the focus."""
    rules = [
        ".medusa-tree{background:#fff;color:#222;padding:.5em;overflow-x:auto}"
        ".medusa-tree .pictures{display:flex;flex-wrap:wrap;gap:2em;align-items:center}"
        ".medusa-tree text{font:11px monospace}.medusa-tree .node{cursor:pointer;outline:none}"
        ".medusa-tree .note{display:none}.medusa-tree p{margin:.5em 0;min-height:1.4em}"
        ".medusa-tree:has(.node:is(:hover,:focus)) .hint{display:none}"
    ]
    for n in range(count):
        on = f".medusa-tree:has(.n{n}:is(:hover,:focus))"
        rules.append(
            f"{on} .t{n}{{display:block}}{on} .u{n} rect,{on} path.u{n}{{stroke:#000;stroke-width:2}}"
            f"{on} .m{n}{{stroke:#D55E00;stroke-width:2}}"
        )
    return "".join(rules)
