"""Exports: read back with their readers' arithmetic, refused with one sentence, decoded by plain transformers."""

import copy
import json
import os
import pickle
import subprocess
import sys
import warnings
from collections import Counter

import pytest
import torch
from conftest import random_model, random_tree, small_llama
from safetensors.torch import load_file, save_file
from test_decoding import Listener, prompt
from test_heads import SHAPES, random_heads, seeing_heads
from transformers import AutoModelForCausalLM, PhiConfig, StoppingCriteria, StoppingCriteriaList

from medusa_nb.calibration import Calibration
from medusa_nb.errors import InputError
from medusa_nb.export import export
from medusa_nb.heads import CONFIG, WEIGHTS, MedusaHeads
from medusa_nb.readers import READERS, check

GREEDY = dict(do_sample=False, max_new_tokens=30, pad_token_id=0)


@pytest.mark.parametrize(("K", "layers", "own"), SHAPES)
@pytest.mark.parametrize(("to", "version"), [("tgi", 2), ("tgi", 1), ("vllm", 2)])
@torch.no_grad()
def test_logits_equal_ours_or_the_format_refuses(tmp_path, small_model, K, layers, own, to, version):
    heads = random_heads(small_model, K, layers, own)
    if to == "tgi" and version == 2 and (own or layers > 1):
        with pytest.raises(InputError, match="export with --version 1"):
            export(heads, tmp_path / "out", to, version=version)
        assert not (tmp_path / "out").exists()
        return
    export(heads, tmp_path / "out", to, version=version)
    hidden = torch.randn(3, 4, 32)
    theirs = READERS[to](tmp_path / "out", small_model.lm_head.weight, hidden)
    assert theirs.shape == (K, 3, 4, 50)
    assert torch.allclose(theirs, heads(hidden), atol=1e-5, rtol=1e-5)
    assert check(tmp_path / "out", to, heads, small_model, prompt(7)).startswith("read back")
    if to == "tgi":
        again = MedusaHeads.from_pretrained(tmp_path / "out", small_model)
        assert torch.allclose(again(hidden), heads(hidden), atol=1e-5)


@pytest.mark.parametrize("to", ["tgi", "vllm"])
@pytest.mark.parametrize("change", ["missing", "extra", "shape", "value"])
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
        tensors[name] = tensors[name] + 1
    save_file(tensors, file)
    with pytest.raises(InputError, match="lacks|ignore|shape|other logits"):
        check(tmp_path / "out", to, heads, small_model, prompt(7))


