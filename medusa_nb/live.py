"""Pieces of a notebook that live: a race, a tree to step through, a lens on the heads.

Each shows a good static picture first; widgets come on top where a front end answers.
"""

import html
import io
import time
from dataclasses import dataclass, field

import matplotlib.pyplot as plt
import torch
from IPython.display import HTML, display

from medusa_nb.decoding import Decoder, cut_at_end
from medusa_nb.display import BASELINE, HEAD_COLORS, TINTS, plot_tree, tint_of
from medusa_nb.progress import is_headless
from medusa_nb.tree import Tree


@dataclass
class Lane:
    """One runner of a race: its text so far, who guessed each token, and its own clock."""

    name: str
    pieces: list[str] = field(default_factory=list)
    guessed_by: list[int | None] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # seconds on its own clock at each token
    passes: int = 0
    seconds: float = 0.0

    def html(self, until: float | None = None) -> str:
        """The lane's text up to a time on its clock, tinted by the head that guessed each token."""
        shown = sum(t <= until for t in self.times) if until is not None else len(self.pieces)
        clock = min(self.seconds, until) if until is not None else self.seconds
        spans = []
        for piece, head in zip(self.pieces[:shown], self.guessed_by[:shown], strict=True):
            spans.append(f'<span style="{tint_of(head)}">{html.escape(piece)}</span>')
        rate = f"{shown / clock:.0f} tokens/s" if clock else ""
        head = f"<b>{html.escape(self.name)}</b> &nbsp; {shown} tokens &nbsp; {clock:.2f} s &nbsp; {rate}"
        if until is None and self.passes:
            head += f" &nbsp; {len(self.pieces) / self.passes:.2f} per pass"
        style = "white-space:pre-wrap;background:#fff;color:#222;border:1px solid #ddd;padding:.5em;min-height:6em"
        return f'<div style="margin:.3em 0">{head}<pre style="{style}">{"".join(spans)}</pre></div>'


def race(
    decoders: dict[str, Decoder], tokenizer, prompt: torch.Tensor, max_new_tokens: int, eos: list[int]
) -> dict[str, Lane]:
    """Let decoders run on the same prompt ``[T]``, live, each on its own clock.

    One machine cannot run both at once without one slowing the other. So whoever has used less time goes
    next: what you see at any moment is what each would have written by then. Afterwards a slider shows the
    race again at any time of it.
    """
    lanes = {name: Lane(name) for name in decoders}
    runs = {name: decoder.decode([prompt], max_new_tokens) for name, decoder in decoders.items()}
    live = None if is_headless() else display(HTML(""), display_id=True)
    shown_at = time.perf_counter()
    while runs:
        name = min(runs, key=lambda n: lanes[n].seconds)
        lane, started = lanes[name], time.perf_counter()
        try:
            [step] = next(runs[name])
        except StopIteration:
            del runs[name]
            continue
        lane.seconds += time.perf_counter() - started
        emitted, ended = cut_at_end(step.emitted, set(eos))
        lane.pieces += [tokenizer.decode([token]) for token in emitted]
        lane.guessed_by += step.guessed_by[: len(emitted)]
        lane.times += [lane.seconds] * len(emitted)
        lane.passes += 1
        if ended:
            del runs[name]
        if live and (time.perf_counter() - shown_at > 0.05 or not runs):
            live.update(HTML("".join(lane.html() for lane in lanes.values())))
            shown_at = time.perf_counter()
    if live is None:
        display(HTML("".join(lane.html() for lane in lanes.values())))
        plot_race(lanes)
    else:
        replay(lanes)
    return lanes


def plot_race(lanes: dict[str, Lane]) -> None:
    """Tokens over time for every lane."""
    for i, lane in enumerate(lanes.values()):
        color = HEAD_COLORS[0] if i else BASELINE
        plt.step([0, *lane.times], range(len(lane.times) + 1), where="post", color=color, label=lane.name)
    plt.xlabel("seconds on its own clock")
    plt.ylabel("tokens")
    plt.ylim(bottom=0)
    plt.legend()
    plt.show()


def replay(lanes: dict[str, Lane]) -> None:
    """A slider over the race's time, with a play button and a choice of speed."""
    import ipywidgets

    end = max(lane.seconds for lane in lanes.values())
    play = ipywidgets.Play(min=0, max=100, interval=100, description="replay")
    slider = ipywidgets.IntSlider(min=0, max=100, value=100, description="time, %")
    speed = ipywidgets.Dropdown(options=[("slow", 300), ("normal", 100), ("fast", 30)], value=100, description="speed")
    view = ipywidgets.HTML("".join(lane.html(end) for lane in lanes.values()))

    def move(change):
        view.value = "".join(lane.html(end * change["new"] / 100) for lane in lanes.values())

    slider.observe(move, names="value")
    ipywidgets.jslink((play, "value"), (slider, "value"))
    speed.observe(lambda change: setattr(play, "interval", change["new"]), names="value")
    display(ipywidgets.VBox([ipywidgets.HBox([play, slider, speed]), view]))


