"""Decoding with heads gives the text of plain decoding, whatever the heads guess."""

import copy
import time
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch
from conftest import random_model, random_tree, small_llama
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor.utils import run_and_get_code
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

from medusa_nb import compilation, micro_attention
from medusa_nb.compilation import CompiledReader
from medusa_nb.decoding import (
    NGRAM,
    Decoder,
    Step,
    cut_at_end,
    greedy_generate,
    longest_right_path,
    medusa_generate,
)
from medusa_nb.drafting import Candidates, DynamicDraft, TreeDraft
from medusa_nb.errors import InputError
from medusa_nb.heads import MedusaHeads
from medusa_nb.micro_gemm import serves
from medusa_nb.tree import ROOT_ONLY, chain, tree_from_paths
from medusa_nb.verification import read_prompts, same

VOCABULARY, CONTEXT = 50, 96
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=CONTEXT,
    intermediate_size=64,
)
GQA = SIZES | dict(num_key_value_heads=2)
CONFIGS = [
    LlamaConfig(**GQA),
    MistralConfig(**GQA, sliding_window=8),
    Qwen2Config(**GQA),
    Qwen3Config(**GQA, head_dim=8),
    GPTNeoXConfig(**SIZES),
    PhiConfig(**SIZES),
    GemmaConfig(**SIZES, num_key_value_heads=1, head_dim=8),
    Gemma2Config(**GQA, head_dim=8, sliding_window=8),
    Gemma3TextConfig(**GQA, head_dim=8, sliding_window=8),
    GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT),
    OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        ffn_dim=64,
        word_embed_proj_dim=32,
    ),
]

DEEP_HEADS = [  # 32 numbers, as our own attention of a compiled step wants them
    LlamaConfig(**GQA | dict(hidden_size=128)),
    MistralConfig(**GQA | dict(hidden_size=128), sliding_window=8),
    GPTNeoXConfig(**SIZES | dict(hidden_size=128)),
]


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def random_heads(model, count: int, seed: int = 0, std: float = 0.5, see_path: bool = False) -> MedusaHeads:
    heads = MedusaHeads.for_model(model, count, see_path=see_path)
    torch.manual_seed(seed)
    torch.nn.init.normal_(heads.weight, std=std)
    if see_path:
        for weight in heads.path_weight:
            torch.nn.init.normal_(weight, std=std)
    return heads.requires_grad_(False)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
@pytest.mark.parametrize("K", [1, 2, 3, 4, 5])
def test_same_text_as_plain_decoding_and_as_transformers(config, K):
    model = random_model(config, seed=K)
    heads = random_heads(model, K, seed=K)
    for trial, length in enumerate((1, 2 + 6 * K, CONTEXT - 2)):
        tree = random_tree(K, 12, seed=10 * K + trial)
        ids = prompt(length, seed=10 * K + trial)
        new = min(40, CONTEXT - length)
        ours = medusa_generate(model, heads, ids, tree=tree, max_new_tokens=40, eos_token_id=3)
        plain = greedy_generate(model, ids, max_new_tokens=40, eos_token_id=3)
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=3,
            pad_token_id=0,
        )
        assert plain.sequences.tolist() == theirs.tolist()
        assert ours.sequences.tolist() == theirs.tolist()
        assert sum(ours.tokens_per_pass) == theirs.shape[1] - length
        assert set(plain.tokens_per_pass) == {1}


def perfect_guesses(monkeypatch, truth: list[int]) -> None:
    """Let every guess of a chain be the true continuation, so that the whole path is accepted."""
    place = 0

    def fill(draft, state):
        nonlocal place
        assert state.root.item() == truth[place]
        tokens = truth[place : place + draft.size]
        place += draft.size
        return torch.tensor([tokens + [0] * (draft.size - len(tokens))])

    monkeypatch.setattr(TreeDraft, "fill", fill)


