"""Leaf through the passes of one answer: what was drafted, how likely it was, and which path was accepted."""

from collections.abc import Sequence

import torch
from IPython.display import display

from medusa_nb.decoding import Decoder
from medusa_nb.tree import Tree
from medusa_nb.widgets import figures
from medusa_nb.widgets.live import render, watched
from medusa_nb.widgets.style import BASE, HEADS, ink, visible


class Passes:
    """The passes over one prompt ``[T]``, and what each candidate was worth to the head that drafted it."""

    def __init__(self, decoder: Decoder, tokenizer, prompt: torch.Tensor, max_new_tokens: int, eos: Sequence[int] = ()):
        self.heads, self.tokenizer = decoder.draft.heads, tokenizer  # type: ignore[attr-defined]
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

    @torch.no_grad()
    def chances(self, number: int) -> list[float | None]:
        """The probability its head gave each candidate; None for the root, and for what its head never drafts."""
        step, tree, heads = self.steps[number], self.tree(number), self.heads
        hidden = self.hidden[self.roots[number] - 1].to(heads.dtype)
        result: list[float | None] = [None]
        for node, sees in enumerate(tree.mask()[1:], 1):
            above = [step.tokens[i] for i in sees[:node].nonzero()[:, 0].tolist()]  # its ancestors, the root first
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
        step = self.steps[number]
        return visible(self.tokenizer.decode(step.emitted[-1:])) if len(step.emitted) == len(step.path) else ""

    def plot(self, number: int) -> None:
        """A pass as a static figure: the tree, and the mask beside it."""
        print(self.title(number))
        figures.tree(self.steps[number].parents, self.labels(number)[0], self.steps[number].path, self.bonus(number))

    def html(self, number: int) -> str:
        """A pass as a picture that answers to pointer and keyboard."""
        tree, accepted = self.tree(number), self.steps[number].path
        mask, rows = tree.mask(), figures.rows_of(tree)
        nodes: list[dict] = []
        for node, (label, note) in enumerate(zip(*self.labels(number), strict=True)):
            depth, kept = len(tree.paths[node]), node in accepted
            fill = (HEADS[(depth - 1) % len(HEADS)] if node else BASE) if kept else "#eeeeee"
            look = dict(fill=fill, ink=ink(fill) if kept else "#555555", line=fill if kept else "#bbbbbb")
            below = mask[:, node].nonzero()[:, 0].tolist()
            place = dict(depth=depth, row=rows[node], parent=tree.parents[node], below=below, mask=mask[node].tolist())
            nodes.append(dict(label=label, note=note, **look, **place))
        return render("tree", title=self.title(number), nodes=nodes, longest=max(len(node["label"]) for node in nodes))


def step_through(
    decoder: Decoder, tokenizer, prompt: torch.Tensor, max_new_tokens: int, eos: Sequence[int] = (), shown: int = 3
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
