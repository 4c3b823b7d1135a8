"""Compiled steps give the eager text; where nothing compiles, decoding goes on and one sentence says why."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from drafts import FEW, own_text, path_heads, prompt, random_heads
from tiny_models import random_model, random_tree, small_llama
from torch._dynamo.utils import counters
from transformers import Gemma3TextConfig, GPT2Config, MistralConfig

from medusa_nb import compilation
from medusa_nb.compilation import FastModel
from medusa_nb.decoding import Decoder
from medusa_nb.drafting import GrowingTree
from medusa_nb.packing import attention

WORTH = torch.tensor([[0.0] * 4, [0.3, 0.2, 0.1, 0.05], [0.6, 0.5, 0.4, 0.3], [0.9, 0.8, 0.7, 0.6]])
SIZES = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
SIZES |= dict(num_key_value_heads=2, max_position_embeddings=96, pad_token_id=0, eos_token_id=4)
HERE = Path(__file__).parent


def compiled_decoder(model, slots: int = 1, **options) -> Decoder:
    decoder = Decoder(model, max_length=96, slots=slots, **options)
    assert decoder.compile() and decoder.compiled, decoder.why_eager
    assert decoder.why_eager == ""
    return decoder


def graphs() -> int:
    """How many graphs the compiler has made so far."""
    return counters["stats"]["unique_graphs"]


@pytest.mark.compiler
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["static", "growing"])
def test_the_compiled_step_gives_the_same_text(kind, compiler_works):
    model = small_llama(seed=5)
    if kind == "static":
        decoder = compiled_decoder(model, heads=random_heads(model, 3, seed=5), tree=random_tree(3, 9, seed=5))
    else:
        decoder = compiled_decoder(model, draft=GrowingTree(path_heads(model, 3, vocabulary=FEW), 9, ngram_worth=WORTH))
    before = graphs()
    for length in (1, 2, 25, 60):
        ids = prompt(length, length)
        assert decoder.generate([ids], 30, [3])[0].new_tokens == own_text(model, ids, 30, 3)
    with torch.inference_mode():
        assert decoder.generate([ids], 30, [3])[0].new_tokens == own_text(model, ids, 30, 3)
    assert graphs() == before  # attention reads more and more; nothing is compiled again


@pytest.mark.compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SIZES, sliding_window=8),
        Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
        GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=96),
    ],
    ids=lambda config: config.model_type,
)
def test_other_architectures_give_the_same_text_compiled_or_say_why_not(config, compiler_works):
    model = random_model(config, seed=5)
    decoder = Decoder(model, random_heads(model, 3), random_tree(3, 9), max_length=96, slots=2)
    assert decoder.compile() or decoder.why_eager
    prompts = [prompt(25), prompt(7)]
    for count in (2, 1):  # a compiled step takes fewer prompts than it has slots
        for ids, result in zip(prompts, decoder.generate(prompts[:count], 30, [3]), strict=False):
            assert result.new_tokens == own_text(model, ids, 30, 3)


@pytest.mark.compiler
@pytest.mark.slow
def test_the_cost_of_compiling_does_not_grow_with_the_number_of_layers(compiler_works):
    made = []
    for layers in (2, 4, 8):
        model, before = small_llama(num_hidden_layers=layers, seed=layers), graphs()
        decoder = Decoder(model, random_heads(model, 2), random_tree(2, 6), max_length=96)
        assert decoder.compile(), decoder.why_eager
        assert decoder.generate([prompt(9)], 20, [])[0].new_tokens == own_text(model, prompt(9), 20)
        made.append(graphs() - before)
    assert made[0] == made[1] == made[2] > 0


@pytest.mark.parametrize(("rows", "heads", "shared"), [(1, 6, 2), (5, 6, 2), (5, 3, 3), (1, 4, 1)])
@pytest.mark.parametrize("mask_heads", [1, None])
def test_attention_is_torchs_with_keys_repeated_for_each_query_head(rows, heads, shared, mask_heads):
    query, (key, value) = torch.randn(2, heads, rows, 8), torch.randn(2, 2, shared, 11, 8)
    visible = torch.rand(2, mask_heads or heads, rows, 11) > 0.4
    mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    layer = torch.nn.Module()
    layer.num_key_value_groups, layer.is_causal = heads // shared, True
    found, _ = attention(layer, query, key, value, mask, scaling=0.3)
    repeated = [x.repeat_interleave(heads // shared, 1) for x in (key, value)]
    wanted = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(found, wanted.transpose(1, 2))


@pytest.mark.compiler
def test_a_copy_is_shared_until_the_weights_change(compiler_works):
    model = small_llama()
    first = FastModel.of(model)
    assert FastModel.of(model) is first
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(1, 0))
    assert FastModel.of(model) is not first


def failing(*arguments, **options):
    raise RuntimeError("no working C++ compiler\nmore")


def test_without_a_compiler_decoding_goes_on(small_model, monkeypatch):
    monkeypatch.setattr(torch, "compile", failing)
    decoder = Decoder(small_model, random_heads(small_model, 2), random_tree(2, 6), max_length=60)
    assert decoder.compile() is None and not decoder.compiled
    assert decoder.why_eager == "RuntimeError: no working C++ compiler"
    assert decoder.generate([prompt(5)], 30, [])[0].new_tokens == own_text(small_model, prompt(5), 30)


def test_compiled_code_that_gives_other_logits_is_not_used(small_model, monkeypatch):
    wrong = type(
        "Wrong", (), {"model": small_llama(seed=9), "logits": lambda self, hidden: hidden @ torch.ones(32, 50)}
    )
    monkeypatch.setattr(compilation.FastModel, "of", lambda model: wrong())
    decoder = Decoder(small_model, random_heads(small_model, 2), random_tree(2, 6), max_length=60)
    assert decoder.compile() is None
    assert "compiled code gives other logits" in decoder.why_eager
    assert decoder.generate([prompt(5)], 30, [])[0].new_tokens == own_text(small_model, prompt(5), 30)


ELSEWHERE = """
import json
import os
import sys

import torch
from tiny_models import small_llama
from drafts import own_text, prompt

from medusa_nb.decoding import Decoder

os.environ |= json.loads(sys.argv[1])
model = small_llama(num_hidden_layers=1)
decoder = Decoder(model, max_length=60)
decoder.compile()
assert decoder.generate([prompt(5)], 20, [])[0].new_tokens == own_text(model, prompt(5), 20)
print(decoder.compiled, decoder.why_eager)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("machine", "compiles"),
    [
        (dict(CXX="/nonexistent/c++"), False),
        (dict(TORCHINDUCTOR_CACHE_DIR="/dev/null/cache"), False),
        (dict(ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="SSE41"), None),
    ],
    ids=["no compiler", "no place for compiled code", "an old processor"],
)
def test_on_other_machines_the_text_is_the_same_and_one_sentence_says_what_is_missing(machine, compiles, tmp_path):
    paths = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parents[1])])
    fresh = dict(TORCHINDUCTOR_CACHE_DIR=str(tmp_path), PYTHONPATH=paths)
    command = [sys.executable, "-c", ELSEWHERE, json.dumps(machine)]  # a cache folder is asked for when torch is loaded
    environment = os.environ | fresh | {k: v for k, v in machine.items() if "CACHE" not in k}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    compiled, _, why = run.stdout.strip().partition(" ")
    assert "\n" not in why and (compiled == "True") == (why == "")
    if compiles is not None:
        assert (compiled == "True") is compiles
