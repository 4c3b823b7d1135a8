"""Leaf through the passes of one answer: what was drafted, how likely it was, and which path was accepted."""

import torch
from IPython.display import display

from medusa_nb.decoding import Decoder, Step
from medusa_nb.tree import Tree
from medusa_nb.widgets import figures
from medusa_nb.widgets.live import render, watched
from medusa_nb.widgets.style import BASE, HEADS, ink, visible

ROW, LETTER = 24, 6.8  # pixels of the SVG: height of a row of nodes, width of a letter


class Passes:
    """The passes over one prompt ``[T]``, and what each candidate was worth to the head that drafted it."""

    def __init__(self, decoder: Decoder, tokenizer, prompt: torch.Tensor, max_new_tokens: int, eos: list[int] = ()):
        self.heads, self.tokenizer = decoder.draft.heads, tokenizer
        result = decoder.generate([prompt], max_new_tokens, eos_token_id=list(eos))[0]
        first, *self.steps = result.steps
        self.words = [tokenizer.decode(first.emitted), *(tokenizer.decode(step.emitted) for step in self.steps)]
        with torch.no_grad():
            ids = result.sequences.to(decoder.model.device)
            self.hidden = decoder.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        self.roots = [len(prompt)]  # where each pass's root stands
        for step in self.steps[:-1]:
            self.roots.append(self.roots[-1] + len(step.emitted))

    def __len__(self) -> int:
        return len(self.steps)

    def tree(self, number: int) -> Tree:
        return Tree.from_parents(self.steps[number].parents)

    def path(self, tree: Tree, node: int) -> list[int]:
        """The numbers of a node's ancestors, the root first."""
        above = []
        while (node := tree.parents[node]) >= 0:
            above.insert(0, node)
        return above

    @torch.no_grad()
    def chances(self, number: int) -> list[float | None]:
        """The probability its head gave each candidate; None for the root, and for what its head never drafts."""
        step, tree, heads = self.steps[number], self.tree(number), self.heads
        hidden = self.hidden[self.roots[number] - 1].to(heads.dtype)
        result: list[float | None] = [None]
        for node in range(1, len(tree)):
            above = [step.tokens[i] for i in self.path(tree, node)]
            k, place = len(above) - 1, int(heads.places(torch.tensor(step.tokens[node], device=hidden.device)))
            if k >= heads.num_heads or place < 0:
                result.append(None)
                continue
            path = torch.tensor((above + above[:1] * heads.num_heads)[: heads.num_heads], device=hidden.device)
            result.append(heads(hidden[None], path[None])[k, 0].float().softmax(-1)[place].item())
        return result

    def labels(self, number: int) -> tuple[list[str], list[str]]:
        """What stands in each node of a pass's tree, and a sentence about it."""
        step, tree = self.steps[number], self.tree(number)
        labels, notes = [], []
        for node, chance in enumerate(self.chances(number)):
            word = visible(self.tokenizer.decode([step.tokens[node]]))
            if node == 0:
                labels.append(word)
                notes.append(f"{word}: the root, certain: the base model itself said it")
                continue
            copied = "copied from the text" if node in step.copied else f"drafted by head {len(tree.paths[node]) - 1}"
            verdict = "accepted" if node in step.path else "rejected"
            labels.append(word if chance is None else f"{word} {chance:.0%}")
            notes.append(f"{word}: {copied}{'' if chance is None else f', probability {chance:.0%}'}; {verdict}")
        return labels, notes

    def title(self, number: int) -> str:
        """Where a pass stands in the text and what it emitted."""
        before = "".join(self.words[: number + 1])[-30:]
        return f"pass {number + 1} of {len(self)}: … {visible(before)} + {visible(self.words[number + 1])}"

    def bonus(self, number: int) -> str:
        """The token that the base model says after the accepted path."""
        step: Step = self.steps[number]
        return visible(self.tokenizer.decode(step.emitted[-1:])) if len(step.emitted) == len(step.path) else ""

    def plot(self, number: int) -> None:
        """A pass as a static figure: the tree, and the mask beside it."""
        print(self.title(number))
        figures.tree(self.steps[number].parents, self.labels(number)[0], self.steps[number].path, self.bonus(number))

    def html(self, number: int) -> str:
        """A pass as a picture that answers to pointer and keyboard."""
        tree, (labels, notes) = self.tree(number), self.labels(number)
        rows, mask, accepted = figures.rows_of(tree), tree.mask(), self.steps[number].path
        depths = [len(ranks) for ranks in tree.paths]
        widths = [max(len(t) for t, d in zip(labels, depths, strict=True) if d == at) for at in range(tree.depth + 1)]
        lefts = [sum(w * LETTER + 40 for w in widths[:at]) for at in range(tree.depth + 1)]
        nodes = []
        for node, parent in enumerate(tree.parents):
            kept = node in accepted
            fill = (HEADS[(depths[node] - 1) % len(HEADS)] if node else BASE) if kept else "#eeeeee"
            x, y = round(lefts[depths[node]]), round(rows[node] * ROW + 4)
            edge = ""
            if parent >= 0:
                right, start = (
                    round(lefts[depths[parent]] + len(labels[parent]) * LETTER + 10),
                    round(rows[parent] * ROW + 13),
                )
                edge = f"M{right} {start} C{right + 18} {start} {x - 18} {y + 9} {x} {y + 9}"
            above = " ".join(f"u{n}" for n in range(len(tree)) if mask[n, node])  # lit when a node below is
            nodes.append(
                dict(
                    x=x,
                    y=y,
                    width=round(len(labels[node]) * LETTER + 10),
                    fill=fill,
                    edge=edge,
                    above=above,
                    ink=ink(fill) if kept else "#555555",
                    line=fill if kept else "#bbbbbb",
                    label=labels[node],
                    note=notes[node],
                    mask=mask[node].tolist(),
                )  # fmt: skip
            )
        left = round(max(map(len, labels)) * LETTER + 8)
        return render(
            "tree",
            title=self.title(number),
            nodes=nodes,
            width=round(lefts[-1] + widths[-1] * LETTER + 14),
            height=round((max(rows) + 1) * ROW + 8),
            mask_left=left,
            mask_width=left + len(tree) * 16 + 6,
        )


def step_through(
    decoder: Decoder, tokenizer, prompt: torch.Tensor, max_new_tokens: int, eos: list[int] = (), shown: int = 3
) -> Passes:
    """A slider over the passes of one answer; the pass numbered ``shown`` is the static picture."""
    passes = Passes(decoder, tokenizer, prompt, max_new_tokens, eos)
    shown = min(shown, len(passes) - 1)
    if not watched():
        passes.plot(shown)
        return passes
    import ipywidgets

    slider = ipywidgets.IntSlider(min=1, max=len(passes), value=shown + 1, description="pass")
    view = ipywidgets.HTML(passes.html(shown))
    slider.observe(lambda change: setattr(view, "value", passes.html(change["new"] - 1)), names="value")
    display(ipywidgets.VBox([slider, view]))
    return passes
