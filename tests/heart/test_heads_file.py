"""Heads on disk: complete, or refused with the name of what is wrong."""

import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_heads import FEW, random_heads
from test_path_heads import random_path_heads
from tiny_models import small_llama

from medusa_nb.errors import InputError
from medusa_nb.heads import MedusaHeads
from medusa_nb.heads_file import CONFIG, WEIGHTS, load_heads, save_heads
from medusa_nb.path_heads import PathHeads

SHAPES = [(K, layers, own) for K in (1, 2, 5) for layers in (1, 2) for own in (False, True)]


@pytest.fixture
def saved(tmp_path, small_model):
    save_heads(random_heads(small_model), tmp_path)
    return tmp_path


def rewrite(folder, **changes):
    """Change tensors of a saved file; None removes one."""
    tensors = load_file(folder / WEIGHTS) | {name.replace("_", "."): t for name, t in changes.items()}
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / WEIGHTS)


def reconfigure(folder, **changes):
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


@pytest.mark.parametrize(("K", "layers", "own"), SHAPES)
def test_they_come_back_as_they_went(tmp_path, small_model, K, layers, own):
    heads, hidden = random_heads(small_model, K, layers, own), torch.randn(7, 32)
    save_heads(heads, tmp_path)
    again = load_heads(tmp_path, small_model)
    assert torch.equal(again(hidden), heads(hidden))
    assert not any(p.requires_grad for p in again.parameters()) and not again.training
    expected = {f"{k}.{i}.linear.{part}" for k in range(K) for i in range(layers) for part in ("weight", "bias")}
    expected |= {f"{k}.{layers}.weight" for k in range(K)} if own else set()
    assert set(load_file(tmp_path / WEIGHTS)) == expected
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["medusa_num_heads"], config["medusa_num_layers"]) == (K, layers)
    assert config["version"] == ("1" if own else "2")


@pytest.mark.parametrize("vocabulary", [None, FEW])
def test_heads_that_see_the_path_come_back_as_they_went(tmp_path, small_model, vocabulary):
    heads, hidden, path = random_path_heads(small_model, 3, vocabulary), torch.randn(4, 32), torch.arange(12).view(4, 3)
    save_heads(heads, tmp_path)
    again = load_heads(tmp_path, small_model)
    assert isinstance(again, PathHeads) and torch.equal(again(hidden, path), heads(hidden, path))
    assert json.loads((tmp_path / CONFIG).read_text())["vocab_size"] == 50
    rewrite(tmp_path, **{"1_path_bias": None})
    with pytest.raises(InputError, match=r"lacks 1\.path\.bias"):
        load_heads(tmp_path, small_model)


def test_a_draft_vocabulary_that_is_damaged(tmp_path, small_model):
    save_heads(random_path_heads(small_model, 3, FEW), tmp_path)
    rewrite(tmp_path, vocabulary=torch.tensor([41, 7, 0, 30, 50]))
    with pytest.raises(InputError, match="different token ids from 0 to 49"):
        load_heads(tmp_path, small_model)
    for damaged in (FEW[:4], None):
        rewrite(tmp_path, vocabulary=damaged)
        with pytest.raises(InputError, match="lacks the draft vocabulary of 5 tokens"):
            load_heads(tmp_path, small_model)


def test_heads_are_loaded_in_the_dtype_of_the_model(saved):
    assert load_heads(saved, small_llama().to(torch.bfloat16)).dtype == torch.bfloat16


def test_both_files_are_readable_by_whoever_the_umask_lets(tmp_path, small_model):
    """CASES 29."""
    before = os.umask(0o022)
    try:
        save_heads(random_heads(small_model), tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o644}


def test_the_config_has_no_path_of_this_machine(tmp_path, small_model):
    heads = random_heads(small_model)
    heads.base_name = str(tmp_path / "my" / "model")
    save_heads(heads, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"] == "model"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_heads_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path, saved, small_model, bad):
    heads = random_heads(small_model)
    heads.bias.data[1, 0, 3] = bad
    with pytest.raises(InputError, match=r"1\.0\.linear\.bias of the heads is not finite; nothing was saved"):
        save_heads(heads, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    rewrite(saved, **{"2_0_linear_bias": torch.full((32,), bad)})
    with pytest.raises(InputError, match=r"2\.0\.linear\.bias is not finite"):
        load_heads(saved, small_model)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file(saved, small_model, name):
    (saved / name).unlink()
    with pytest.raises(InputError, match=f"no {name}"):
        load_heads(saved, small_model)


def test_a_missing_folder(tmp_path, small_model):
    with pytest.raises(InputError, match="no config.json in"):
        load_heads(tmp_path / "nowhere", small_model)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"\xff" * 40, lambda data: b""])