def varied_text(model, length: int, fresh_at: int) -> tuple[torch.Tensor, list[int]]:
    """A prompt whose plain continuation has, at place ``fresh_at``, a token not seen in it before."""
    for seed in range(200):
        ids = prompt(5, seed)
        text = greedy_generate(model, ids, length, eos_token_id=[]).new_tokens
        if text[fresh_at] not in text[:fresh_at]:
            return ids, text
    raise AssertionError("no prompt with a varied continuation")


def test_whole_path_accepted(monkeypatch, small_model):
    ids, text = varied_text(small_model, 61, fresh_at=8)
    perfect_guesses(monkeypatch, text)
    heads = MedusaHeads.for_model(small_model, 4)
    result = medusa_generate(small_model, heads, ids, tree=chain(4), max_new_tokens=51, eos_token_id=[])
    assert result.new_tokens == text[:51]
    assert result.tokens_per_pass == [1] + [5] * 10
    assert result.stopped_by == "length"


@pytest.mark.parametrize("end", [6, 7, 8, 9, 10])
def test_end_token_inside_an_accepted_run_is_the_last_one_kept(monkeypatch, small_model, end):
    ids, text = varied_text(small_model, 61, fresh_at=end)
    perfect_guesses(monkeypatch, text)
    heads = MedusaHeads.for_model(small_model, 4)
    result = medusa_generate(small_model, heads, ids, tree=chain(4), max_new_tokens=60, eos_token_id=text[end])
    assert result.new_tokens == text[: end + 1]
    assert result.tokens_per_pass == [1, 5, end - 5]
    assert result.stopped_by == "eos"


@pytest.mark.parametrize("limit", [1, 2, 5, 6, 8, 11])
def test_limit_cuts_an_accepted_run(monkeypatch, small_model, limit):
    ids, text = varied_text(small_model, 61, fresh_at=8)
    perfect_guesses(monkeypatch, text)
    heads = MedusaHeads.for_model(small_model, 4)
    result = medusa_generate(small_model, heads, ids, tree=chain(4), max_new_tokens=limit, eos_token_id=[])
    assert result.new_tokens == text[:limit]
    assert sum(result.tokens_per_pass) == limit


def test_end_token_after_the_limit_does_not_count(monkeypatch, small_model):
    ids, text = varied_text(small_model, 61, fresh_at=8)
    perfect_guesses(monkeypatch, text)
    heads = MedusaHeads.for_model(small_model, 4)
    result = medusa_generate(small_model, heads, ids, tree=chain(4), max_new_tokens=8, eos_token_id=text[8])
    assert (result.new_tokens, result.stopped_by) == (text[:8], "length")


def test_first_token_may_be_the_end(small_model):
    ids = prompt(5)
    first = greedy_generate(small_model, ids, 1, eos_token_id=[]).new_tokens
    result = medusa_generate(small_model, None, ids, tree=ROOT_ONLY, max_new_tokens=9, eos_token_id=first)
    assert (result.new_tokens, result.stopped_by, result.tokens_per_pass) == (first, "eos", [1])


def test_end_token_comes_from_the_generation_config_by_default(small_model):
    ids, text = varied_text(small_model, 20, fresh_at=8)
    stated = small_model.generation_config.eos_token_id
    try:
        small_model.generation_config.eos_token_id = [text[8]]
        assert greedy_generate(small_model, ids, 20).new_tokens == text[:9]
    finally:
        small_model.generation_config.eos_token_id = stated


def test_the_limit_is_lowered_to_what_is_left_of_the_context(small_model):
    ids = prompt(CONTEXT - 3)
    heads = random_heads(small_model, 4)
    result = medusa_generate(small_model, heads, ids, tree=chain(4), max_new_tokens=60, eos_token_id=[])
    assert result.new_tokens == greedy_generate(small_model, ids, 60, eos_token_id=[]).new_tokens
    assert len(result.new_tokens) == 3


