"""Decoding with heads gives the text of plain decoding, whatever the heads guess."""

import pytest
import torch
from conftest import random_model, random_tree
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

from medusa_nb import decoding
from medusa_nb.decoding import cut_at_end, greedy_generate, longest_right_path, medusa_generate
from medusa_nb.errors import InputError
from medusa_nb.heads import MedusaHeads
from medusa_nb.tree import ROOT_ONLY, chain, tree_from_paths

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


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def random_heads(model, count: int, seed: int = 0, std: float = 0.5) -> MedusaHeads:
    heads = MedusaHeads.for_model(model, count)
    torch.manual_seed(seed)
    torch.nn.init.normal_(heads.weight, std=std)
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

    def guess(heads, hidden, root, tree):
        nonlocal place
        assert root == truth[place]
        tokens = truth[place : place + len(tree)]
        place += len(tree)
        return torch.tensor(tokens + [0] * (len(tree) - len(tokens)))

    monkeypatch.setattr(decoding, "guess", guess)


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


def test_longest_right_path_by_hand():
    tree = tree_from_paths([(0,), (1,), (0, 0), (1, 0), (1, 0, 0)])  # nodes 1..5 in this order
    assert longest_right_path(tree, [7, 8, 9, 1, 2, 3], [9, 0, 2, 0, 3, 5]) == [0, 2, 4, 5]
    assert longest_right_path(tree, [7, 8, 9, 1, 2, 3], [6, 1, 2, 0, 3, 5]) == [0]
    assert longest_right_path(tree, [7, 8, 9, 1, 2, 3], [8, 4, 2, 0, 3, 5]) == [0, 1]


def test_cut_at_end():
    assert cut_at_end([1, 2, 3], {2}) == ([1, 2], True)
    assert cut_at_end([1, 2, 3], {9}) == ([1, 2, 3], False)


@pytest.mark.parametrize(
    ("ids", "tree", "limit", "message"),
    [
        (prompt(5), chain(3), 9, "3 guesses deep.*2 heads"),
        (prompt(CONTEXT), chain(2), 9, "the prompt has 96 tokens"),
        (prompt(CONTEXT + 9), chain(2), 9, "shorten the prompt"),
        (prompt(5)[:, :0], chain(2), 9, "non-empty"),
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
