"""The transformers folder: plain transformers decodes it in fewer passes, with the text it writes anyway."""

import copy
import gc
import json
import subprocess
import sys
import threading
import warnings
import weakref
from collections import Counter

import pytest
import torch
from tiny_models import random_model, random_tree, small_llama
from transformers import AutoModelForCausalLM, GenerationConfig, GraniteConfig, StoppingCriteria, StoppingCriteriaList

from medusa_nb.decoding import Decoder
from medusa_nb.errors import InputError
from medusa_nb.export import custom_generate
from medusa_nb.export.bundle import PARTS, bundle
from medusa_nb.export.formats import export
from medusa_nb.export.readers import check
from medusa_nb.heads import MedusaHeads
from medusa_nb.heads_file import WEIGHTS
from medusa_nb.path_heads import PathHeads
from medusa_nb.training.calibration import Calibration

SOME = list(range(5, 48000, 9))  # ends that come soon


def path_heads(model, count: int = 3, seed: int = 1) -> PathHeads:
    torch.manual_seed(seed)
    heads = PathHeads(model, count)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return heads.requires_grad_(False)


def prompt(length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, 48000, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["static tree", "growing tree"])
def folder(tmp_path_factory, tokenizer, request):
    """A tiny model with heads that see the path, exported for transformers."""
    model = small_llama(len(tokenizer), context=256, seed=1)
    heads, out = path_heads(model), tmp_path_factory.mktemp("export") / "model"
    tree = random_tree(3, 9, seed=1) if request.param == "static tree" else None
    known = Calibration(Counter(), torch.full((4, 5), 0.3), torch.arange(5, 2000))
    export(heads, out, "transformers", model=model, tokenizer=tokenizer, tree=tree, calibration=known)
    return out


@pytest.fixture(scope="module")
def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def medusa(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def ask(model, ids, **options):
    options = dict(do_sample=False, max_new_tokens=30, pad_token_id=0, eos_token_id=None) | options
    return model.generate(ids, **(dict(attention_mask=torch.ones_like(ids)) | options))


@pytest.mark.parametrize("length", [1, 9, 60])
def test_a_loaded_folder_decodes_the_plain_text(plain, medusa, length):
    ids = prompt(length, seed=length)
    assert ask(medusa, ids).tolist() == ask(plain, ids).tolist()
    text = ask(plain, ids)[0, length:].tolist()
    for ends in (text[4], [text[7], text[12]]):
        assert ask(medusa, ids, eos_token_id=ends).tolist() == ask(plain, ids, eos_token_id=ends).tolist()


@pytest.mark.parametrize("shape", [(), (1,), (2,)])
def test_an_end_token_given_as_a_tensor_ends_the_text(plain, medusa, shape):
    ids = prompt()
    ends = ask(plain, ids)[0, 13].expand(shape).clone()
    theirs = ask(plain, ids, eos_token_id=ends)
    assert ask(medusa, ids, eos_token_id=ends).tolist() == theirs.tolist() and theirs.shape[1] <= 14
    config = GenerationConfig(max_new_tokens=30, eos_token_id=ends.tolist(), pad_token_id=0)
    assert medusa.generate(ids, generation_config=config).tolist() == theirs.tolist()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, dict(max_length=25)], ids=["by default", "max_length"])
def test_length_without_max_new_tokens(plain, medusa, options):
    ids = prompt()
    options |= dict(attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None, pad_token_id=0)
    assert medusa.generate(ids, **options).tolist() == plain.generate(ids, **options).tolist()


def test_per_call_it_decodes_a_model_from_elsewhere(plain, folder):
    ids = prompt()
    other = AutoModelForCausalLM.from_pretrained(folder)
    other.config._name_or_path = "somewhere/else"
    theirs = ask(other, ids, custom_generate=str(folder), medusa_heads=str(folder), trust_remote_code=True)
    assert theirs.tolist() == ask(plain, ids).tolist()