def walked_path(tree, tokens: list[int], said: list[int]) -> list[int]:
    """The obvious way: from the root go to the child that is right, as long as there is one."""
    path = [0]
    while right := [child for child in tree.children[path[-1]] if tokens[child] == said[path[-1]]]:
        path.append(right[0])
    return path


def right_path(tree, tokens: list[int], said: list[int]) -> list[int]:
    draft = TreeDraft(None, tree, "cpu")
    shape = (x.unsqueeze(0) for x in (draft.parents, draft.depths, draft.ancestors))
    candidates, said = Candidates(torch.tensor([tokens]), *shape), torch.tensor([said])
    path, count = longest_right_path(candidates, same(None, said, candidates), tree.depth)
    return path[0, : count[0]].tolist()


def test_longest_right_path_by_hand():
    tree = tree_from_paths([(0,), (1,), (0, 0), (1, 0), (1, 0, 0)])  # nodes 1..5 in this order
    assert right_path(tree, [7, 8, 9, 1, 2, 3], [9, 0, 2, 0, 3, 5]) == [0, 2, 4, 5]
    assert right_path(tree, [7, 8, 9, 1, 2, 3], [6, 1, 2, 0, 3, 5]) == [0]
    assert right_path(tree, [7, 8, 9, 1, 2, 3], [8, 4, 2, 0, 3, 5]) == [0, 1]


@pytest.mark.parametrize("seed", range(30))
def test_longest_right_path_is_the_walk_from_the_root(seed):
    tree, generator = random_tree(4, 14, seed), torch.Generator().manual_seed(seed)
    said = torch.randint(3, (len(tree),), generator=generator).tolist()
    tokens = [0] * len(tree)
    for children in tree.children:  # brothers differ, as guesses of one head do
        for child, token in zip(children, torch.randperm(4, generator=generator).tolist(), strict=False):
            tokens[child] = token
    assert right_path(tree, tokens, said) == walked_path(tree, tokens, said)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_several_prompts_at_once_give_the_texts_of_one_by_one(config):
    model = random_model(config, seed=3)
    heads, tree = random_heads(model, 3, seed=3, see_path=True), random_tree(3, 9, seed=3)
    prompts, ends = [prompt(length, seed=length)[0] for length in (1, 30, 7, 52, 8)], list(range(3, 50, 5))
    decoder = Decoder(model, heads, tree, slots=5, capacity=52 + 40 + len(tree))
    together = decoder.generate(prompts, max_new_tokens=40, eos_token_id=ends)
    lengths = set()
    for ids, result in zip(prompts, together, strict=True):
        alone = greedy_generate(model, ids.unsqueeze(0), 40, eos_token_id=ends)
        assert (result.new_tokens, result.stopped_by) == (alone.new_tokens, alone.stopped_by)
        lengths.add(len(result.new_tokens))
    assert len(lengths) > 1  # texts ended at different times


def test_a_decoder_serves_many_prompts(small_model):
    decoder = Decoder(small_model, random_heads(small_model, 3), random_tree(3, 9), capacity=96 + 9)
    for length in (40, 3, 60):
        ids = prompt(length, seed=length)
        result = decoder.generate([ids[0]], 30, eos_token_id=[])[0]
        assert result.new_tokens == greedy_generate(small_model, ids, 30, eos_token_id=[]).new_tokens


