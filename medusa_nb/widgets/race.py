"""The race: decoders write the same answer, live, each on its own clock; then a replay at any speed."""

import io
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import display
from PIL import Image

from medusa_nb.chat import prompt_ids
from medusa_nb.decoding import Decoder
from medusa_nb.errors import InputError
from medusa_nb.stopping import cut_at_end
from medusa_nb.widgets import figures
from medusa_nb.widgets.live import render, watched
from medusa_nb.widgets.style import BASE, HEADS, MUTED, OURS, drafted_by, in_order, show

FRAME = 0.05  # seconds between two pictures of a running race
TRIED = 12  # questions, at most, until one suits


@dataclass
class Lane:
    """One runner of a race: its text so far, who drafted each token, and its own clock."""

    name: str
    pieces: list[str] = field(default_factory=list)
    drafted_by: list[int | None] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # seconds on its own clock at each token
    passes: list[float] = field(default_factory=list)  # the same at the end of each pass
    seconds: float = 0.0

    def until(self, clock: float | None) -> tuple[list[tuple[str, int | None]], str]:
        """Tokens and drafters up to a time on its clock, and the facts about them."""
        clock = self.seconds if clock is None else min(self.seconds, clock)
        shown, passes = (bisect_right(moments, clock) for moments in (self.times, self.passes))
        facts = [f"{clock:.1f} s", f"{shown} tokens"]
        if passes > 1:  # the prompt's pass and its one token do not count
            facts.append(f"{(shown - 1) / (passes - 1):.2f} per pass")
        return list(zip(self.pieces[:shown], self.drafted_by[:shown], strict=True)), " · ".join(facts)


Lanes = dict[str, Lane]


def picture(lanes: Lanes, clock: float | None = None) -> str:
    """All lanes side by side, as HTML."""
    groups = in_order(group for lane in lanes.values() for group in lane.drafted_by)
    shown = [(lane.name, *lane.until(clock)) for lane in lanes.values()]
    return render("lanes", lanes=shown, legend=[(group, drafted_by(group)) for group in groups])


def run_race(
    decoders: dict[str, Decoder],
    tokenizer,
    prompt: torch.Tensor,
    max_new_tokens: int,
    eos: list[int],
    watch: Callable[[Lanes], None] = lambda lanes: None,
) -> Lanes:
    """Let decoders answer the same prompt ``[T]``; ``watch`` sees the lanes about twenty times a second.

    One machine cannot run both at once without one slowing the other. So whoever has used less time goes next: what
    you see at any moment is what each would have written by then.
    """
    for decoder in decoders.values():  # warm up
        list(decoder.decode(decoder.slots_for([prompt], 4)))
    lanes = {name: Lane(name) for name in decoders}
    slots = {name: decoder.slots_for([prompt], max_new_tokens) for name, decoder in decoders.items()}
    runs = {name: decoder.decode(slots[name]) for name, decoder in decoders.items()}
    shown_at = time.perf_counter()
    while runs:
        name = min(runs, key=lambda n: lanes[n].seconds)
        lane, started = lanes[name], time.perf_counter()
        step = next(runs[name], [None])[0]
        if step is None:
            del runs[name]
            continue
        lane.seconds += time.perf_counter() - started
        emitted, ended = cut_at_end(step.emitted, set(eos))
        lane.pieces += [tokenizer.decode([token]) for token in emitted]
        lane.drafted_by += step.drafted_by[: len(emitted)]
        lane.times += [lane.seconds] * len(emitted)
        lane.passes.append(lane.seconds)
        if ended:
            slots[name][0].open = False
        if time.perf_counter() - shown_at > FRAME:
            watch(lanes)
            shown_at = time.perf_counter()
    return lanes


