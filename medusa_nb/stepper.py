"""Leaf through the passes of one answer: what was guessed, how likely it was, and which path was right."""

import html

import matplotlib.pyplot as plt
import torch
from IPython.display import display

from medusa_nb.decoding import Decoder, Step
from medusa_nb.display import show, visible
from medusa_nb.progress import is_headless
from medusa_nb.tree import Tree
from medusa_nb.tree_view import draw_mask, draw_tree, rows_of, tree_svg


class Passes:
    """The passes over one prompt ``[T]``, and what each candidate was worth to the head that guessed it."""

    def __init__(self, decoder: Decoder, tokenizer, prompt: torch.Tensor, max_new_tokens: int):
        self.heads, self.tokenizer = decoder.draft.heads, tokenizer
        first, *self.steps = (step for [step] in decoder.decode([prompt], max_new_tokens))
        self.words = [tokenizer.decode(first.emitted), *(tokenizer.decode(step.emitted) for step in self.steps)]
        emitted = [token for step in [first, *self.steps] for token in step.emitted]
        text = torch.cat([prompt.to(decoder.model.device), torch.tensor(emitted, device=decoder.model.device)])
        with torch.no_grad():
            self.hidden = decoder.model.base_model(input_ids=text[None]).last_hidden_state[0]
        ends = [len(prompt)]  # where each pass's root stands
        for step in self.steps:
            ends.append(ends[-1] + len(step.emitted))
        self.roots = ends[:-1]

    def __len__(self) -> int:
        return len(self.steps)

    @torch.no_grad()
    def chances(self, number: int) -> list[tuple[float, int]]:
        """Probability and rank that its head gave each candidate below its parent; the root's is certain."""
        step, tree = self.steps[number], Tree.from_parents(self.steps[number].parents)
        hidden = self.hidden[self.roots[number] - 1].to(self.heads.weight.dtype)[None]
        blocks = self.heads.blocks(hidden, self.heads.num_heads)
        result = [(1.0, 0)]
        for node in range(1, len(tree)):
            above, parent = [], tree.parents[node]
            while parent >= 0:
                above.insert(0, step.tokens[parent])
                parent = tree.parents[parent]
            k, place = len(above) - 1, self.heads.places(torch.tensor(step.tokens[node])).item()
            if k >= self.heads.num_heads or place < 0:
                result.append((float("nan"), -1))  # copied: deeper than there are heads, or what they never guess
                continue
            path = torch.tensor(above, device=hidden.device)[None, None]
            seen = self.heads.after(k, blocks[k], path) if self.heads.sees_path else self.heads.project(blocks, 0)[k]
            chance = seen.float().flatten().softmax(-1)
            result.append((chance[place].item(), int((chance > chance[place]).sum())))
        return result

    def labels(self, number: int) -> tuple[list[str], list[str]]:
        """What stands in each node of a pass's tree, and a sentence about it."""
        step, chances = self.steps[number], self.chances(number)
        tree = Tree.from_parents(step.parents)
        labels, notes, ranks = [], [], {0: ()}
        for node, (chance, rank) in enumerate(chances):
            word = visible(self.tokenizer.decode([step.tokens[node]]))
            if node == 0:
                labels.append(word)
                notes.append(f"{word}: the root, certain: the base model itself said it")
                continue
            ranks[node] = (*ranks[tree.parents[node]], rank if rank >= 0 else "copied")
            head, place = f"head {len(ranks[node]) - 1}", f"number {rank + 1}, with {chance:.0%}"
            if node not in step.copied:
                source = f"{head}'s guess {place}"
            else:
                source = "copied from the text" + (f"; {head} had it as {place}" if rank >= 0 else "")
            verdict = "accepted" if node in step.path else "rejected"
            labels.append(word if rank < 0 else f"{word} {chance:.0%}")
            notes.append(f"{word}: {source}; rank path {ranks[node]}; {verdict}")
        return labels, notes

    def title(self, number: int) -> str:
        """Where a pass stands in the text and what it emitted."""
        before = "".join(self.words[: number + 1])[-30:]
        return f"pass {number + 1} of {len(self)}: … {visible(before)} + {visible(self.words[number + 1])}"

    def html(self, number: int) -> str:
        """A pass as a picture that answers to pointer and keyboard."""
        tree, (labels, notes) = Tree.from_parents(self.steps[number].parents), self.labels(number)
        path, title = self.steps[number].path, self.title(number)
        return f"<div><code>{html.escape(title)}</code></div>" + tree_svg(tree, labels, notes, path, title)

    def plot(self, number: int) -> None:
        """The same as a static figure: the tree, and the mask beside it."""
        step: Step = self.steps[number]
        tree, (labels, _) = Tree.from_parents(step.parents), self.labels(number)
        height = max(2.4, 0.33 * (max(rows_of(tree)) + 1) + 0.8)
        _, (left, right) = plt.subplots(1, 2, figsize=(9.5, height), width_ratios=(2.2, 1))
        draw_tree(left, tree, labels, step.path)
        draw_mask(right, tree, [self.tokenizer.decode([token]) for token in step.tokens])
        left.set_title(self.title(number), fontsize=9)
        show(
            f"{self.title(number)}. Candidates with their probabilities: {', '.join(labels)}. Beside it the tree mask."
        )


def step_through(decoder: Decoder, tokenizer, prompt: torch.Tensor, max_new_tokens: int, shown: int = 3) -> None:
    """A slider over the passes of one answer; the pass numbered ``shown`` is the static picture."""
    passes = Passes(decoder, tokenizer, prompt, max_new_tokens)
    shown = min(shown, len(passes) - 1)
    if is_headless():
        passes.plot(shown)
        return
    import ipywidgets

    slider = ipywidgets.IntSlider(min=1, max=len(passes), value=shown + 1, description="pass")
    view = ipywidgets.HTML(passes.html(shown))
    slider.observe(lambda change: setattr(view, "value", passes.html(change["new"] - 1)), names="value")
    display(ipywidgets.VBox([slider, view]))
