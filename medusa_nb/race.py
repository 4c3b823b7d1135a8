"""The race: decoders write the same answer, live, each on its own clock; then a replay at any speed."""

import html
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import matplotlib.pyplot as plt
import torch
from IPython.display import HTML, display

from medusa_nb.decoding import Decoder, cut_at_end
from medusa_nb.display import BASELINE, HEAD_COLORS, guesser, in_order, legend_html, show, tint_of
from medusa_nb.errors import InputError
from medusa_nb.progress import is_headless

FRAME = 0.05  # seconds between two pictures of a running race


@dataclass
class Lane:
    """One runner of a race: its text so far, who guessed each token, and its own clock."""

    name: str
    pieces: list[str] = field(default_factory=list)
    guessed_by: list[int | None] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # seconds on its own clock at each token
    passes: list[float] = field(default_factory=list)  # the same at the end of each pass
    seconds: float = 0.0

    def html(self, until: float | None = None) -> str:
        """The lane's text up to a time on its clock, tinted by the head that guessed each token."""
        clock = self.seconds if until is None else min(self.seconds, until)
        shown, passes = (sum(t <= clock for t in moments) for moments in (self.times, self.passes))
        spans = []
        for piece, head in zip(self.pieces[:shown], self.guessed_by[:shown], strict=True):
            spans.append(f'<span style="{tint_of(head)}">{html.escape(piece)}</span>')
        facts = [f"{shown} tokens", f"{clock:.2f} s"]
        if clock:
            facts.append(f"{shown / clock:.0f} tokens/s")
        if passes > 1:  # the prompt's pass and its one token do not count
            facts.append(f"{(shown - 1) / (passes - 1):.2f} tokens per pass")
        style = "white-space:pre-wrap;background:#fff;color:#222;border:1px solid #ddd;padding:.5em;min-height:6em"
        head = f"<b>{html.escape(self.name)}</b> &nbsp; {' &nbsp; '.join(facts)}"
        return f'<div style="margin:.3em 0">{head}<pre style="{style}">{"".join(spans)}</pre></div>'


Lanes = dict[str, Lane]


def picture(lanes: Lanes, until: float | None = None) -> str:
    """All lanes one below the other, and what the tints mean."""
    used = in_order(head for lane in lanes.values() for head in lane.guessed_by)
    return "".join(lane.html(until) for lane in lanes.values()) + legend_html({head: guesser(head) for head in used})


def run_race(
    decoders: dict[str, Decoder],
    tokenizer,
    prompt: torch.Tensor,
    max_new_tokens: int,
    eos: list[int],
    watch: Callable[[Lanes], None] = lambda lanes: None,
) -> Lanes:
    """Let decoders answer the same prompt ``[T]``; ``watch`` sees the lanes about twenty times a second.

    One machine cannot run both at once without one slowing the other. So whoever has used less time goes
    next: what you see at any moment is what each would have written by then.
    """
    for decoder in decoders.values():  # warm up
        list(decoder.decode([prompt], 4))
    lanes = {name: Lane(name) for name in decoders}
    runs = {name: decoder.decode([prompt], max_new_tokens) for name, decoder in decoders.items()}
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
        lane.passes.append(lane.seconds)
        if ended:
            del runs[name]
        if time.perf_counter() - shown_at > FRAME:
            watch(lanes)
            shown_at = time.perf_counter()
    return lanes


def race(
    decoders: dict[str, Decoder],
    tokenizer,
    prompt: torch.Tensor,
    max_new_tokens: int,
    eos: list[int],
    ask: Callable[[str], torch.Tensor] | None = None,
    text: str = "",
) -> Lanes:
    """Race on the prompt ``[T]``, live where somebody watches, and offer a replay.

    Args:
        ask: turns a text into a prompt ``[T]``: then readers may race again on a prompt of their own.
        text: what stands in their field at first.
    """
    if is_headless():
        lanes = run_race(decoders, tokenizer, prompt, max_new_tokens, eos)
        display(HTML(picture(lanes)))
        plot_race(lanes)
        return lanes
    import ipywidgets

    view = ipywidgets.HTML()
    display(view)

    def watch(lanes: Lanes) -> None:
        view.value = picture(lanes)

    lanes = run_race(decoders, tokenizer, prompt, max_new_tokens, eos, watch)
    controls = [replay(lanes, view)]
    if ask is not None:
        field = ipywidgets.Textarea(value=text, rows=3, layout={"width": "34em"}, description="a prompt")
        again = ipywidgets.Button(description="race again", icon="flag-checkered")

        def rerun(button) -> None:
            again.disabled = True
            try:
                fresh = run_race(decoders, tokenizer, ask(field.value), max_new_tokens, eos, watch)
                box.children = [replay(fresh, view), *box.children[1:]]
            except InputError as error:
                view.value = f'<p role="alert">{html.escape(str(error))}</p>'
            finally:
                again.disabled = False

        again.on_click(rerun)
        controls.append(ipywidgets.HBox([field, again]))
    box = ipywidgets.VBox(controls)
    display(box)
    return lanes


def replay(lanes: Lanes, view):
    """A slider over the race's time that moves ``view``, with a play button and a choice of speed."""
    import ipywidgets

    end = max(lane.seconds for lane in lanes.values())
    play = ipywidgets.Play(value=100, min=0, max=100, interval=100, description="replay")
    slider = ipywidgets.IntSlider(min=0, max=100, value=100, description="time, %")
    speed = ipywidgets.Dropdown(options=[("slow", 300), ("normal", 100), ("fast", 30)], value=100, description="speed")

    def move(change) -> None:
        view.value = picture(lanes, None if change["new"] == 100 else end * change["new"] / 100)

    move({"new": 100})
    slider.observe(move, names="value")
    ipywidgets.jslink((play, "value"), (slider, "value"))
    speed.observe(lambda change: setattr(play, "interval", change["new"]), names="value")
    return ipywidgets.HBox([play, slider, speed])


def plot_race(lanes: Lanes) -> None:
    """Tokens over time for every lane."""
    for i, lane in enumerate(lanes.values()):
        color = HEAD_COLORS[0] if i else BASELINE
        plt.step([0, *lane.times], range(len(lane.times) + 1), where="post", color=color, label=lane.name)
    plt.xlabel("seconds on its own clock")
    plt.ylabel("tokens")
    plt.ylim(bottom=0)
    plt.legend()
    show("; ".join(f"{lane.name}: {len(lane.pieces)} tokens in {lane.seconds:.2f} s" for lane in lanes.values()))
