"""The head lens: choose a token of an answer and see what each head guessed from there."""

import html
from typing import NamedTuple

import torch
from IPython.display import HTML, display

from medusa_nb.display import tint_of, visible
from medusa_nb.features import encode_conversation
from medusa_nb.heads import MedusaHeads
from medusa_nb.progress import is_headless


class Guess(NamedTuple):
    """One head's view from a position: its best ``(token, probability)`` and the true token, None past the end."""

    best: list[tuple[int, float]]
    true: int | None

    @property
    def rank(self) -> int | None:
        """The true token's place among the best ones, None if it is not there."""
        tokens = [token for token, _ in self.best]
        return tokens.index(self.true) if self.true in tokens else None


class Lens:
    """What every head guesses at every position of an answer.

    Heads that see the path are told the answer's own tokens up to the one they guess.

    Args:
        messages: a conversation that ends with the model's answer.
        best: how many guesses of each head are looked at.
    """

    @torch.no_grad()
    def __init__(self, model, heads: MedusaHeads, tokenizer, messages: list[dict], best: int = 5):
        self.heads, self.tokenizer, self.count = heads, tokenizer, best
        encoded = encode_conversation(tokenizer, messages)
        self.ids, self.start = encoded.ids, encoded.own.index(True)
        ids = torch.tensor([self.ids], device=model.device)
        self.hidden = model.base_model(input_ids=ids).last_hidden_state[0]
        self.pieces = [tokenizer.decode([i]) for i in self.ids[self.start :]]

    def __len__(self) -> int:
        return len(self.pieces)

    @torch.no_grad()
    def guesses(self, place: int) -> list[Guess]:
        """Per head, what it guessed from the state that said the answer's token number ``place``."""
        t = self.start + place - 1
        path = (self.ids[t + 1 :] + self.ids[:1] * self.heads.num_heads)[: self.heads.num_heads]
        logits = self.heads(self.hidden[t], path=torch.tensor(path, device=self.hidden.device))
        top = logits.float().softmax(-1).topk(self.count)
        true = [self.ids[i] if i < len(self.ids) else None for i in range(t + 2, t + 2 + self.heads.num_heads)]
        tokens = self.heads.tokens(top.indices).tolist()
        best = [list(zip(*row, strict=True)) for row in zip(tokens, top.values.tolist(), strict=True)]
        return [Guess(*both) for both in zip(best, true, strict=True)]

    def html(self, place: int) -> str:
        """The answer with the chosen token in bold and the tokens its heads knew tinted; below, all their guesses."""
        guesses = self.guesses(place)
        marked = []
        for i, piece in enumerate(self.pieces):
            text, k = html.escape(piece), i - place - 1
            if k == -1:
                text = f'<b style="outline:2px solid #222">{text}</b>'
            elif 0 <= k < len(guesses) and guesses[k].rank is not None:
                first = guesses[k].rank == 0
                tint, under = (tint_of(k), "solid") if first else ("", "dotted")
                text = f'<span style="{tint}border-bottom:2px {under} #222">{text}</span>'
            marked.append(text)
        rows = []
        for k, guess in enumerate(guesses):
            cells = []
            for token, chance in guess.best:
                right = f"{tint_of(k)}font-weight:bold;" if token == guess.true else ""
                word = html.escape(visible(self.tokenizer.decode([token])))
                cells.append(f'<td style="{right}padding:.1em .6em"><code>{word}</code> {chance:.0%}</td>')
            true = "the end" if guess.true is None else visible(self.tokenizer.decode([guess.true]))
            rows.append(f"<tr><th>head {k}</th>{''.join(cells)}<td>true: <code>{html.escape(true)}</code></td></tr>")
        text = f'<pre style="background:#fff;color:#222;white-space:pre-wrap">{"".join(marked)}</pre>'
        return f"{text}<table>{''.join(rows)}</table><p>{self.sentence(guesses)}</p>"

    def sentence(self, guesses: list[Guess]) -> str:
        """How far into the future the hidden state still knew."""
        right = 0
        while right < len(guesses) and guesses[right].rank == 0:
            right += 1
        near = sum(guess.rank is not None for guess in guesses)
        return (
            f"From this state the next {right} token{'' if right == 1 else 's'} after the bold one "
            f"{'was' if right == 1 else 'were'} guessed in a row; {near} of {len(guesses)} heads have the true token "
            f"among their best {self.count} (tinted: the best guess; dotted: among the best {self.count})."
        )

    def lines(self) -> list[list[int]]:
        """The numbers of the answer's tokens, line by line as they stand in the text."""
        lines = [[]]
        for place, piece in enumerate(self.pieces):
            lines[-1].append(place)
            if piece.endswith("\n"):
                lines.append([])
        return [line for line in lines if line]


def head_lens(model, heads: MedusaHeads, tokenizer, messages: list[dict], shown: int = 4) -> None:
    """Click a token of the answer: what did each head guess from there, and was it right?

    The token number ``shown`` is the static picture.
    """
    lens = Lens(model, heads, tokenizer, messages)
    shown = min(shown, len(lens) - 1)
    if is_headless():
        display(HTML(lens.html(shown)))
        return
    import ipywidgets

    view = ipywidgets.HTML(lens.html(shown))
    rows = []
    for line in lens.lines():
        buttons = []
        for place in line:
            name = visible(lens.pieces[place])
            button = ipywidgets.Button(description=name, tooltip=f"token {place + 1}", layout={"width": "auto"})
            button.layout.margin, button.layout.height, button.style.button_color = "1px", "24px", "#f5f5f5"
            button.style.font_family = "monospace"
            button.on_click(lambda _, place=place: setattr(view, "value", lens.html(place)))
            buttons.append(button)
        rows.append(ipywidgets.HBox(buttons, layout={"flex_flow": "row wrap"}))
    display(ipywidgets.VBox([*rows, view]))
