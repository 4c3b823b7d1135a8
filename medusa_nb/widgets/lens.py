"""The head lens: choose a token of an answer and see what each head predicted from there."""

from itertools import takewhile
from typing import NamedTuple

import torch
from IPython.display import display

from medusa_nb.heads import Heads
from medusa_nb.training.features import encode_answer
from medusa_nb.widgets import figures
from medusa_nb.widgets.live import render, watched
from medusa_nb.widgets.style import visible


class Prediction(NamedTuple):
    """One head's view from a position: its best ``(token, probability)`` and the true token, None past the end."""

    best: list[tuple[int, float]]
    true: int | None

    @property
    def rank(self) -> int | None:
        """The true token's place among the best ones, None if it is not there."""
        tokens = [token for token, _ in self.best]
        return tokens.index(self.true) if self.true in tokens else None


class Lens:
    """What every head predicts at every position of an answer.

    Heads that see the path are told the answer's own tokens up to the one they predict.

    Args:
        row: a conversation that ends with the model's answer.
        best: how many tokens of each head are looked at.
    """

    @torch.no_grad()
    def __init__(self, model, heads: Heads, tokenizer, row: dict, best: int = 5):
        self.heads, self.tokenizer, self.count = heads, tokenizer, best
        encoded = encode_answer(tokenizer, row)
        self.ids, self.start = encoded.ids, encoded.own.index(True)
        ids = torch.tensor([self.ids], device=model.device)
        self.hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        self.pieces = [tokenizer.decode([i]) for i in self.ids[self.start :]]

    def __len__(self) -> int:
        return len(self.pieces)

    @torch.no_grad()
    def predictions(self, place: int) -> list[Prediction]:
        """Per head, what it predicted from the state that said the answer's token number ``place``."""
        t, count = self.start + place - 1, self.heads.num_heads
        path = (self.ids[t + 1 :] + self.ids[:1] * count)[:count]
        hidden = self.hidden[t].to(self.heads.dtype)
        logits = self.heads(hidden[None], torch.tensor([path], device=hidden.device))[:, 0]
        tokens, chances = self.heads.best(logits, self.count)
        true = [self.ids[i] if i < len(self.ids) else None for i in range(t + 2, t + 2 + count)]
        rows = zip(tokens.tolist(), chances.exp().tolist(), true, strict=True)
        return [Prediction(list(zip(ids, values, strict=True)), right) for ids, values, right in rows]

    def groups(self, place: int) -> list[int | None]:
        """For each token of the answer the head that predicted it from ``place``, None for all others."""
        right = {place + 1 + k: k for k, p in enumerate(self.predictions(place)) if p.rank == 0}
        return [right.get(i) for i in range(len(self))]

    def word(self, token: int | None) -> str:
        return "the end" if token is None else visible(self.tokenizer.decode([token]))

    def sentence(self, place: int) -> str:
        """How far into the future the hidden state knew."""
        ranks = [prediction.rank for prediction in self.predictions(place)]
        right = len(list(takewhile(lambda rank: rank == 0, ranks)))
        near = sum(rank is not None for rank in ranks)
        return (
            f"After {self.word(self.ids[self.start + place])}, {right} of {len(ranks)} heads in a row are right; "
            f"{near} have the true token among their best {self.count}."
        )

    def html(self, place: int) -> str:
        """The answer with the chosen token outlined and the tokens its heads knew tinted; below, all predictions."""
        cells, rows = list(zip(self.pieces, self.groups(place), strict=True)), []
        for k, p in enumerate(self.predictions(place)):
            best = [(self.word(i), f"{chance:.0%}", k if i == p.true else None) for i, chance in p.best]
            rows.append((f"head {k}", best, self.word(p.true)))
        return render("lens", cells=cells, chosen=place, rows=rows, sentence=self.sentence(place))


def head_lens(model, heads: Heads, tokenizer, row: dict, shown: int = 12) -> Lens:
    """Move along the answer: what did each head predict from there, and was it right?

    The token number ``shown`` is the static picture.
    """
    lens = Lens(model, heads, tokenizer, row)
    shown = max(1, min(shown, len(lens) - 2))
    if not watched():
        figures.tokens(lens.pieces, lens.groups(shown), {None: f"seen from token {shown + 1}"})
        for k, p in enumerate(lens.predictions(shown)):
            best = "  ".join(f"{lens.word(i)} {chance:.0%}" for i, chance in p.best)
            print(f"head {k}: {best:60} true: {lens.word(p.true)}")
        print(lens.sentence(shown))
        return lens
    import ipywidgets

    slider = ipywidgets.IntSlider(min=1, max=len(lens) - 1, value=shown, description="token", layout={"width": "40em"})
    view = ipywidgets.HTML(lens.html(shown))
    slider.observe(lambda change: setattr(view, "value", lens.html(change["new"])), names="value")
    display(ipywidgets.VBox([slider, view]))
    return lens