@pytest.mark.parametrize("config", DEEP_HEADS, ids=lambda config: config.model_type)
@pytest.mark.parametrize("kernels", ["ours", "onednn", "mkl"])
def test_the_compiled_step_gives_the_same_text(config, kernels, monkeypatch, compiler_works):
    monkeypatch.setattr(compilation, "onednn_is_faster", lambda weight, rows: kernels == "onednn")
    model = random_model(config, seed=5)
    heads, tree = random_heads(model, 3, seed=5), random_tree(3, 9, seed=5)
    decoder = Decoder(model, heads, tree, capacity=96 + 9)
    products = counters["inductor"]["cpp_templated_kernel_counter"]
    monkeypatch.setattr(micro_attention, "block_code", attention := Mock(wraps=micro_attention.block_code))
    assert decoder.compile(library=kernels != "ours") and decoder.compiled, decoder.why_eager
    written = counters["inductor"]["cpp_templated_kernel_counter"] > products
    assert written == attention.called == (kernels == "ours" and serves(model.dtype, 9))
    graphs = counters["stats"]["unique_graphs"]
    for length in (2, 25, 60):
        ids = prompt(length, seed=length)
        result = decoder.generate([ids[0]], 30, eos_token_id=[3])[0]
        assert result.new_tokens == greedy_generate(model, ids, 30, eos_token_id=[3]).new_tokens
    with torch.inference_mode():
        assert decoder.generate([ids[0]], 30, eos_token_id=[3])[0].new_tokens == result.new_tokens
    assert counters["stats"]["unique_graphs"] == graphs  # attention reads more and more, compiled once
    assert model.config._attn_implementation != "medusa_grouped_sdpa"


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[1]], ids=lambda config: config.model_type)
def test_prompts_of_any_length_are_read_by_one_graph(config, compiler_works):
    model = random_model(config, seed=6)
    reader = CompiledReader.of(model)
    graphs = counters["stats"]["unique_graphs"]
    for lengths in ((1,), (2,), (37,), (64,), (90,), (5, 30)):
        ids, last = torch.cat([prompt(max(lengths), seed=n) for n in lengths]), torch.tensor(lengths) - 1
        with torch.no_grad():
            torch.testing.assert_close(reader(ids, last), read_prompts(model, ids, last), rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == graphs  # a single token and several prompts go without it


def test_decoders_of_a_model_share_its_reader_until_its_weights_change(compiler_works):
    model, ids = small_llama(), prompt(20)
    first, second = (Decoder(model, capacity=size) for size in (60, 90))
    assert first.compile() and second.compile()
    reader = first.verifier.read
    assert isinstance(reader, CompiledReader) and second.verifier.read is reader
    assert copy.deepcopy(model).__dict__["_medusa_reader"] is None
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(1, 0))
    third = Decoder(model, capacity=60)
    assert third.compile() and third.verifier.read is not reader
    result = third.generate([ids[0]], 30, eos_token_id=[])[0]
    assert result.new_tokens == greedy_generate(model, ids, 30, eos_token_id=[]).new_tokens


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch is built without MKL")
@pytest.mark.parametrize(
    ("library", "operator", "expected"),
    [("mkl", "_mkl_linear", True), ("mkldnn", "_linear_pointwise", False)],
)
def test_the_faster_library_is_chosen(library, operator, expected, monkeypatch):
    monkeypatch.setattr(getattr(torch.ops, library), operator, lambda *arguments: time.sleep(0.01))
    assert compilation.onednn_is_faster(torch.randn(70, 16), 4) is expected
    assert not compilation.onednn_is_faster(torch.randn(70, 16).bfloat16(), 4)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch is built without MKL")
@pytest.mark.parametrize("onednn", [True, False], ids=["onednn", "mkl"])
def test_inductor_hands_float32_to_the_library_of_choice(onednn, compiler_works):
    layer, x = torch.nn.Linear(64, 64).eval(), torch.randn(8, 64)
    options = inductor.patch(compilation.ON_A_CPU | {"cpp_wrapper": False})
    with torch.no_grad(), options, compilation.packed_for_onednn() if onednn else nullcontext():
        said, (code, *_) = run_and_get_code(torch.compile(layer, dynamic=False), x)
    assert ("mkldnn._linear_pointwise" in code, "mkl._mkl_linear" in code) == (onednn, not onednn)
    torch.testing.assert_close(said, layer(x))