def race(
    decoders: dict[str, Decoder],
    tokenizer,
    questions: list[str],
    max_new_tokens: int,
    eos: list[int],
    keep: Path | None = None,
) -> Lanes:
    """Race for the answer to a user's question, live where somebody watches; then replay it, or ask something else.

    Args:
        questions: the first is taken whose answer comes to an end and is the same text from all decoders: no loop, and
            no near-tie that falls the other way; the first of all if there is none.
        keep: where to write the race as an animated GIF.
    """

    def prompt_of(text: str) -> torch.Tensor:
        return torch.tensor(prompt_ids(tokenizer, [dict(role="user", content=text)]))

    def suits(text: str) -> bool:
        answers = [decoder.generate([prompt_of(text)], max_new_tokens, eos)[0] for decoder in decoders.values()]
        return all(a.stopped_by == "eos" and a.new_tokens == answers[0].new_tokens for a in answers)

    question = next(filter(suits, questions[:TRIED]), questions[0])

    def run(text: str, watch: Callable[[Lanes], None] = lambda lanes: None) -> Lanes:
        return run_race(decoders, tokenizer, prompt_of(text), max_new_tokens, eos, watch)

    if not watched():
        lanes = run(question)
        if keep:
            animation(lanes, keep)
        last = list(lanes.values())[-1]
        figures.tokens(last.pieces, last.drafted_by)
        plot(lanes)
        return lanes
    import ipywidgets

    view = ipywidgets.HTML()
    display(view)

    def watch(lanes: Lanes) -> None:
        view.value = picture(lanes)

    lanes = run(question, watch)
    if keep:
        animation(lanes, keep)
    field = ipywidgets.Textarea(
        value=question, rows=4, layout={"width": "34em", "max_width": "100%"}, description="a prompt"
    )
    again = ipywidgets.Button(description="race again", icon="flag-checkered")

    def rerun(button) -> None:
        again.disabled = True
        try:
            box.children = [replay(run(field.value, watch), view), *box.children[1:]]
        except InputError as error:
            view.value = render("conversation", facts="", messages=[dict(role="not possible", content=str(error))])
        finally:
            again.disabled = False

    again.on_click(rerun)
    box = ipywidgets.VBox([replay(lanes, view), ipywidgets.HBox([field, again], layout={"flex_flow": "row wrap"})])
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
    return ipywidgets.HBox([play, slider, speed], layout={"flex_flow": "row wrap"})


def plot(lanes: Lanes) -> None:
    """Tokens over time for every lane, the prompt's pass marked."""
    figure, axes = plt.subplots()
    last = max(lane.seconds for lane in lanes.values())
    for color, lane in zip((MUTED, OURS, HEADS[2]), lanes.values(), strict=False):
        count, ended = len(lane.times), f"  {lane.name}: {lane.seconds:.1f} s  "
        axes.step([0, *lane.times], range(count + 1), where="post", color=color)
        how: dict = dict(ha="left", va="center") if lane.seconds == last else dict(ha="center", va="bottom")
        axes.annotate(ended, (lane.times[-1], count), color=color, **how)
        axes.plot(lane.passes[0], 1, "o", ms=4, color=color)
    axes.annotate("prompt read", (lane.passes[0], 1), (12, 2), textcoords="offset points", fontsize=8, color=BASE)
    axes.set(xlabel="seconds on its own clock", ylabel="tokens", ylim=(0, None))
    axes.set_xlim(0, last * 1.45)
    show(figure, "; ".join(f"{n}: {len(lane.pieces)} tokens in {lane.seconds:.1f} s" for n, lane in lanes.items()))


def animation(lanes: Lanes, file: Path, frames: int = 60, width: int = 46) -> None:
    """Write the race as an animated GIF that plays in real time: all lanes side by side."""
    end, pictures = max(lane.seconds for lane in lanes.values()), []
    height = max(figures.lines_of(lane.pieces, width) for lane in lanes.values())
    for frame in range(frames + 1):
        images = []
        for lane in lanes.values():
            cells, facts = lane.until(end * frame / frames)
            figure, axes = figures.draw_tokens([c[0] for c in cells], [c[1] for c in cells], width, height)
            axes.text(0, -1.0, f"{lane.name}: {facts}", va="center", fontsize=9, weight="bold", color="#222222")
            data = io.BytesIO()
            figure.savefig(data, format="png", dpi=110, bbox_inches=None)
            plt.close(figure)
            images.append(Image.open(data).convert("RGB"))
        whole = Image.fromarray(np.hstack([np.asarray(image) for image in images]))
        pictures.append(whole.quantize(48))
    durations = [round(1000 * end / frames)] * frames + [2500]
    pictures[0].save(file, save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=True)
