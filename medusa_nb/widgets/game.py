"""The game: you are the head. Type the next tokens; one pass of the model judges all of them."""

from html import escape

import torch
from IPython.display import display

from medusa_nb.widgets import figures
from medusa_nb.widgets.live import tokens_html, watched
from medusa_nb.widgets.style import visible

YOURS = 0
NAMES = {None: "said by the model", YOURS: "drafted by you"}


class Game:
    """A prompt, the text so far, and whoever drafts its next tokens.

    Args:
        prompt: ``[T]`` token ids.
        eos: ids that end the answer.
    """

    def __init__(self, model, tokenizer, prompt: torch.Tensor, eos: list[int]):
        self.model, self.tokenizer, self.eos = model, tokenizer, set(eos)
        self.start, self.passes = len(prompt), 1
        self.ids = torch.cat([prompt, self.say(prompt)[-1:]])  # the first token is the model's own
        self.groups: list[int | None] = [None]

    @torch.no_grad()
    def say(self, ids: torch.Tensor) -> torch.Tensor:
        """What the model says after every token: ``[T] -> [T]``, in one pass."""
        return self.model(ids[None].to(self.model.device)).logits[0].argmax(-1).to(ids.device)

    @property
    def over(self) -> bool:
        return int(self.ids[-1]) in self.eos

    def judge(self, text: str) -> str:
        """Judge a typed draft in one pass: the tokens that the model would have said are kept; says what came of it."""
        draft = torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long)
        said = self.say(torch.cat([self.ids, draft]))[len(self.ids) - 1 :]
        kept = int((draft == said[:-1]).long().cumprod(0).sum())
        self.passes += 1
        self.ids = torch.cat([self.ids, draft[:kept], said[kept : kept + 1]])
        self.groups += [YOURS] * kept + [None]
        own, wrong = visible(self.word(said[kept])), [visible(self.word(i)) for i in draft[kept : kept + 1]]
        rejected = f"; the model had {own} where you wrote {wrong[0]}" if wrong else f", and the model added {own}"
        return f"{kept} of {len(draft)} tokens kept{rejected}"

    def word(self, token) -> str:
        return self.tokenizer.decode([int(token)])

    @property
    def score(self) -> str:
        """Tokens per pass so far, in words."""
        count = len(self.ids) - self.start
        return (
            f"{count} tokens in {self.passes} passes: {count / self.passes:.2f} tokens per pass (plain decoding: 1.00)"
        )

    @property
    def pieces(self) -> list[str]:
        """The answer so far, token by token; ``groups`` says which of them you drafted."""
        return [self.word(i) for i in self.ids[self.start :]]


def play(model, tokenizer, prompt: torch.Tensor, eos: list[int], drafts: tuple[str, ...] = ()) -> Game:
    """Play in a notebook: a field to type into. ``drafts`` are played first, and alone where nobody watches."""
    game = Game(model, tokenizer, prompt, eos)
    for draft in drafts:
        print(f"{draft!r:34} {game.judge(draft)}")
    if not watched() or game.over:
        figures.tokens(game.pieces, game.groups, NAMES)
        print(game.score)
        return game
    import ipywidgets

    view, verdict = ipywidgets.HTML(), ipywidgets.HTML()
    field = ipywidgets.Text(
        placeholder="what comes next? spaces count", continuous_update=False, layout={"width": "30em"}
    )

    def draw() -> None:
        view.value = tokens_html(game.pieces, game.groups, NAMES) + f"<p>{game.score}</p>"

    def judge(*_) -> None:
        if field.value and not game.over:
            verdict.value = escape(game.judge(field.value))
            field.value, field.disabled = "", game.over
            draw()

    field.observe(judge, names="value")
    draw()
    display(ipywidgets.VBox([view, field, verdict]))
    return game