@pytest.mark.parametrize(("longest", "columns"), [(1, 32), (23, 32), (24, 64), (96, 105)])
def test_attention_reads_a_multiple_of_columns_within_the_capacity(small_model, longest, columns):
    decoder = Decoder(small_model, random_heads(small_model, 3), random_tree(3, 9), capacity=96 + 9)
    assert decoder.draft.size == 9 and decoder.span(longest) == columns
    decoder.compile_seconds, decoder.verifier.device = 1.0, torch.device("cuda")
    assert decoder.span(longest) == decoder.capacity  # a CUDA graph has one shape


def test_a_compiled_decoder_takes_fewer_prompts_than_it_has_slots(small_model):
    decoder = Decoder(small_model, random_heads(small_model, 3), random_tree(3, 9), capacity=96 + 9, slots=3)
    decoder.compile()
    for count in (3, 2, 1):
        prompts = [prompt(5 + i, seed=i)[0] for i in range(count)]
        texts = [result.new_tokens for result in decoder.generate(prompts, 30, eos_token_id=[])]
        plain = [greedy_generate(small_model, ids.unsqueeze(0), 30, eos_token_id=[]) for ids in prompts]
        assert texts == [result.new_tokens for result in plain]


def test_without_a_compiler_decoding_goes_on(small_model, monkeypatch):
    def no_compiler(*arguments, **options):
        raise RuntimeError("no working C++ compiler\nmore")

    monkeypatch.setattr(torch, "compile", lambda function, **options: no_compiler)
    decoder = Decoder(small_model, capacity=60)
    assert decoder.compile() is None
    assert decoder.why_eager == "RuntimeError: no working C++ compiler"
    ids = prompt(5)
    result = decoder.generate([ids[0]], 30, eos_token_id=[])[0]
    assert result.new_tokens == greedy_generate(small_model, ids, 30, eos_token_id=[]).new_tokens


def test_where_only_the_prompt_pass_does_not_compile_it_stays_eager(small_model, monkeypatch, compiler_works):
    def no_graph(self, model, library):
        raise RuntimeError("a graph break")

    monkeypatch.setattr(CompiledReader, "__init__", no_graph)
    monkeypatch.delitem(small_model.__dict__, "_medusa_reader", raising=False)
    decoder = Decoder(small_model, capacity=60)
    assert decoder.compile() and decoder.why_eager == "prompts are read eagerly: RuntimeError: a graph break"
    ids = prompt(5)
    result = decoder.generate([ids[0]], 30, eos_token_id=[])[0]
    assert result.new_tokens == greedy_generate(small_model, ids, 30, eos_token_id=[]).new_tokens