def test_vllm_config_keeps_the_biases(tmp_path, small_model):
    export(random_heads(small_model), tmp_path / "out", "vllm")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["medusa_fc_bias"] is True and config["model_type"] == "medusa"
    config["medusa_fc_bias"] = False  # what its reader assumes if the key is missing
    (tmp_path / "out" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(InputError, match="would ignore"):
        READERS["vllm"](tmp_path / "out", small_model.lm_head.weight, torch.randn(2, 32))


def knowing(*frequent: int) -> Calibration:
    """A calibration that knows these frequent tokens and nothing else."""
    return Calibration(Counter(), torch.zeros(1, 1), torch.tensor(frequent), [])


@pytest.mark.parametrize(("K", "layers", "own"), SHAPES)
@torch.no_grad()
def test_vllm_with_a_draft_vocabulary_guesses_its_tokens_only(tmp_path, small_model, K, layers, own):
    heads, tokens = random_heads(small_model, K, layers, own), [41, 7, 0, 30, 12]
    export(heads, tmp_path / "out", "vllm", draft_vocabulary=4, calibration=knowing(*tokens))
    tensors, config = load_file(tmp_path / "out/model.safetensors"), json.loads((tmp_path / "out" / CONFIG).read_text())
    assert tensors["token_map"].tolist() == tokens[:4] and tensors["token_map"].dtype == torch.int64
    assert (config["truncated_vocab_size"], config["vocab_size"], config["original_lm_head"]) == (4, 50, not own)
    assert sum("lm_heads" in name for name in tensors) == (K if own else 1)
    assert all(len(tensor) == 4 for name, tensor in tensors.items() if "lm_heads" in name)
    hidden = torch.randn(3, 4, 32)
    theirs, ours = READERS["vllm"](tmp_path / "out", small_model.lm_head.weight, hidden), heads(hidden)
    assert torch.allclose(theirs[..., tokens[:4]], ours[..., tokens[:4]], atol=1e-5, rtol=1e-5)
    others = [token for token in range(50) if token not in tokens[:4]]
    assert theirs.shape == (K, 3, 4, 50) and bool((theirs[..., others] == -torch.inf).all())
    assert f"{K} heads, 4 of 50 tokens" in check(tmp_path / "out", "vllm", heads, small_model, prompt(7))


@torch.no_grad()
def test_vllm_takes_the_vocabulary_of_heads_that_have_one(tmp_path, small_model):
    heads = random_heads(small_model, own=True).limited_to(torch.tensor([41, 7, 0]))
    export(heads, tmp_path / "out", "vllm")
    assert load_file(tmp_path / "out/model.safetensors")["token_map"].tolist() == [41, 7, 0]
    assert "3 heads, 3 of 50 tokens" in check(tmp_path / "out", "vllm", heads, small_model, prompt(7))


@pytest.mark.parametrize(
    ("token_map", "message"),
    [
        ([7, 41, 0, 30], "other logits"),
        ([41, 7, 0, 0], "4 different ids"),
        ([41, 7, 0, 50], "ids below 50"),
        ([41.0, 7.0, 0.0, 30.0], "as int64"),
        ([41, 7, 0], "its reader expects"),
        (None, "lacks token_map"),
    ],
)
def test_check_notices_a_wrong_token_map(tmp_path, small_model, token_map, message):
    heads = random_heads(small_model)
    export(heads, tmp_path / "out", "vllm", draft_vocabulary=4, calibration=knowing(41, 7, 0, 30))
    tensors = load_file(tmp_path / "out/model.safetensors")
    del tensors["token_map"]
    if token_map is not None:
        tensors["token_map"] = torch.tensor(token_map)
    save_file(tensors, tmp_path / "out/model.safetensors")
    with pytest.raises(InputError, match=message):
        check(tmp_path / "out", "vllm", heads, small_model, prompt(7))


def test_a_token_map_without_a_smaller_vocabulary_would_be_ignored(tmp_path, small_model):
    heads = random_heads(small_model)
    export(heads, tmp_path / "out", "vllm")
    tensors = load_file(tmp_path / "out/model.safetensors") | dict(token_map=torch.arange(50))
    save_file(tensors, tmp_path / "out/model.safetensors")
    with pytest.raises(InputError, match="token_map, which its reader would ignore"):
        check(tmp_path / "out", "vllm", heads, small_model, prompt(7))


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("vllm", dict(draft_vocabulary=4), "needs the calibration"),
        ("vllm", dict(draft_vocabulary=4, calibration=knowing(3, 1)), "the calibration knows 2"),
        ("vllm", dict(draft_vocabulary=2, calibration=knowing(1, 3, 5)), "calibrate the heads again"),
        ("vllm", dict(draft_vocabulary=50, calibration=knowing(*range(50))), "of 50 tokens is none"),
        ("vllm", dict(limit=50), "of 50 tokens is none"),
        ("tgi", dict(limit=2), "guess only 2 tokens, and TGI's format has no place"),
        ("vllm", dict(limit=2, draft_vocabulary=2, calibration=knowing(3, 1)), "guess only 2 tokens already"),
        ("tgi", dict(draft_vocabulary=2, calibration=knowing(3, 1)), "part of vllm's format only"),
    ],
)
def test_draft_vocabularies_that_cannot_be_held_are_refused(tmp_path, small_model, to, options, message):
    limit, heads = options.get("limit"), random_heads(small_model)
    with pytest.raises(InputError, match=message):
        export(heads if limit is None else heads.limited_to(torch.arange(limit)), tmp_path / "out", to, **options)
    assert not (tmp_path / "out").exists()


def test_vllm_has_no_place_for_a_bias_of_lm_head(tmp_path):
    model = random_model(PhiConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1))
    with pytest.raises(InputError, match="lm_head has a bias, and vLLM's format has no place"):
        export(random_heads(model), tmp_path / "out", "vllm")
    export(random_heads(model, own=True), tmp_path / "out", "vllm")  # own projections have none


@pytest.mark.parametrize("to", ["tgi", "vllm"])
def test_heads_that_see_the_path_are_for_our_own_decoding(tmp_path, small_model, to):
    with pytest.raises(InputError, match="has no place for that block"):
        export(seeing_heads(small_model), tmp_path / "out", to)