def test_right_drafts_save_passes(tmp_path, tokenizer):
    model = small_llama(len(tokenizer), context=256)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[7] = 1.0
        model.model.norm.weight.fill_(1.0)  # says 7 or 0 for ever, and untrained heads draft what the base model says
    export(MedusaHeads(model, 3).requires_grad_(False), tmp_path / "out", "transformers", model=model)
    medusa, calls = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval(), []
    ask(medusa, prompt(), max_new_tokens=41)  # checks the model with passes of its own
    medusa.model.register_forward_hook(lambda *_: calls.append(1))
    assert ask(medusa, prompt(), max_new_tokens=41).shape[1] == 9 + 41
    assert len(calls) <= 21


def test_left_padded_batches(plain, medusa):
    rows = [prompt(n, seed=n)[0] for n in (3, 12, 7)]
    ids, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    for line, row in enumerate(rows):
        ids[line, 12 - len(row) :], mask[line, 12 - len(row) :] = row, 1
    ours = ask(medusa, ids, attention_mask=mask, eos_token_id=SOME)
    assert ours.tolist() == ask(plain, ids, attention_mask=mask, eos_token_id=SOME).tolist()


class Listener:
    """A streamer that notes what it is given."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


class Long(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 20)


def test_streamer_stop_strings_criteria_and_dict(plain, medusa, tokenizer):
    ids, listener = prompt(), Listener()
    result = ask(medusa, ids, streamer=listener, return_dict_in_generate=True)
    assert listener.tokens == result.sequences[0].tolist() and listener.ended
    stop = tokenizer.decode(result.sequences[0, 13:15])
    for stops in (stop, [stop, "never"]):
        options = dict(stop_strings=stops, tokenizer=tokenizer)
        assert ask(medusa, ids, **options).tolist() == ask(plain, ids, **options).tolist()
    criteria = StoppingCriteriaList([Long()])
    assert ask(medusa, ids, stopping_criteria=criteria).tolist() == ask(plain, ids, stopping_criteria=criteria).tolist()


# --- sampling ---------------------------------------------------------------------------------------


def test_sampling_follows_the_seed_and_varies(medusa):
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(ask(medusa, prompt(), do_sample=True, temperature=1.5, top_k=50).tolist())
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0])
def test_sampling_at_temperature_0_is_refused_as_in_transformers(plain, medusa, temperature):
    for model in (plain, medusa):
        with pytest.raises(ValueError, match="temperature"):
            ask(model, prompt(), do_sample=True, temperature=temperature)


@pytest.mark.filterwarnings("ignore")
def test_temperature_0_without_sampling_is_greedy_as_in_transformers(plain, medusa):
    options = dict(temperature=0.0, top_p=0.9)
    assert ask(medusa, prompt(), **options).tolist() == ask(plain, prompt()).tolist()


def test_a_granite_models_tokens_are_drawn_with_the_models_own_probabilities(tmp_path):
    """Granite divides its logits by 8 after lm_head; without that the best token came with 0.148, not 0.023."""
    sizes = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = random_model(GraniteConfig(**sizes, intermediate_size=64, logits_scaling=8.0))
    export(MedusaHeads(model, 2).requires_grad_(False), tmp_path / "out", "transformers", model=model)
    medusa = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    ids = torch.arange(5, 12).repeat(4000, 1)
    torch.manual_seed(0)
    drawn = ask(medusa, ids, do_sample=True, top_k=0, max_new_tokens=2, eos_token_id=None)[:, 7:]
    for place in (0, 1):
        texts = torch.cat([ids[:1], drawn[drawn[:, 0] == drawn[0, 0]][:1, :place]], 1)
        wanted = model(texts).logits[0, -1].softmax(-1)
        rows = drawn[drawn[:, 0] == drawn[0, 0]] if place else drawn
        found = torch.bincount(rows[:, place], minlength=60) / len(rows)
        error = (wanted * (1 - wanted) / len(rows)).sqrt()
        assert ((found - wanted).abs() < 5 * error).all()


# --- refusals ---------------------------------------------------------------------------------------


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
        (dict(negative_prompt_ids=torch.ones(1, 3)), "negative_prompt_ids"),
        (dict(forced_eos_token_id=torch.tensor([5, 6])), "forced_eos_token_id"),
        (dict(suppress_tokens=torch.tensor([5, 6])), "suppress_tokens"),
        (dict(logits_processor=[lambda ids, scores: scores]), "logits_processor"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(medusa, options, name):
    with pytest.raises(ValueError, match=f"does not support .*{name}"):
        ask(medusa, prompt(), **options)


@pytest.mark.parametrize("ids", [torch.zeros(1, 0, dtype=torch.long), torch.ones(3, dtype=torch.long)])
def test_without_a_prompt_there_is_one_sentence(medusa, ids):
    with pytest.raises(ValueError, match="pass input_ids|with at least one token|non-empty"):
        medusa.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)


@pytest.mark.parametrize("option", [dict(repetition_penalty=1.1), dict(no_repeat_ngram_size=3), dict(num_beams=2)])
def test_a_base_model_whose_generation_config_would_be_refused_is_refused_at_export(tmp_path, small_model, option):
    model = copy.deepcopy(small_model)
    model.generation_config.update(**option)
    name = next(iter(option))
    with pytest.raises(InputError, match=f"generation_config.json asks for what would be refused: .*{name}"):
        export(MedusaHeads(model, 2), tmp_path / "out", "transformers", model=model)
    assert not (tmp_path / "out").exists()


def test_another_base_model_is_refused(folder, tokenizer):
    other = small_llama(len(tokenizer), context=256, seed=2)
    with pytest.raises(ValueError, match="were trained for another base model"):
        ask(other, prompt(), custom_generate=str(folder), medusa_heads=str(folder), trust_remote_code=True)


def test_a_folder_without_heads_says_so(plain, folder, tmp_path):
    with pytest.raises(ValueError, match="there are no Medusa heads where .*nowhere' was loaded from"):
        ask(
            plain, prompt(), custom_generate=str(folder), trust_remote_code=True, medusa_heads=str(tmp_path / "nowhere")
        )


def test_the_same_base_model_in_bf16_keeps_its_heads(folder, medusa):
    half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16).eval()
    assert ask(half, prompt()).shape == (1, 39)
    half = half.float()  # heads follow the model into another dtype
    assert ask(half, prompt()).shape == (1, 39)


def test_export_says_which_base_model_the_heads_belong_to(folder):
    about = json.loads((folder / "medusa.json").read_text())
    assert len(about["base_fingerprint"]) == 64 and about["medusa_num_heads"] == 3 and about["sees_path"]


# --- compiled, on request ---------------------------------------------------------------------------


@pytest.fixture
def steps_count_as_compiled(monkeypatch):
    """Decoders say they are compiled and go on eagerly; that compiled steps say the same is tested with them."""
    made = []

    def compile(decoder):
        made.append(decoder)
        decoder.compile_seconds = 1.0
        return 1.0

    monkeypatch.setattr(Decoder, "compile", compile)
    return made


def static(model, ids, **options):
    """Through our own module, so that a test can watch it: the folder's copy is tested above."""
    ids_and = dict(do_sample=False, max_new_tokens=30, pad_token_id=0, cache_implementation="static") | options
    return custom_generate.generate(ids, model=model, **ids_and)