class Listener:
    """A streamer that notes what it is given."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.tolist()

    def end(self):
        self.ended = True


def test_streamer_gets_the_prompt_and_every_token_in_order(small_model):
    listener, ids = Listener(), prompt(5)
    heads = random_heads(small_model, 2)
    result = medusa_generate(small_model, heads, ids, tree=chain(2), max_new_tokens=20, streamer=listener)
    assert listener.tokens == result.sequences[0].tolist()
    assert listener.ended


def test_stop_strings_end_the_text_where_transformers_ends_it(tiny_model, tokenizer):
    ids = tokenizer("def add(a, b):", return_tensors="pt").input_ids
    text = greedy_generate(tiny_model, ids, 40, eos_token_id=[]).new_tokens
    middle = tokenizer.decode(text[6:9])
    stop = middle[1:] if len(middle) > 2 else middle  # begins inside a token
    heads = MedusaHeads.for_model(tiny_model, 2).requires_grad_(False)
    ours = medusa_generate(
        tiny_model,
        heads,
        ids,
        tree=chain(2),
        max_new_tokens=40,
        eos_token_id=[],
        stop_strings=[stop],
        tokenizer=tokenizer,
    )
    arguments = dict(attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, pad_token_id=0)
    theirs = tiny_model.generate(ids, stop_strings=[stop], tokenizer=tokenizer, **arguments, eos_token_id=None)
    assert ours.sequences.tolist() == theirs.tolist()
    assert ours.stopped_by == "stop string"
    assert len(ours.new_tokens) < 40


def test_cut_at_end():
    assert cut_at_end([1, 2, 3], {2}) == ([1, 2], "eos")
    assert cut_at_end([1, 2, 3], {9}) == ([1, 2, 3], "")


@pytest.mark.parametrize(
    ("ids", "tree", "limit", "message"),
    [
        (prompt(5), chain(3), 9, "3 guesses deep.*2 heads"),
        (prompt(CONTEXT), chain(2), 9, "the prompt has 96 tokens"),
        (prompt(CONTEXT + 9), chain(2), 9, "shorten the prompt"),
        (prompt(5)[:, :0], chain(2), 9, "non-empty one"),
        (prompt(5).expand(2, -1), chain(2), 9, "one non-empty prompt"),
        (prompt(5)[0], chain(2), 9, "one non-empty prompt"),
        (prompt(5), chain(2), 0, "at least one token"),
    ],
    ids=["tree too deep", "context full", "too long", "empty", "batch of 2", "one dimension", "no token"],
)
def test_requests_that_are_refused(small_model, ids, tree, limit, message):
    heads = MedusaHeads.for_model(small_model, 2)
    with pytest.raises(InputError, match=message):
        medusa_generate(small_model, heads, ids, tree=tree, max_new_tokens=limit)


def test_requests_a_decoder_refuses(small_model):
    decoder = Decoder(small_model, capacity=20)
    with pytest.raises(InputError, match="5 prompt tokens, 30 new ones.*capacity of 20"):
        decoder.generate([prompt(5)[0]], 30)
    with pytest.raises(InputError, match="2 prompts; decode them one by one"):
        decoder.generate([prompt(5)[0]] * 2, 5, streamer=Listener())
    with pytest.raises(InputError, match="pass the tokenizer"):
        decoder.generate([prompt(5)[0]], 5, stop_strings=["x"])
    with pytest.raises(InputError, match="2 prompts.*1 slot"):
        decoder.generate([prompt(5)[0]] * 2, 5)


def test_guesses_without_heads_are_refused(small_model):
    with pytest.raises(InputError, match="0 heads"):
        medusa_generate(small_model, None, prompt(5), tree=chain(1))


def test_encoder_decoder_is_refused():
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(InputError, match="encoder-decoder"):
        greedy_generate(T5ForConditionalGeneration(config), prompt(5))


def test_recurrent_model_is_refused():
    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(InputError, match="recurrent state"):
        greedy_generate(model, prompt(5))


def test_who_guessed_each_token():
    step = Step([7, 1, 2, 3], [0, 1, 3], [1, 3, 9], [0, 0, 0, 1], {3})
    assert step.guessed_by == [0, NGRAM, None]
    assert Step([], [], [5]).guessed_by == [None]
    assert Step([7, 1], [0, 1], [1]).guessed_by == [0]  # cut at the end of the text


def test_every_emitted_guess_is_told_from_the_base_models_own(small_model):
    worth = torch.full((4, 4), 0.9).masked_fill(torch.arange(4).unsqueeze(1) == 0, 0.0)
    draft = DynamicDraft(random_heads(small_model, 2), 6, "cpu", worth)
    result = Decoder(small_model, draft=draft, capacity=96).generate([prompt(30)[0]], 50, [])[0]
    who = [source for step in result.steps for source in step.guessed_by]
    assert len(who) == len(result.new_tokens)
    assert who.count(None) >= len(result.steps) - 1
    for step in result.steps[1:]:
        nodes = step.path[1:][: len(step.emitted)]
        assert [step.tokens[node] for node in nodes] == step.emitted[: len(nodes)]
