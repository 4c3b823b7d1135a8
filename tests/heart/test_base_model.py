"""Any base model: loaded whole and frozen in a dtype that suits the machine, or refused in one sentence."""

import json
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import random_model, small_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CohereConfig, Gemma2Config, GptOssConfig, GraniteConfig, PreTrainedTokenizerFast, T5Config

from medusa_nb import base_model
from medusa_nb.base_model import (
    as_dtype,
    as_ids,
    base_fingerprint,
    context_length,
    dtype_name,
    eos_token_ids,
    fingerprint,
    load_base_model,
    logits_of,
    suitable_device,
    suitable_dtype,
    weights_state,
)
from medusa_nb.errors import InputError

WORDS = 50
SIZES = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SIZES |= dict(intermediate_size=64, max_position_embeddings=96, pad_token_id=0, head_dim=8)


def load(folder, **options):
    return load_base_model(folder, **(dict(device="cpu", dtype="float32") | options))


def refused(folder, message: str, **options) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.fixture(scope="module")
def fifty_words(tmp_path_factory):
    """A model folder of fifty tokens, quickly read."""
    folder = tmp_path_factory.mktemp("fifty")
    words = Tokenizer(models.WordLevel({f"word{i}": i for i in range(WORDS)}, unk_token="word0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="word4").save_pretrained(folder)
    small_llama(WORDS).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(fifty_words, tmp_path):
    """A model folder that a test may change."""
    return shutil.copytree(fifty_words, tmp_path / "model")


def change(file, **changes) -> None:
    values = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize("dtype", ["float32", torch.bfloat16])
def test_a_folder_is_loaded_frozen(tiny_folder, tiny_model, dtype):
    model, tokenizer = load(tiny_folder, dtype=dtype)
    assert model.dtype == as_dtype(dtype) and not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model.lm_head.weight, tiny_model.lm_head.weight.to(model.dtype))
    assert eos_token_ids(model, tokenizer) == [tokenizer.eos_token_id] and context_length(model) == 1024


def test_a_missing_tensor_is_not_made_up(folder):
    """CASES 5."""
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"):
        left = {key: tensor for key, tensor in tensors.items() if key != name}
        save_file(left, folder / "model.safetensors", metadata={"format": "pt"})
        refused(folder, f"lacks {name}")


def test_a_tensor_of_another_shape_is_not_made_up(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(32, 63)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, "down_proj.weight|size mismatch|ignore_mismatched")
    refused(folder, "has the wrong shape for model.layers.0.mlp.down_proj.weight", ignore_mismatched_sizes=True)


def test_what_is_no_usable_folder(folder, tmp_path):
    refused(tmp_path / "nowhere", "cannot load a base model from")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "cannot load a base model from")
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    for damaged in (data[: len(data) // 2], data[:4], b"", b"\xff" * 100):
        weights.write_bytes(damaged)
        refused(folder, "cannot load a base model from")
    weights.unlink()
    torch.save(small_llama().state_dict(), folder / "pytorch_model.bin")
    refused(folder, "cannot load a base model from.*safetensors")
    (folder / "config.json").write_text("{")
    refused(folder, "cannot load a base model from")
    (folder / "config.json").write_text('{"model_type": "of tomorrow"}')
    refused(folder, "cannot load a base model from")
    T5Config(vocab_size=50).save_pretrained(folder)
    refused(folder, "encoder-decoder")


def test_a_tokenizer_that_cannot_be_read(folder):
    (folder / "tokenizer.json").write_text("{}")
    refused(folder, "cannot load a base model from")


def test_code_of_a_models_own_is_not_run_unasked(folder, monkeypatch):
    (folder / "own.py").write_text("raise SystemExit('executed')")
    change(folder / "config.json", model_type="own", auto_map=dict(AutoConfig="own.Own", AutoModelForCausalLM="own.M"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question nobody can answer"))
    refused(folder, "cannot load a base model from.*trust_remote_code|custom code")


@pytest.mark.parametrize(
    "how",
    [
        dict(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        dict(quant_method="gptq", bits=4, group_size=128, desc_act=False),
        dict(quant_method="awq", bits=4, group_size=128, zero_point=True, version="gemm"),
        dict(quant_method="aqlm"),
        dict(quant_method="hqq", quant_config={}),
        dict(quant_method="compressed-tensors", config_groups={}),
        dict(),
    ],
)
def test_quantised_weights_without_their_package_are_one_sentence(folder, how):
    """CASES 32."""
    change(folder / "config.json", quantization_config=how)
    refused(folder, "cannot load a base model from")


def test_more_ids_than_the_embedding_has_rows(folder):
    """CASES 36."""
    small_llama(WORDS - 1).save_pretrained(folder)
    refused(folder, f"knows {WORDS} tokens and the model only {WORDS - 1}")


def test_one_id_far_behind_the_others(folder):
    """CASES 36: the number of tokens is small enough, the largest id is not."""
    values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = values["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary[last] += 500
    (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    refused(folder, f"knows {WORDS + 500} tokens and the model only {WORDS}")


def test_a_larger_embedding_than_the_tokenizer_needs(folder):
    small_llama(WORDS + 64).save_pretrained(folder)
    assert load(folder)[0].lm_head.weight.shape[0] == WORDS + 64


@pytest.mark.parametrize("config", ["gemma2", "gpt_oss"])
def test_a_model_without_torchs_attention_takes_its_own(tiny_folder, tokenizer, tmp_path, config):
    """CASES 33."""
    sizes = SIZES | dict(vocab_size=len(tokenizer))
    if config == "gemma2":
        made = random_model(Gemma2Config(**sizes, sliding_window=8))
    else:
        made = random_model(GptOssConfig(**sizes, num_local_experts=2, num_experts_per_tok=1, sliding_window=8))
    made.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load(tmp_path)
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, made(ids).logits, atol=1e-4)


def test_the_dtype_is_a_rule_not_a_timing(monkeypatch):
    """CASES 6."""
    for clock in ("time", "perf_counter", "perf_counter_ns", "monotonic"):
        monkeypatch.setattr(time, clock, lambda: pytest.fail("something is timed"))
    assert len({suitable_dtype("cpu") for _ in range(20)}) == 1
    for capability, expected in (
        ({}, torch.float32),
        (dict(avx512_bf16=False, amx_bf16=False, avx512=True), torch.float32),
        (dict(avx512_bf16=True), torch.bfloat16),
        (dict(amx_bf16=True), torch.bfloat16),
        (dict(bf16=True, sve=True), torch.bfloat16),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capability=capability: capability)
        assert suitable_dtype("cpu") == suitable_dtype(torch.device("cpu")) == expected


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_emulated_bf16_does_not_count(monkeypatch, native, expected):
    """CASES 37: a T4 emulates bf16, several times slower than fp16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert suitable_dtype("cuda") == suitable_dtype("cuda:0") == expected


def test_every_place_gets_the_same_dtype(fifty_words):
    """CASES 6: without an argument, two loads agree."""
    assert load(fifty_words, dtype=None)[0].dtype == suitable_dtype("cpu") == load(fifty_words, dtype=None)[0].dtype


def test_device_and_dtype_by_name():
    assert suitable_device().type in ("cpu", "cuda", "mps", "xpu")
    assert as_dtype("bfloat16") == as_dtype(torch.bfloat16) == torch.bfloat16
    assert dtype_name(torch.bfloat16) == "bfloat16"
    with pytest.raises(InputError, match="unknown dtype 'int3'; choose one of float32, bfloat16, float16"):
        load_base_model("nowhere", dtype="int3", device="cpu")


def test_end_tokens_come_from_both_places(tokenizer):
    model, own = small_llama(), tokenizer.eos_token_id
    for stated in (None, 9, [7, 4], torch.tensor(9), torch.tensor([7, 4])):
        model.generation_config.eos_token_id = stated
        assert eos_token_ids(model, tokenizer) == sorted(as_ids(stated) | {own})
    assert as_ids([7, torch.tensor(4)]) == {4, 7}


def test_the_context_a_model_states():
    assert context_length(small_llama(context=77)) == 77
    for stated, expected in ((dict(n_positions=12), 12), (dict(max_seq_len=9), 9), ({}, None)):
        config = SimpleNamespace(**stated)
        assert context_length(SimpleNamespace(config=SimpleNamespace(get_text_config=lambda c=config: c))) == expected


@pytest.mark.parametrize(
    "config",
    [
        GraniteConfig(**SIZES, logits_scaling=8.0),
        Gemma2Config(**SIZES, final_logit_softcapping=3.0, sliding_window=8),
        CohereConfig(**SIZES, logit_scale=0.2),
        None,
    ],
    ids=["scaled", "capped", "multiplied", "plain"],
)
def test_states_become_the_models_own_logits(config):
    """CASES 2."""
    model, ids = small_llama(60) if config is None else random_model(config), torch.arange(14).view(2, 7)
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state
        assert torch.allclose(logits_of(model)(hidden), model(ids).logits, atol=1e-5)
        plain = model.lm_head(hidden)
    assert torch.allclose(plain, logits_of(model)(hidden)) == (config is None)


def test_logits_follow_a_change_of_the_weights():
    model, hidden = small_llama(), torch.randn(1, 3, 32)
    function = logits_of(model)
    before = function(hidden)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert torch.allclose(function(hidden), 2 * before, atol=1e-4)


def test_a_fingerprint_changes_with_any_byte():
    model = small_llama().to(torch.bfloat16)
    whole, base, state = fingerprint(model), base_fingerprint(model), weights_state(model)
    again = small_llama().to(torch.bfloat16)
    assert (fingerprint(again), base_fingerprint(again)) == (whole, base)
    assert base_fingerprint(small_llama()) == base  # whatever it was loaded in
    with torch.no_grad():
        model.lm_head.weight[3, 3] *= 1.01
    assert fingerprint(model) != whole and base_fingerprint(model) != base and weights_state(model) != state
    assert base_fingerprint(small_llama(num_hidden_layers=3)) != base


def test_nothing_is_shown_while_nobody_watches(fifty_words, capfd):
    load(fifty_words)
    assert base_model.is_headless() and "Loading weights" not in "".join(capfd.readouterr())