def step_through(decoder: Decoder, tokenizer, prompt: torch.Tensor, max_new_tokens: int, shown: int = 3) -> None:
    """Leaf through the passes of one answer: the candidate tree with its tokens and the accepted path.

    The pass numbered ``shown`` is the static picture.
    """
    steps = [step for [step] in decoder.decode([prompt], max_new_tokens)][1:]
    text = [tokenizer.decode(step.emitted) for step in steps]

    def picture(number: int) -> bytes:
        step, before = steps[number], "".join(text[:number])[-40:]
        words = [tokenizer.decode([token]) for token in step.tokens]
        with plt.rc_context({"figure.max_open_warning": 0}), showing_off():
            plot_tree(
                Tree.from_parents(step.parents), words, step.path, f"pass {number + 1}: … {before!r} + {text[number]!r}"
            )
            data = io.BytesIO()
            plt.savefig(data, format="png", dpi=80)
            plt.close("all")
        return data.getvalue()

    shown = min(shown, len(steps) - 1)
    if is_headless():
        step = steps[shown]
        words = [tokenizer.decode([token]) for token in step.tokens]
        plot_tree(Tree.from_parents(step.parents), words, step.path, f"pass {shown + 1} emits {text[shown]!r}")
        return
    import ipywidgets

    slider = ipywidgets.IntSlider(min=1, max=len(steps), value=shown + 1, description="pass")
    image = ipywidgets.Image(value=picture(shown), format="png")
    slider.observe(lambda change: setattr(image, "value", picture(change["new"] - 1)), names="value")
    display(ipywidgets.VBox([slider, image]))


class showing_off:
    """Keep ``plt.show`` from showing, so that a figure can be taken as bytes."""

    def __enter__(self):
        self.show, plt.show = plt.show, lambda *arguments, **options: None

    def __exit__(self, *error):
        plt.show = self.show


@torch.no_grad()
def head_lens(model, heads, tokenizer, messages: list[dict], shown: int = 4, best: int = 5) -> None:
    """Choose a token of an answer: what did each head guess from there, and was it right?

    Heads that see the path are told the answer's own tokens up to the one they guess.

    Args:
        messages: a conversation that ends with the model's answer.
        shown: the answer's token that the static picture shows.
    """
    from medusa_nb.features import encode_conversation

    encoded = encode_conversation(tokenizer, messages)
    ids, start = encoded.ids, encoded.own.index(True)
    hidden = model.base_model(input_ids=torch.tensor([ids], device=model.device)).last_hidden_state[0]
    positions = range(start - 1, len(ids) - 1)

    def table(place: int) -> str:
        t = positions[place]
        path = torch.tensor((ids[t + 1 :] + ids[:1] * heads.num_heads)[: heads.num_heads], device=model.device)
        top = heads(hidden[t], path=path).float().softmax(-1).topk(best)
        marked = [html.escape(tokenizer.decode([i])) for i in ids[start : t + 1]]
        rows = []
        for k in range(heads.num_heads):
            true = ids[t + k + 2] if t + k + 2 < len(ids) else None
            cells = []
            for p, i in zip(top.values[k].tolist(), top.indices[k].tolist(), strict=True):
                tint = f"background:{TINTS[k % len(TINTS)]};font-weight:bold" if i == true else ""
                word = html.escape(tokenizer.decode([i])).replace("\n", "⏎").replace(" ", "·") or "∅"
                cells.append(f'<td style="{tint};padding:.1em .6em"><code>{word}</code> {p:.0%}</td>')
            word = "" if true is None else html.escape(tokenizer.decode([true])).replace("\n", "⏎").replace(" ", "·")
            rows.append(f"<tr><th>head {k}</th>{''.join(cells)}<td>true: <code>{word}</code></td></tr>")
        said = html.escape(tokenizer.decode([ids[t + 1]]))
        head = f'<pre style="background:#fff;color:#222;white-space:pre-wrap">{"".join(marked)}<b>{said}</b></pre>'
        return f"{head}<table>{''.join(rows)}</table>"

    shown = min(shown, len(positions) - 1)
    if is_headless():
        display(HTML(table(shown)))
        return
    import ipywidgets

    slider = ipywidgets.IntSlider(min=1, max=len(positions), value=shown + 1, description="token")
    view = ipywidgets.HTML(table(shown))
    slider.observe(lambda change: setattr(view, "value", table(change["new"] - 1)), names="value")
    display(ipywidgets.VBox([slider, view]))
