"""The live pieces: what a race shows is what the decoders wrote, and the static pictures appear."""

import pytest
import torch
from conftest import EOS, random_tree
from test_heads import seeing_heads

from medusa_nb import live
from medusa_nb.decoding import Decoder


@pytest.fixture
def shown(monkeypatch):
    """What is displayed."""
    things = []
    monkeypatch.setattr(live, "display", lambda thing, **options: things.append(thing))
    monkeypatch.setattr(live.plt, "show", lambda: things.append("figure"))
    return things


@pytest.fixture
def decoders(tiny_model):
    heads = seeing_heads(tiny_model, 3)
    return {
        "plain": Decoder(tiny_model, capacity=80),
        "Medusa": Decoder(tiny_model, heads, random_tree(3, 9), capacity=80),
    }


def test_both_runners_write_the_text_of_plain_decoding(decoders, tokenizer, shown):
    prompt = torch.arange(5, 15)
    lanes = live.race(decoders, tokenizer, prompt, 30, [EOS])
    expected = decoders["plain"].generate([prompt], 30, [EOS])[0]
    for lane in lanes.values():
        assert lane.pieces == [tokenizer.decode([token]) for token in expected.new_tokens]
        assert len(lane.pieces) == len(lane.times) == len(lane.guessed_by)
        assert lane.times == sorted(lane.times) and lane.seconds >= lane.times[-1]
    assert lanes["plain"].passes == len(expected.new_tokens) and set(lanes["plain"].guessed_by) == {None}
    assert "plain" in shown[0].data and "Medusa" in shown[0].data and shown[-1] == "figure"


def test_a_lane_at_an_earlier_time_shows_what_was_there(tokenizer):
    lane = live.Lane("x", ["a", "b", "<c>"], [None, 0, None], [1.0, 2.0, 3.0], 2, 3.0)
    early = lane.html(2.5)
    assert "2 tokens" in early and "&lt;c&gt;" not in early
    assert "&lt;c&gt;" in lane.html() and "1.50 per pass" in lane.html()


def test_whoever_used_less_time_goes_next(monkeypatch, decoders, tokenizer, shown):
    clock = iter(range(10_000))
    monkeypatch.setattr(live.time, "perf_counter", lambda: float(next(clock)))
    lanes = live.race(decoders, tokenizer, torch.arange(5, 15), 12, [])
    assert lanes["plain"].passes == 12
    assert lanes["Medusa"].seconds <= lanes["plain"].seconds


def test_stepper_and_lens_show_a_picture(tiny_model, decoders, tokenizer, shown):
    live.step_through(decoders["Medusa"], tokenizer, torch.arange(5, 15), 12)
    assert shown == ["figure"]
    messages = [dict(role="user", content="def f(x):"), dict(role="assistant", content="    return x + 1")]
    live.head_lens(tiny_model, seeing_heads(tiny_model, 3), tokenizer, messages, shown=2)
    text = shown[-1].data
    assert text.count("<tr>") == 3 and "head 2" in text and "true:" in text


def test_widgets_follow_their_sliders(monkeypatch, tiny_model, decoders, tokenizer, shown):
    monkeypatch.setattr(live, "is_headless", lambda: False)
    live.step_through(decoders["Medusa"], tokenizer, torch.arange(5, 15), 12)
    slider, image = shown[-1].children
    before = image.value
    slider.value = 1
    assert image.value != before and image.value[:4] == b"\x89PNG"
    messages = [dict(role="user", content="def f(x):"), dict(role="assistant", content="    return x + 1")]
    live.head_lens(tiny_model, seeing_heads(tiny_model, 3), tokenizer, messages)
    slider, view = shown[-1].children
    before = view.value
    slider.value = slider.max
    assert view.value != before
    live.replay({"x": live.Lane("x", ["a", "b"], [None, 0], [1.0, 2.0], 1, 2.0)})
    slider, view = shown[-1].children[0].children[1], shown[-1].children[1]
    slider.value = 50
    assert "1 tokens" in view.value