def test_unknown_format_and_full_folder(tmp_path, small_model):
    with pytest.raises(InputError, match="unknown format 'onnx'; choose one of tgi, vllm, transformers"):
        export(random_heads(small_model), tmp_path / "out", "onnx")
    (tmp_path / "x").write_text("")
    with pytest.raises(InputError, match="is not empty"):
        export(random_heads(small_model), tmp_path, "tgi")


def test_old_checkpoints_load(tmp_path, small_model):
    heads, hidden = random_heads(small_model), torch.randn(2, 32)
    heads.save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / WEIGHTS), tmp_path / "medusa_lm_head.pt")
    (tmp_path / WEIGHTS).unlink()
    assert torch.equal(MedusaHeads.from_pretrained(tmp_path, small_model)(hidden), heads(hidden))


class Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def test_pickles_with_code_are_refused_and_not_executed(tmp_path, small_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random_heads(small_model).save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / "medusa_lm_head.pt").write_bytes(pickle.dumps({"0.0.linear.weight": Evil()}))
    with pytest.raises(InputError, match="holds more than tensors; nothing in it was executed"):
        MedusaHeads.from_pretrained(tmp_path, small_model)
    torch.save({"0.0.linear.weight": Evil()}, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(InputError, match="holds more than tensors"):
        MedusaHeads.from_pretrained(tmp_path, small_model)
    assert not (tmp_path / "executed").exists()


def test_a_config_that_states_fewer_heads_is_said_so(tmp_path, small_model):
    random_heads(small_model, 5).save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | dict(medusa_num_heads=2)))
    with pytest.warns(UserWarning, match=r"states 2 heads, .* holds 5; using 5"):
        assert MedusaHeads.from_pretrained(tmp_path, small_model).num_heads == 5


# --- the transformers folder ------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["static tree", "growing tree"])
def folder(tmp_path_factory, tokenizer, request):
    """A tiny model with heads that see the path, exported for transformers."""
    model = small_llama(len(tokenizer), context=256, seed=1)
    heads, out = seeing_heads(model, 3, seed=1), tmp_path_factory.mktemp("export") / "model"
    tree = random_tree(3, 9, seed=1) if request.param == "static tree" else None
    known = Calibration(Counter(), torch.full((4, 5), 0.3), torch.arange(5, 2000), [])
    export(heads, out, "transformers", model=model, tokenizer=tokenizer, tree=tree, calibration=known)
    return out


@pytest.fixture(scope="module")
def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def medusa(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def ask(model, ids, **options):
    options = GREEDY | dict(attention_mask=torch.ones_like(ids), eos_token_id=None) | options
    return model.generate(ids, **options)


@pytest.mark.parametrize("length", [1, 9, 60])
def test_loaded_folder_decodes_the_plain_text(plain, medusa, length):
    ids = torch.randint(5, 8000, (1, length), generator=torch.Generator().manual_seed(length))
    assert ask(medusa, ids).tolist() == ask(plain, ids).tolist()
    text = ask(plain, ids)[0, length:].tolist()
    for ends in (text[4], [text[7], text[12]]):
        assert ask(medusa, ids, eos_token_id=ends).tolist() == ask(plain, ids, eos_token_id=ends).tolist()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, dict(max_length=25)], ids=["by default", "max_length"])
def test_length_without_max_new_tokens(plain, medusa, options):
    ids = prompt(9) + 10
    options |= dict(attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None, pad_token_id=0)
    assert medusa.generate(ids, **options).tolist() == plain.generate(ids, **options).tolist()


def test_per_call_it_decodes_a_model_from_elsewhere(plain, folder, tmp_path):
    ids = prompt(9) + 10
    copy = AutoModelForCausalLM.from_pretrained(folder)
    copy.config._name_or_path = "somewhere/else"
    theirs = ask(copy, ids, custom_generate=str(folder), trust_remote_code=True)
    assert theirs.tolist() == ask(plain, ids).tolist()


