"""Exports for TGI and vLLM: read back with their readers' arithmetic, or refused with one sentence."""

import json
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import random_model, small_llama
from transformers import GraniteConfig, PhiConfig

from medusa_nb.errors import InputError
from medusa_nb.export.formats import export
from medusa_nb.export.readers import READERS, check
from medusa_nb.heads import MedusaHeads
from medusa_nb.heads_file import CONFIG, load_heads, save_heads
from medusa_nb.path_heads import PathHeads

SHAPES = [(1, 1, False), (3, 1, False), (3, 1, True), (2, 2, False), (4, 2, True)]


def random_heads(model, count: int = 3, layers: int = 1, own: bool = False) -> MedusaHeads:
    torch.manual_seed(0)
    heads = MedusaHeads(model, count, layers, own)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return heads.requires_grad_(False)


def prompt(length: int = 7) -> torch.Tensor:
    return torch.randint(50, (1, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize(("count", "layers", "own"), SHAPES)
@pytest.mark.parametrize(("to", "version"), [("tgi", 2), ("tgi", 1), ("vllm", 2)])
def test_logits_equal_ours_or_the_format_refuses(tmp_path, small_model, count, layers, own, to, version):
    heads = random_heads(small_model, count, layers, own)
    if to == "tgi" and version == 2 and (own or layers > 1):
        with pytest.raises(InputError, match="export with --version 1"):
            export(heads, tmp_path / "out", to, version=version)
        assert not (tmp_path / "out").exists()
        return
    export(heads, tmp_path / "out", to, version=version)
    hidden = torch.randn(3, 4, 32)
    theirs = READERS[to](tmp_path / "out", small_model.lm_head.weight, hidden)
    assert theirs.shape == (count, 3, 4, 50)
    assert torch.allclose(theirs, heads(hidden), atol=1e-5, rtol=1e-5)
    assert check(tmp_path / "out", to, heads, small_model, prompt()).startswith("read back")
    if to == "tgi":
        assert torch.allclose(load_heads(tmp_path / "out", small_model)(hidden), heads(hidden), atol=1e-5)


@pytest.mark.parametrize("to", ["tgi", "vllm"])
@pytest.mark.parametrize("change", ["missing", "extra", "shape", "value", "not finite"])
def test_check_notices_every_kind_of_damage(tmp_path, small_model, to, change):
    heads = random_heads(small_model)
    export(heads, tmp_path / "out", to)
    file = next((tmp_path / "out").glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("bias"))
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors["9.9.linear.bias"] = torch.zeros(32)
    elif change == "shape":
        tensors[name] = torch.zeros(5)
    else:
        tensors[name] = tensors[name] + (1 if change == "value" else torch.nan)
    save_file(tensors, file)
    with pytest.raises(InputError, match="lacks|ignore|shape|other logits"):
        check(tmp_path / "out", to, heads, small_model, prompt())


@pytest.mark.parametrize("to", ["tgi", "vllm"])
@pytest.mark.parametrize(("heads_dtype", "model_dtype"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_one_notebook_in_fp32_another_in_bf16_and_check_still_works(tmp_path, to, heads_dtype, model_dtype):
    model = small_llama().to(getattr(torch, model_dtype))
    heads = random_heads(model).to(getattr(torch, heads_dtype))
    export(heads, tmp_path / "out", to)
    assert check(tmp_path / "out", to, heads, model, prompt()).startswith("read back")


@pytest.mark.parametrize("to", ["tgi", "vllm"])
def test_scaled_logits_are_the_base_models_business(tmp_path, to):
    """Granite divides its logits; a server does so with the base model's own, and heads only rank tokens."""
    sizes = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = random_model(GraniteConfig(**sizes, intermediate_size=64, logits_scaling=8.0))
    heads = random_heads(model)
    export(heads, tmp_path / "out", to)
    assert check(tmp_path / "out", to, heads, model, prompt()).startswith("read back")


def test_vllm_config_keeps_the_biases(tmp_path, small_model):
    export(random_heads(small_model), tmp_path / "out", "vllm")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["medusa_fc_bias"] is True and config["model_type"] == "medusa"
    config["medusa_fc_bias"] = False  # what its reader assumes if the key is missing
    (tmp_path / "out" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(InputError, match="would ignore"):
        READERS["vllm"](tmp_path / "out", small_model.lm_head.weight, torch.randn(2, 32))


@pytest.mark.parametrize("to", ["tgi", "vllm"])
def test_heads_with_a_draft_vocabulary_go_with_the_whole_lm_head_and_it_is_said_why(tmp_path, small_model, to):
    heads = random_heads(small_model)
    with pytest.warns(UserWarning, match=r"draft 4 tokens.*whole lm_head"):
        export(heads.limited_to(torch.tensor([41, 7, 0, 30])), tmp_path / "out", to)
    hidden = torch.randn(3, 32)
    theirs = READERS[to](tmp_path / "out", small_model.lm_head.weight, hidden)
    assert torch.allclose(theirs, heads(hidden), atol=1e-5, rtol=1e-5)
    assert "token_map" not in load_file(next((tmp_path / "out").glob("*.safetensors")))


@pytest.mark.parametrize("to", ["tgi", "vllm"])
def test_a_draft_vocabulary_with_projections_of_its_own_has_no_whole_lm_head(tmp_path, small_model, to):
    limited = random_heads(small_model, own=True).limited_to(torch.tensor([41, 7]))
    with pytest.raises(InputError, match="draft only 2 tokens"):
        export(limited, tmp_path / "out", to)


def test_a_truncated_vocabulary_which_the_real_engine_refuses_is_refused_by_our_reader(tmp_path, small_model):
    heads = random_heads(small_model)
    export(heads, tmp_path / "out", "vllm")
    file, config = tmp_path / "out/model.safetensors", json.loads((tmp_path / "out" / CONFIG).read_text())
    tensors = load_file(file)
    save_file(tensors | dict(token_map=torch.arange(50)), file)
    with pytest.raises(InputError, match="vLLM 0.32 loads no such heads"):
        check(tmp_path / "out", "vllm", heads, small_model, prompt())
    few = {"token_map": torch.arange(4), "lm_heads.0.weight": tensors["lm_heads.0.weight"][:4].clone()}
    save_file(tensors | few, file)
    (tmp_path / "out" / CONFIG).write_text(json.dumps(config | dict(truncated_vocab_size=4)))
    with pytest.raises(InputError, match="vLLM 0.32 loads no such heads"):
        check(tmp_path / "out", "vllm", heads, small_model, prompt())


@pytest.mark.parametrize(
    ("to", "changes", "message"),
    [
        ("tgi", dict(architectures=["LlamaForCausalLM"]), "not taken for Medusa"),
        ("tgi", dict(medusa_num_heads=None), "not taken for Medusa"),
        ("tgi", dict(medusa_num_layers=2), "medusa_num_layers 1, not 2"),
        ("tgi", dict(medusa_num_heads=4), "lacks 3.0.linear.weight"),
        ("vllm", dict(model_type="llama"), "not taken for Medusa"),
        ("vllm", dict(vocab_size=49), "vocab_size 49, but the base model has 50"),
        ("vllm", dict(num_heads=2), "would ignore"),
        ("vllm", dict(original_lm_head=None), "lacks lm_heads.1.weight"),
    ],
)
def test_a_config_that_its_reader_would_misread_is_refused(tmp_path, small_model, to, changes, message):
    heads = random_heads(small_model)
    export(heads, tmp_path / "out", to)
    config = json.loads((tmp_path / "out" / CONFIG).read_text()) | changes
    changed = {name: value for name, value in config.items() if value is not None}
    (tmp_path / "out" / CONFIG).write_text(json.dumps(changed))
    with pytest.raises(InputError, match=message):
        check(tmp_path / "out", to, heads, small_model, prompt())


def test_vllm_has_no_place_for_a_bias_of_lm_head(tmp_path):
    model = random_model(PhiConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1))
    with pytest.raises(InputError, match="lm_head has a bias, and vLLM's format has no place"):
        export(random_heads(model), tmp_path / "out", "vllm")
    export(random_heads(model, own=True), tmp_path / "out", "vllm")  # own projections have none


@pytest.mark.parametrize("to", ["tgi", "vllm"])
def test_heads_that_see_the_path_are_for_our_own_decoding(tmp_path, small_model, to):
    with pytest.raises(InputError, match="see the path, and .* format has no place for that"):
        export(PathHeads(small_model, 2), tmp_path / "out", to)


def test_unknown_format_and_full_folder(tmp_path, small_model):
    with pytest.raises(InputError, match="unknown format 'onnx'; choose one of tgi, vllm, transformers"):
        export(random_heads(small_model), tmp_path / "out", "onnx")
    (tmp_path / "x").write_text("")
    for folder in (tmp_path, tmp_path / "x"):
        with pytest.raises(InputError, match="is not an empty folder"):
            export(random_heads(small_model), folder, "tgi")


def test_files_can_be_read_by_whoever_the_umask_lets_and_name_no_path_of_this_machine(tmp_path, small_model):
    heads = random_heads(small_model)
    heads.base_name = str(tmp_path / "somewhere" / "SmolLM2")
    save_heads(heads, tmp_path / "saved")
    for to in ("tgi", "vllm"):
        files = export(heads, tmp_path / to, to)
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o644}
        assert str(tmp_path) not in (tmp_path / to / CONFIG).read_text()
