"""The training monitor: loss and accuracy of every head grow while it trains, and a button stops it."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
from IPython.display import display
from transformers import TrainerCallback

from medusa_nb.widgets.figures import draw_training
from medusa_nb.widgets.live import watched
from medusa_nb.widgets.style import png

SHARE = 0.02  # at most this share of the training time is spent on drawing


class TrainingMonitor(TrainerCallback):
    """A callback for :func:`medusa_nb.training.train.train`; silent where nobody watches.

    The stop button ends the training at the next step; what was learned until then is kept and saved. A kernel hears
    its widgets only while no cell computes in its main thread, so train through :meth:`watch`.
    """

    def __init__(self, num_heads: int):
        self.num_heads, self.stopped = num_heads, False
        self.log: list[dict] = []
        self.drawing = self.drawn_at = 0.0
        self.image: Any = None  # a widget, where somebody watches

    async def watch(self, train: Callable[..., dict], *arguments) -> dict:
        """``await`` this in a cell: ``train(*arguments, [self])`` in a thread of its own.

        An interrupted cell stops the training like the button does.
        """
        self.stopped = False
        try:
            return await asyncio.to_thread(train, *arguments, [self])
        finally:
            self.stop()

    def stop(self, *_) -> None:
        """End the training at the next step."""
        self.stopped = True

    def on_train_begin(self, args, state, control, **kwargs):
        self.log = []
        if not watched():
            return
        import ipywidgets

        button = ipywidgets.Button(description="stop, keep what was learned", icon="stop", layout={"width": "auto"})
        button.on_click(self.stop)
        self.figure = plt.figure(figsize=(7.6, 2.7))
        plt.close(self.figure)  # the inline back end must not show it on its own
        self.words = ipywidgets.HTML()
        self.image = ipywidgets.Image(format="png", layout={"max_width": "100%", "width": "760px"})
        display(ipywidgets.VBox([ipywidgets.HBox([button, self.words]), self.image]))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "head0_loss" not in (logs or {}):
            return
        self.log.append(logs | {"step": state.global_step})
        if self.image and time.perf_counter() - self.drawn_at > self.drawing / SHARE:
            self.draw(state)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or self.stopped

    def on_train_end(self, args, state, control, **kwargs):
        if self.image:
            self.draw(state)

    def draw(self, state) -> None:
        """Show the curves up to now; how long that took decides when it may happen again."""
        started = time.perf_counter()
        self.figure.clear()
        draw_training(self.figure, self.log, self.num_heads)
        self.image.value = png(self.figure)
        note = " (stopped)" if self.stopped else ""
        self.words.value = f"step {state.global_step} of {state.max_steps}{note}"
        self.drawn_at = time.perf_counter()
        taken = self.drawn_at - started
        self.drawing = min(self.drawing or taken, taken)  # the first picture also loads fonts