def test_right_guesses_save_passes(tmp_path, tokenizer):
    model = small_llama(len(tokenizer), context=256)
    model.lm_head.weight.zero_()
    model.lm_head.weight[7] = 1.0
    model.model.norm.weight.fill_(1.0)  # says 7 or 0 for ever, and untrained heads guess what the base model says
    heads = MedusaHeads.for_model(model, 3).requires_grad_(False)
    export(heads, tmp_path / "out", "transformers", model=model, tokenizer=tokenizer)
    medusa, calls = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval(), []
    medusa.model.register_forward_hook(lambda *_: calls.append(1))
    new = ask(medusa, prompt(9), max_new_tokens=41).shape[1] - 9
    assert new == 41
    assert len(calls) <= 21


def test_left_padded_batches(plain, medusa):
    rows = [torch.randint(5, 8000, (n,), generator=torch.Generator().manual_seed(n)) for n in (3, 12, 7)]
    ids, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    for line, row in enumerate(rows):
        ids[line, 12 - len(row) :], mask[line, 12 - len(row) :] = row, 1
    ends = list(range(5, 8000, 9))
    ours = ask(medusa, ids, attention_mask=mask, eos_token_id=ends)
    assert ours.tolist() == ask(plain, ids, attention_mask=mask, eos_token_id=ends).tolist()


def test_streamer_stop_strings_criteria_and_dict(plain, medusa, tokenizer):
    ids, listener = prompt(9) + 20, Listener()
    result = ask(medusa, ids, streamer=listener, return_dict_in_generate=True)
    assert listener.tokens == result.sequences[0].tolist() and listener.ended
    stop = tokenizer.decode(result.sequences[0, 13:15])
    options = dict(stop_strings=[stop], tokenizer=tokenizer)
    assert ask(medusa, ids, **options).tolist() == ask(plain, ids, **options).tolist()

    class Long(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 20)

    criteria = StoppingCriteriaList([Long()])
    assert ask(medusa, ids, stopping_criteria=criteria).tolist() == ask(plain, ids, stopping_criteria=criteria).tolist()


