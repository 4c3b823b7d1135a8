"""The recipe of the shipped model: batches, labels, and what it means to unlearn a loop."""

import importlib.util

import numpy as np
import pytest
import torch

from medusa_nb.base_model import ROOT
from medusa_nb.errors import InputError


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


def test_the_third_time_is_where_a_loop_is_entered(recipe):
    assert recipe.onset([1, 2, 3]) == [False] * 3
    text = [9, 8] + [1, 2, 3] * 12 + [7]
    marked = [i for i, enters in enumerate(recipe.onset(text)) if enters]
    assert marked == [2 + 6, 2 + 7, 2 + 8]


def test_answers_are_cut_behind_the_entry_into_their_loop(recipe):
    short, long = ([5, 6], [1, 2] * 20), ([5], [9] * 4 + [1, 2, 3] * 20)
    ids, enters = recipe.pad_answers([short, long])
    assert ids.shape == enters.shape == (2, 16)
    assert ids[0, :8].tolist() == [5, 6, 1, 2, 1, 2, 1, 2] and ids[0, 8:].eq(0).all()
    assert enters[0].nonzero()[:, 0].tolist() == [6, 7]
    assert ids[1][enters[1]].tolist() == [1, 2, 3] and ids[1].nonzero()[-1].item() == enters[1].nonzero()[-1].item()


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


@pytest.fixture
def small(recipe, monkeypatch):
    """A model so small that a second of training is many steps, and nothing is compiled."""
    sizes = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=1)
    monkeypatch.setattr(recipe, "CONFIG", recipe.CONFIG | sizes)
    monkeypatch.setattr(torch, "compile", lambda function=None, **options: function or (lambda f: f))


def test_training_resumes_and_another_run_goes_on(recipe, rows, tmp_path, monkeypatch, small):
    monkeypatch.setattr(recipe, "LOOP_CHECKS", ())
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir(), other.mkdir()
    model, state = recipe.train(rows, [0], one, minutes=1 / 60, save_every=9)
    again, later = recipe.train(rows, [0], one, minutes=1 / 60, save_every=9)
    assert later == state and state["step"] > 3
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    _, longer = recipe.train(rows, [0], other, 1 / 60, 9, earlier=one, peak=0.5)
    assert longer["step"] > 3 and (longer["epoch"], longer["batch"]) > (state["epoch"], state["batch"])


def test_a_finished_model_grows_by_layers_that_change_nothing_yet(recipe, rows, tmp_path, monkeypatch, small):
    monkeypatch.setattr(recipe, "CONFIG", recipe.CONFIG | dict(num_hidden_layers=2))
    finished = recipe.starting_model(None)
    finished.save_pretrained(tmp_path / "finished")
    monkeypatch.setattr(recipe, "CONFIG", recipe.CONFIG | dict(num_hidden_layers=3))
    grown = recipe.starting_model(tmp_path / "finished")
    assert len(grown.model.layers) == 3
    ids = torch.arange(5, 45).view(2, 20)
    torch.testing.assert_close(grown(ids).logits, finished(ids).logits)
    monkeypatch.setattr(recipe, "LOOP_CHECKS", ())
    trained, state = recipe.train(rows, [0], tmp_path, 1 / 60, 9, earlier=tmp_path / "finished")
    assert state["step"] > 3 and all(layer.mlp.down_proj.weight.any() for layer in trained.model.layers)


