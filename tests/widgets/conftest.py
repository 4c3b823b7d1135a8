"""What is displayed, and somebody who watches."""

import pytest
import torch
from random_heads import randomised

from medusa_nb.decoding import Decoder
from medusa_nb.drafting import GrowingTree
from medusa_nb.heads import MedusaHeads
from medusa_nb.path_heads import PathHeads
from medusa_nb.widgets import answers, game, lens, live, monitor, planner, race, stepper, style

WORTH = torch.tensor([[0.0, 0.0], [0.6, 0.4]])  # of copied tokens, by the length of the match
MODULES = (answers, game, lens, live, monitor, planner, race, stepper, style)


@pytest.fixture
def shown(monkeypatch):
    """What is displayed: widgets as they are, figures as their description."""
    things = []

    def display(thing, **options):
        things.append(thing.get("text/plain") if isinstance(thing, dict) else thing)

    for module in MODULES:
        monkeypatch.setattr(module, "display", display, raising=False)
    return things


@pytest.fixture
def live(monkeypatch):
    """Somebody is watching."""
    for module in MODULES:
        monkeypatch.setattr(module, "watched", lambda: True, raising=False)


@pytest.fixture(scope="session")
def heads(tiny_model):
    """Three plain heads of the tiny model."""
    return randomised(MedusaHeads(tiny_model, 3))


@pytest.fixture(scope="session")
def seeing_heads(tiny_model):
    """Three heads that see the path."""
    return randomised(PathHeads(tiny_model, 3))


@pytest.fixture
def runners(tiny_model, seeing_heads):
    """A plain loop, and one with heads in a growing tree that also copies."""
    draft = GrowingTree(seeing_heads, 8, ngram_worth=WORTH)
    return {"plain": Decoder(tiny_model, max_length=100), "heads": Decoder(tiny_model, max_length=100, draft=draft)}