def test_sampling_follows_the_seed_and_varies(medusa):
    ids, texts = prompt(9) + 20, []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(ask(medusa, ids, do_sample=True, temperature=1.5, top_k=50).tolist())
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (dict(num_beams=3), "num_beams"),
        (dict(num_return_sequences=2, do_sample=True), "num_return_sequences"),
        (dict(repetition_penalty=1.3), "repetition_penalty"),
        (dict(output_scores=True, return_dict_in_generate=True), "output_scores"),
        (dict(min_new_tokens=5), "min_new_tokens"),
        (dict(prompt_lookup_num_tokens=5), "prompt_lookup_num_tokens"),
        (dict(use_cache=False), "use_cache"),
        (dict(cache_implementation="offloaded"), "cache_implementation"),
        (dict(inputs_embeds=torch.zeros(1, 3, 32)), "inputs_embeds"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(medusa, options, name):
    with pytest.raises(ValueError, match=f"does not support .*{name}"):
        ask(medusa, prompt(9), **options)


def test_another_base_model_is_refused(folder, tokenizer):
    other = small_llama(len(tokenizer), context=256, seed=2)
    with pytest.raises(ValueError, match="were trained for another base model"):
        ask(other, prompt(9), custom_generate=str(folder), trust_remote_code=True)


# --- compiled, on request ---------------------------------------------------------------------------


@pytest.fixture
def compiled(folder):
    """A model of its own, whose shelf of compiled decoders is still empty."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def shelf(model) -> list:
    return [decoder for _, decoder in model._medusa_shelf.decoders.values()]


def static(model, ids, **options):
    return ask(model, ids, cache_implementation="static", **options)


def test_one_compiled_decoder_serves_all_that_fits(plain, compiled, tokenizer):
    ids, listener = prompt(9) + 20, Listener()
    for length in (1, 9, 60):
        text = torch.randint(5, 8000, (1, length), generator=torch.Generator().manual_seed(length))
        assert static(compiled, text).tolist() == ask(plain, text).tolist()
    result = static(compiled, ids, streamer=listener, return_dict_in_generate=True)
    assert listener.tokens == result.sequences[0].tolist() == ask(plain, ids)[0].tolist() and listener.ended
    stops = dict(stop_strings=[tokenizer.decode(result.sequences[0, 13:15])], tokenizer=tokenizer)
    assert static(compiled, ids, **stops).tolist() == ask(plain, ids, **stops).tolist()
    ends = result.sequences[0, 16].item()
    assert static(compiled, ids, eos_token_id=ends).tolist() == ask(plain, ids, eos_token_id=ends).tolist()
    long = torch.randint(5, 8000, (1, 200), generator=torch.Generator().manual_seed(0))  # 56 more fill the context
    assert static(compiled, long, max_new_tokens=100).shape[1] == 256
    assert static(compiled, long, max_new_tokens=100).tolist() == ask(plain, long, max_new_tokens=56).tolist()
    [decoder] = shelf(compiled)
    assert bool(decoder.compile_seconds) != bool(decoder.why_eager)
    assert decoder.capacity == 256 + decoder.draft.size  # the whole context
    assert not shelf(copy.deepcopy(compiled))  # a copy compiles its own
    with torch.no_grad():
        for model in (plain, compiled):
            model.model.norm.weight.mul_(-1)  # weights are constants of compiled code, which must notice
    try:
        assert static(compiled, ids).tolist() == ask(plain, ids).tolist() != result.sequences.tolist()
    finally:
        plain.model.norm.weight.data.mul_(-1)
    assert shelf(compiled) != [decoder]


@pytest.mark.parametrize("folder", ["growing tree"], indirect=True)
def test_compiled_left_padded_batches(plain, compiled):
    ids, mask = torch.zeros(2, 12, dtype=torch.long), torch.ones(2, 12, dtype=torch.long)
    ids[0, 7:], ids[1], mask[0, :7] = torch.arange(30, 35), torch.arange(50, 62), 0
    for ends in (None, list(range(5, 8000, 9))):
        options = dict(attention_mask=mask, eos_token_id=ends)
        assert static(compiled, ids, **options).tolist() == ask(plain, ids, **options).tolist()
    assert [decoder.slots for decoder in shelf(compiled)] == [2]


@pytest.mark.parametrize("folder", ["growing tree"], indirect=True)
def test_compiled_sampling_draws_what_eager_sampling_draws(compiled):
    ids = prompt(9) + 20
    for options in (dict(temperature=1.5, top_k=50), dict(temperature=0.8, top_p=0.9), dict(top_k=5)):
        texts = []
        for way in (ask, static, static):
            torch.manual_seed(7)
            texts.append(way(compiled, ids, do_sample=True, **options).tolist())
        assert texts[0] == texts[1] == texts[2]
    assert len(shelf(compiled)) == 1  # other settings, the same code


def test_a_step_that_does_not_compile_is_decoded_eagerly(plain, compiled, monkeypatch):
    def no_compiler(*arguments, **options):
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda function, **options: no_compiler)
    ids = prompt(9) + 20
    with pytest.warns(UserWarning, match="decoding goes on eagerly: RuntimeError: no working C"):
        assert static(compiled, ids).tolist() == ask(plain, ids).tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # said once
        assert static(compiled, ids).tolist() == ask(plain, ids).tolist()


def test_nothing_is_compiled_unless_asked_for_or_while_another_thread_does(plain, compiled, monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    ids = prompt(9) + 20
    expected = ask(plain, ids).tolist()
    assert ask(compiled, ids).tolist() == static(compiled, ids, disable_compile=True).tolist() == expected
    with compiled._medusa_shelf.lock:
        assert static(compiled, ids).tolist() == expected
    assert not shelf(compiled)


ALONE = """
import sys
from collections import Counter
sys.modules["medusa_nb"] = None  # as if it were not installed: any import of it fails
import torch
from transformers import AutoModelForCausalLM
plain = AutoModelForCausalLM.from_pretrained(sys.argv[1])
medusa = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.arange(5, 15).unsqueeze(0)
arguments = dict(attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0)
assert medusa.generate(ids, **arguments).tolist() == plain.generate(ids, **arguments).tolist()
assert "partial" in type(medusa.generate).__name__
print("same text")
"""


def test_the_folder_needs_nothing_of_this_package(folder, tmp_path):
    done = subprocess.run([sys.executable, "-c", ALONE, str(folder)], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "same text", done.stderr


def test_without_weights_only_the_heads_travel(tmp_path, small_model):
    files = export(seeing_heads(small_model), tmp_path / "out", "transformers", model=small_model, weights=False)
    names = {file.relative_to(tmp_path / "out").as_posix() for file in files}
    assert names == {"medusa.json", WEIGHTS, "custom_generate/generate.py"}
    sentence = check(tmp_path / "out", "transformers", None, small_model, prompt(9))
    assert "the text of plain greedy decoding" in sentence
