"""The recipe of the shipped model: batches, labels, and what it means to unlearn a loop."""

import importlib.util

import numpy as np
import pytest
import torch

from medusa_nb.base_model import ROOT


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("make_base_model", ROOT / "data" / "make_base_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def rows():
    source = np.random.default_rng(0)
    lengths = source.integers(10, 300, 500)
    return [(source.integers(5, 8192, n).astype(np.uint16), int(n) // 2) for n in lengths]


def test_every_row_is_in_one_batch_and_batches_keep_their_size(recipe, rows):
    found = recipe.batches(rows, epoch=3)
    assert sorted(i for batch in found for i in batch) == list(range(len(rows)))
    assert all(len(b) * max(len(rows[i][0]) for i in b) <= recipe.TOKENS_PER_STEP for b in found)
    assert recipe.batches(rows, 3) == found != recipe.batches(rows, 4)


def test_only_the_assistant_is_supervised(recipe, rows):
    ids, labels = recipe.pad(rows, [0, 1])
    for line, (tokens, prompt) in enumerate(rows[:2]):
        assert ids[line, : len(tokens)].tolist() == tokens.tolist()
        assert labels[line, :prompt].eq(-100).all() and labels[line, len(tokens) :].eq(-100).all()
        assert labels[line, prompt : len(tokens)].tolist() == tokens[prompt:].tolist()


def test_repetitions_are_marked_from_the_third_time_on(recipe):
    assert recipe.repeated([1, 2, 3]) == [False] * 3
    text = [9, 8] + [1, 2, 3] * 12 + [7]
    marked = [i for i, again in enumerate(recipe.repeated(text)) if again]
    assert marked == list(range(2 + 6, 2 + 36))


def test_unlikelihood_lowers_the_probability_of_a_token(recipe):
    logits = torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)
    loss = recipe.unlikelihood(logits, torch.tensor([0]))
    p = logits.softmax(-1)[0, 0].item()
    assert loss.item() == pytest.approx(-np.log(1 - p), rel=1e-5)
    loss.backward()
    assert logits.grad[0, 0] > 0 > logits.grad[0, 1]


def test_the_learning_rate_warms_up_and_ends_at_zero(recipe):
    assert recipe.learning_rate(0.01) == pytest.approx(0.5)
    assert recipe.learning_rate(0.02) == pytest.approx(1)
    assert recipe.learning_rate(1.0) == 0


def test_training_resumes_from_its_checkpoint_and_starts_from_given_weights(recipe, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(
        recipe, "CONFIG", recipe.CONFIG | dict(hidden_size=48, intermediate_size=64, num_hidden_layers=1)
    )
    monkeypatch.setattr(torch, "compile", lambda function=None, **options: function or (lambda f: f))
    model, state = recipe.train(rows, tmp_path, minutes=1 / 60, save_every=9)
    again, later = recipe.train(rows, tmp_path, minutes=1 / 60, save_every=9)
    assert later["step"] == state["step"] > 3
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    recipe.export(again, tmp_path / "model")
    (tmp_path / "other").mkdir()
    longer, state = recipe.train(rows, tmp_path / "other", 1 / 60, 9, init=tmp_path / "model", peak=0.5)
    assert state["epoch"] >= 1
    assert longer.config.hidden_size == 48


@pytest.mark.parametrize(
    ("licence", "permitted"),
    [
        ("MIT", True),
        ("BSD-3-Clause", True),
        ("Apache 2.0 / MIT", True),
        ("GPL-3.0", False),
        ("MIT / GPL", False),
        ("", False),
    ],
)
def test_licences(recipe, licence, permitted):
    assert recipe.is_permissive(licence) == permitted


def test_between_two_models(recipe):
    one, other = {"w": torch.tensor([0.0, 2.0])}, {"w": torch.tensor([1.0, 0.0])}
    assert torch.allclose(recipe.between(one, other, 0.25)["w"], torch.tensor([0.25, 1.5]))