def test_loops_are_looked_for_and_trained_against(recipe, rows, tmp_path, monkeypatch, small):
    loop, seen = ([5, 6, 3], [7, 8] * 30), []
    monkeypatch.setattr(recipe, "LOOP_CHECKS", (0.0, 0.5))
    monkeypatch.setattr(recipe, "LOOP_PROMPTS", 4)
    monkeypatch.setattr(recipe, "find_loops", lambda *arguments, seed: seen.append(seed) or [loop])
    model, state = recipe.train(rows, [0], tmp_path, minutes=2 / 60, save_every=9)
    assert seen == [0, 1] and state["loop_shares"] == [0.25, 0.25]

    def going_on():
        ids = torch.tensor([loop[0] + loop[1][:5]])
        return model(ids).logits[0, -1].softmax(-1)[loop[1][5]].item()

    trained = going_on()
    torch.manual_seed(recipe.SEED)
    monkeypatch.setattr(recipe, "LOOP_CHECKS", ())
    (tmp_path / "plain").mkdir()
    model, _ = recipe.train(rows, [0], tmp_path / "plain", minutes=2 / 60, save_every=9)
    assert trained < going_on()


def test_found_loops_are_the_models_own(recipe, rows, monkeypatch):
    monkeypatch.setattr(recipe, "LOOP_PROMPTS", 6)
    asked = []

    def answers(model, prompts, limit, ends):
        asked.extend(prompts)
        return [([1, 2] * 40 if i % 2 else [1, 2, 3], True) for i in range(len(prompts))]

    monkeypatch.setattr(recipe, "generate_batch", answers)
    found = recipe.find_loops(torch.nn.Identity(), rows, [3, 4, 5], seed=1)
    assert len(asked) == 6 and [prompt for prompt, _ in found] == asked[1::2]
    likely = [rows[i][0][: rows[i][1]].tolist() for i in (3, 4, 5)]
    assert sorted(asked[:3]) == sorted(likely)


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


def test_answers_are_judged_and_shown_without_docstrings(recipe, tokenizer, monkeypatch):
    prompt = '@cached\ndef f{}(x):\n    """Somebody else\'s words."""'
    prompts = [prompt.format(i) + " " * 300 * (i == 1) for i in range(4)]  # the second one is too long to show
    functions = [recipe.Function(f"f{i}", "f.py", text, "    return x") for i, text in enumerate(prompts)]
    said = ["    return x", "    return x", "    return (", "    x = 1\n" * 60]
    answers = [(tokenizer(text)["input_ids"], True) for text in said]
    monkeypatch.setattr(recipe, "generate_batch", lambda model, prompts, limit, ends: answers)
    report = recipe.judge_answers(None, tokenizer, functions)
    assert report["loops_test_stdlib"] == 1 / 4 and report["valid_test_stdlib"] == 3 / 4
    assert [sample["id"] for sample in report["samples"]] == ["f0", "f2", "f3"]
    assert report["samples"][0] == dict(id="f0", signature="@cached\ndef f0(x):", answer="    return x")


def test_picked_answers_are_those_of_the_list(recipe, tokenizer, monkeypatch, tmp_path):
    prompts = ["def f(x):", "def g(x):" + " " * 300, "def h(x):"]
    functions = [recipe.Function(prompt[4], "f.py", prompt, "    return x") for prompt in prompts]
    asked = []

    def answer(model, prompts, limit, ends):
        asked.extend(prompts)
        return [(tokenizer(f"    return {i}")["input_ids"], True) for i in range(len(prompts))]

    monkeypatch.setattr(recipe, "generate_batch", answer)
    file = tmp_path / "list.txt"
    file.write_text("# answers read: 40\n# by hand\nh\n\nf\n")
    report = recipe.picked_answers(None, tokenizer, functions, file)
    assert [(row["id"], row["answer"]) for row in report["picked"]] == [("h", "    return 0"), ("f", "    return 1")]
    assert report["answers_read"] == 40 and len(asked) == 2
    for text, message in (("# answers read: 9\nk", "names 'k', which is none"), ("f", "does not say how many answers")):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            recipe.picked_answers(None, tokenizer, functions, file)


@pytest.mark.parametrize(
    ("text", "valid"), [("x = 1", True), ("x = (", False), ("x = '\0'", False), ("  x\n y", False)]
)
def test_valid_python(recipe, text, valid):
    assert recipe.is_python(text) == valid