@pytest.mark.parametrize("old", [False, True])
def test_damaged_weights(saved, small_model, damage, old):
    if old:
        torch.save(load_file(saved / WEIGHTS), saved / "medusa_lm_head.pt")
        (saved / WEIGHTS).unlink()
    file = saved / ("medusa_lm_head.pt" if old else WEIGHTS)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match="damaged or cut short|holds more than tensors|not hold tensors") as caught:
        load_heads(saved, small_model)
    assert "\n" not in str(caught.value)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("content", ["tensors", "a harmful object", "a list", "a nested dictionary"])
def test_a_pickled_file_gives_tensors_or_nothing(saved, small_model, content, monkeypatch):
    monkeypatch.chdir(saved)
    tensors = load_file(saved / WEIGHTS)
    expected = load_heads(saved, small_model)
    (saved / WEIGHTS).unlink()
    held = {
        "tensors": tensors,
        "a harmful object": tensors | dict(x=Harmful()),
        "a list": list(tensors.values()),
        "a nested dictionary": dict(state_dict=tensors),
    }[content]
    torch.save(held, saved / "medusa_lm_head.pt")
    if content == "tensors":
        assert torch.equal(load_heads(saved, small_model).weight, expected.weight)
        return
    with pytest.raises(InputError, match="holds more than tensors|not hold tensors by name") as caught:
        load_heads(saved, small_model)
    assert "\n" not in str(caught.value) and not (saved / "executed").exists()


def test_a_missing_an_extra_and_a_misshapen_tensor(saved, small_model):
    whole = load_file(saved / WEIGHTS)
    for changes, message in (
        ({"1_0_linear_bias": None}, r"lacks 1\.0\.linear\.bias"),
        ({"2_7_linear_bias": torch.zeros(32)}, r"holds 2\.7\.linear\.bias"),
        ({"1_0_linear_bias": torch.zeros(16)}, r"1\.0\.linear\.bias has the shape \[16\]"),
        ({"1_0_linear_bias": torch.zeros(1)}, r"1\.0\.linear\.bias has the shape \[1\]"),
        ({"1_0_linear_bias": torch.zeros(32, 32)}, r"1\.0\.linear\.bias has the shape \[32, 32\]"),
        ({"0_0_linear_weight": torch.zeros(())}, "hidden size 1"),
    ):
        save_file(whole, saved / WEIGHTS)
        rewrite(saved, **changes)
        with pytest.raises(InputError, match=message):
            load_heads(saved, small_model)


@pytest.mark.parametrize("own", [False, True])
def test_heads_of_another_base_model(tmp_path, small_model, own):
    save_heads(random_heads(small_model, own=own), tmp_path)
    with pytest.raises(InputError, match=r"hidden size 32\), this model has 64"):
        load_heads(tmp_path, small_llama(hidden_size=64))
    with pytest.raises(InputError, match=r"vocabulary 50\), this model has 51"):
        load_heads(tmp_path, small_llama(vocab_size=51))


def test_path_heads_of_another_base_model(tmp_path, small_model):
    save_heads(random_path_heads(small_model), tmp_path)
    with pytest.raises(InputError, match=r"hidden size 32\), this model has 64"):
        load_heads(tmp_path, small_llama(hidden_size=64))


@pytest.mark.parametrize("own", [False, True])
def test_a_config_that_states_fewer_heads_than_the_file_holds(tmp_path, small_model, own):
    """As the published vicuna heads do: 2 stated, 5 held."""
    save_heads(random_heads(small_model, 5, own=own), tmp_path)
    reconfigure(tmp_path, medusa_num_heads=2)
    with pytest.warns(UserWarning, match="states 2 heads.*holds 5; using 5"):
        heads = load_heads(tmp_path, small_model)
    assert isinstance(heads, MedusaHeads) and heads.num_heads == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a":\n}', "line 2"),
        ("{}", "no whole number 'medusa_num_heads'"),
        ("[]", "a JSON object is expected"),
        ('{"medusa_num_heads": true, "medusa_num_layers": 1}', "no whole number 'medusa_num_heads'"),
        ('{"medusa_num_heads": "3", "medusa_num_layers": 1}', "no whole number 'medusa_num_heads'"),
        ('{"medusa_num_heads": 3}', "no whole number 'medusa_num_layers'"),
        ('{"medusa_num_heads": 3, "medusa_num_layers": 0}', "'medusa_num_layers' of 1 or more"),
        ('{"medusa_num_heads": 9, "medusa_num_layers": 1}', r"lacks 3\.0\.linear\.bias"),
        ('{"medusa_num_heads": 0, "medusa_num_layers": 1}', "'medusa_num_heads' of 1 or more"),
        ('{"medusa_num_heads": -1, "medusa_num_layers": 1}', "'medusa_num_heads' of 1 or more"),
    ],
)
def test_a_config_that_describes_no_heads(saved, small_model, text, message):
    (saved / CONFIG).write_text(text)
    with pytest.raises(InputError, match=message):
        load_heads(saved, small_model)