@pytest.fixture
def compiled(folder):
    """A model of its own, for which nothing is kept yet."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_one_compiled_decoder_serves_all_that_fits(plain, compiled, steps_count_as_compiled):
    for length in (1, 9, 60):
        ids = prompt(length, seed=length)
        assert static(compiled, ids, eos_token_id=[]).tolist() == ask(plain, ids).tolist()
    long = prompt(200)  # 56 more fill the context
    assert static(compiled, long, eos_token_id=[], max_new_tokens=100).shape[1] == 256
    [decoder] = steps_count_as_compiled
    assert decoder.max_length == 256  # the whole context
    twice = prompt(9).repeat(2, 1)
    assert static(compiled, twice, eos_token_id=[]).tolist() == ask(plain, twice).tolist()
    assert [decoder.slots for decoder in steps_count_as_compiled] == [1, 2]
    assert static(copy.deepcopy(compiled), prompt(9), eos_token_id=[]).tolist() == ask(plain, prompt(9)).tolist()
    assert len(steps_count_as_compiled) == 3  # a copy compiles its own


def test_compiled_code_is_made_anew_when_weights_change(compiled, steps_count_as_compiled):
    before = static(compiled, prompt(), eos_token_id=[])
    with torch.no_grad():
        compiled.model.norm.weight.mul_(-1)
    after = static(compiled, prompt(), eos_token_id=[])
    assert after.tolist() == ask(compiled, prompt()).tolist() != before.tolist()
    assert len(steps_count_as_compiled) == 2


def test_other_settings_of_sampling_are_the_same_code(compiled, steps_count_as_compiled):
    for options in (dict(temperature=1.5, top_k=50), dict(temperature=0.8, top_p=0.9)):
        texts = []
        for way in (dict(disable_compile=True), {}, {}):
            torch.manual_seed(7)
            texts.append(static(compiled, prompt(), do_sample=True, max_new_tokens=6, **options, **way).tolist())
        assert texts[0] == texts[1] == texts[2]
    assert len(steps_count_as_compiled) == 1


def test_a_step_that_does_not_compile_is_decoded_eagerly_and_said_once(plain, compiled, monkeypatch):
    def compile(decoder):
        decoder.why_eager = "no compiler"

    monkeypatch.setattr(Decoder, "compile", compile)
    with pytest.warns(UserWarning, match="decoding goes on eagerly: no compiler"):
        assert static(compiled, prompt(), eos_token_id=[]).tolist() == ask(plain, prompt()).tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        static(compiled, prompt(), eos_token_id=[])


def test_while_one_thread_uses_the_compiled_decoder_another_decodes_eagerly(plain, compiled, steps_count_as_compiled):
    started, go_on, texts = threading.Event(), threading.Event(), []

    class Wait(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            started.set()
            assert go_on.wait(60)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    criteria = StoppingCriteriaList([Wait()])
    first = threading.Thread(
        target=lambda: texts.append(static(compiled, prompt(), eos_token_id=[], stopping_criteria=criteria).tolist())
    )
    first.start()
    assert started.wait(60)
    assert static(compiled, prompt(), eos_token_id=[]).tolist() == ask(plain, prompt()).tolist()
    go_on.set()
    first.join(60)
    assert texts == [ask(plain, prompt()).tolist()] and len(steps_count_as_compiled) == 1


def test_a_model_that_is_no_longer_used_is_freed_with_its_heads_and_decoders(compiled, steps_count_as_compiled):
    model = copy.deepcopy(compiled)
    static(model, prompt())
    steps_count_as_compiled.clear()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.parametrize("folder", ["growing tree"], indirect=True)
def test_the_folder_compiles_what_it_decodes_with(plain, medusa, compiler_works):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert ask(medusa, prompt(), cache_implementation="static").tolist() == ask(plain, prompt()).tolist()


# --- on its own -------------------------------------------------------------------------------------

ALONE = """
import sys
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


def test_the_one_file_holds_each_name_once_and_nothing_of_the_package(tmp_path):
    code = bundle()
    compile(code, "generate.py", "exec")
    assert "medusa_nb" not in "".join(line for line in code.splitlines() if line.startswith(("import", "from")))
    assert "export.custom_generate" in PARTS and code.count("\ndef generate(") == 1
    (tmp_path / "generate.py").write_text(code)
    checked = subprocess.run([sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", str(tmp_path)])
    assert checked.returncode == 0


def test_without_weights_only_the_heads_travel(tmp_path, small_model):
    files = export(path_heads(small_model), tmp_path / "out", "transformers", model=small_model, weights=False)
    names = {file.relative_to(tmp_path / "out").as_posix() for file in files}
    assert names == {"medusa.json", WEIGHTS, "custom_generate/generate.py"}
    sentence = check(tmp_path / "out", "transformers", None, small_model, torch.arange(5, 14).unsqueeze(0))
    assert "the text of plain greedy decoding" in sentence
