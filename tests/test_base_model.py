"""The base model that ships, and models that cannot be used."""

import copy
import json
import struct

import pytest
import torch
from conftest import EOS, small_llama
from transformers import T5Config

from medusa_nb import base_model
from medusa_nb.base_model import (
    DEFAULT,
    as_dtype,
    context_length,
    eos_token_ids,
    fingerprint,
    load_base_model,
    require_chat_template,
)
from medusa_nb.errors import InputError

WEIGHTS = DEFAULT / "model.safetensors"
shipped = pytest.mark.skipif(not WEIGHTS.exists(), reason="data/base_model has no weights")


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A tiny model on disk, as a user's own would be."""
    small_llama(len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@shipped
def test_shipped_model_is_frozen_and_small():
    model, tokenizer = load_base_model(device="cpu", dtype="float32")
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert 15e6 < model.num_parameters() < 24e6
    assert model.dtype == torch.float32
    assert model.get_output_embeddings().weight.shape[0] == len(tokenizer)
    assert eos_token_ids(model, tokenizer) == [EOS]
    assert context_length(model) == 1024
    require_chat_template(tokenizer)


@shipped
def test_shipped_file_is_bf16_and_under_48_megabytes():
    data = WEIGHTS.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    assert {about["dtype"] for name, about in header.items() if name != "__metadata__"} == {"BF16"}
    assert len(data) < 48e6


def test_own_folder(folder):
    model, tokenizer = load_base_model(folder, device="cpu", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in model.parameters())
    assert tokenizer.eos_token_id == EOS


def test_missing_folder(tmp_path):
    with pytest.raises(InputError, match="cannot load a base model from") as caught:
        load_base_model(tmp_path / "nowhere", device="cpu", dtype="float32")
    assert "\n" not in str(caught.value)


def test_pickled_weights_only(folder):
    (folder / "model.safetensors").unlink()
    torch.save(small_llama().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot load a base model from.*safetensors") as caught:
        load_base_model(folder, device="cpu", dtype="float32")
    assert "\n" not in str(caught.value)


def test_damaged_weights(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="cannot load a base model from"):
        load_base_model(folder, device="cpu", dtype="float32")


def test_encoder_decoder(folder):
    T5Config(vocab_size=50).save_pretrained(folder)
    with pytest.raises(InputError, match="encoder-decoder"):
        load_base_model(folder, device="cpu", dtype="float32")


def test_unknown_dtype():
    assert as_dtype("bfloat16") == torch.bfloat16
    with pytest.raises(InputError, match="unknown dtype 'int3'"):
        load_base_model(dtype="int3", device="cpu")


def test_end_tokens_come_from_both_places(tokenizer):
    model = small_llama()
    for stated, expected in ((None, [4]), (9, [4, 9]), ([7, 4, 2], [2, 4, 7])):
        model.generation_config.eos_token_id = stated
        assert eos_token_ids(model, tokenizer) == expected


def test_no_chat_template(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        require_chat_template(bare)


def test_fingerprint_changes_with_any_byte():
    model = small_llama().to(torch.bfloat16)
    before = fingerprint(model)
    assert fingerprint(small_llama().to(torch.bfloat16)) == before
    with torch.no_grad():
        model.lm_head.weight[3, 3] *= 1.01
    assert fingerprint(model) != before


@pytest.mark.parametrize(
    ("native", "faster", "expected"), [(True, 2.0, "bfloat16"), (True, 1.2, "float32"), (False, 9, "float32")]
)
def test_bf16_only_where_it_is_native_and_clearly_faster(monkeypatch, native, faster, expected):
    monkeypatch.setattr(base_model, "has_native_bf16", lambda: native)
    seconds = {torch.float32: faster, torch.bfloat16: 1.0}
    monkeypatch.setattr(base_model, "_linear_seconds", lambda dtype, hidden: seconds[dtype])
    assert base_model.suitable_dtype("cpu") == getattr(torch, expected)
