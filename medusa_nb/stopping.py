"""Where a text ends: accepted runs are cut after an end token, a stop string, or what stopping criteria say."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Stops:
    """What ends a text: end tokens, strings (with the tokenizer that writes them), transformers' stopping criteria."""

    ends: set[int]
    strings: list[str] | None = None
    tokenizer: Any = None
    criteria: Any = None

    def cut(self, prompt: torch.Tensor, text: list[int], emitted: list[int]) -> tuple[list[int], str]:
        """What is left of the tokens ``emitted`` after ``text``, and what ended it, empty if nothing did."""
        emitted, stopped = cut_at_end(emitted, self.ends)
        if self.strings:
            emitted, found = cut_at_string(text, emitted, self.strings, self.tokenizer)
            stopped = "stop string" if found else stopped
        if self.criteria:
            emitted, found = cut_at_criteria(torch.cat([prompt, prompt.new_tensor(text)]), emitted, self.criteria)
            stopped = "stopping criteria" if found else stopped
        return emitted, stopped


def cut_at_end(emitted: list[int], ends: set[int]) -> tuple[list[int], str]:
    """Drop what an accepted run holds after an end token; ``"eos"`` if there was one, else empty."""
    for i, token in enumerate(emitted):
        if token in ends:
            return emitted[: i + 1], "eos"
    return emitted, ""


def cut_at_criteria(before: torch.Tensor, emitted: list[int], criteria) -> tuple[list[int], bool]:
    """Drop what follows the token after which transformers' stopping criteria end the text; say whether they do."""
    for i in range(len(emitted)):
        text = torch.cat([before, before.new_tensor(emitted[: i + 1])]).unsqueeze(0)
        if bool(torch.as_tensor(criteria(text, None)).all()):
            return emitted[: i + 1], True
    return emitted, False


def cut_at_string(text: list[int], emitted: list[int], stops: list[str], tokenizer) -> tuple[list[int], bool]:
    """Drop what follows the token that completes a stop string; say whether there was one."""
    tail = text[-max(map(len, stops)) :]  # a stop string spans at most as many tokens as it has characters
    before = len(tokenizer.decode(tail))
    for i in range(len(emitted)):
        written = tokenizer.decode(tail + emitted[: i + 1])
        if any(written.find(stop, max(0, before - len(stop) + 1)) >= 0 for stop in stops):
            return emitted[: i + 1], True
    return emitted, False
