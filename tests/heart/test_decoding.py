"""Decoding with heads gives the text of plain decoding, whatever the heads draft."""

import pytest
import torch
from drafts import own_text, path_heads, prompt, random_heads
from tiny_models import random_tree, small_llama

from medusa_nb.decoding import COPIED, Decoder, Step
from medusa_nb.drafting import StaticTree, filled
from medusa_nb.errors import InputError
from medusa_nb.stopping import cut_at_end
from medusa_nb.tree import Tree


class Perfect:
    """A draft whose chain of four tokens is always the true continuation, so that the whole path is accepted."""

    reads_text, size, depth = False, 5, 4

    def __init__(self, text: list[int], start: int):
        self.text, self.start = text, start

    def __call__(self, state):
        place = state.lengths.item() - self.start
        tokens = self.text[place : place + 5]
        return filled(Tree.chain(4), torch.tensor([tokens + [0] * (5 - len(tokens))]))


def varied_text(model, fresh_at: int) -> tuple[torch.Tensor, list[int]]:
    """A prompt whose continuation has, at place ``fresh_at``, a token not seen in it before."""
    for seed in range(200):
        ids = prompt(5, seed)
        text = own_text(model, ids, 61)
        if text[fresh_at] not in text[:fresh_at]:
            return ids, text
    raise AssertionError("no prompt with a varied continuation")


@pytest.mark.parametrize("make", [random_heads, path_heads])
@pytest.mark.parametrize("seed", range(6))
def test_random_trees_heads_and_models_give_the_text_of_generate(seed, make):
    model, K = small_llama(seed=seed), 1 + seed % 5
    decoder = Decoder(model, make(model, K, seed), random_tree(K, 12, seed), max_length=96, slots=4)
    plain = Decoder(model, max_length=96, slots=4)
    prompts = [prompt(length, seed) for length in (1, 2 + 6 * K, 60, 90)]
    expected = [own_text(model, ids, min(30, 96 - len(ids)), [3, 17]) for ids in prompts]
    for _ in range(2):  # a decoder serves many calls
        results = decoder.generate(prompts, 30, [3, 17])
        assert [result.new_tokens for result in results] == expected
    for result in plain.generate(prompts, 30, [3, 17]):
        assert set(result.tokens_per_pass) == {1}
    assert len({len(text) for text in expected}) > 1  # texts ended at different times


def test_a_whole_path_is_accepted(small_model):
    ids, text = varied_text(small_model, 8)
    [result] = Decoder(small_model, draft=Perfect(text, 5), max_length=60).generate([ids], 51, [])
    assert (result.new_tokens, result.stopped_by) == (text[:51], "length")
    assert result.tokens_per_pass == [1] + [5] * 10


@pytest.mark.parametrize("end", [6, 7, 8, 9, 10])
def test_an_end_token_inside_an_accepted_run_is_the_last_one_kept(small_model, end):
    ids, text = varied_text(small_model, end)
    [result] = Decoder(small_model, draft=Perfect(text, 5), max_length=80).generate([ids], 60, text[end])
    assert (result.new_tokens, result.stopped_by) == (text[: end + 1], "eos")
    assert result.tokens_per_pass == [1, 5, end - 5]


@pytest.mark.parametrize("limit", [1, 2, 5, 6, 8, 11])
def test_a_budget_cuts_an_accepted_run(small_model, limit):
    ids, text = varied_text(small_model, 8)
    [result] = Decoder(small_model, draft=Perfect(text, 5), max_length=60).generate([ids], limit, [])
    assert result.new_tokens == text[:limit] and sum(result.tokens_per_pass) == limit


def test_an_end_token_after_the_budget_does_not_count(small_model):
    ids, text = varied_text(small_model, 8)
    [result] = Decoder(small_model, draft=Perfect(text, 5), max_length=60).generate([ids], 8, text[8])
    assert (result.new_tokens, result.stopped_by) == (text[:8], "length")


@pytest.mark.parametrize("form", [int, lambda x: [x], torch.tensor, lambda x: torch.tensor([x, 49])])
def test_end_tokens_are_taken_in_every_form_and_the_first_may_be_one(small_model, form):
    first = own_text(small_model, prompt(5), 1)[0]
    [result] = Decoder(small_model, max_length=60).generate([prompt(5)], 9, form(first))
    assert (result.new_tokens, result.stopped_by, result.tokens_per_pass) == ([first], "eos", [1])


def test_end_tokens_come_from_the_generation_config_by_default():
    model = small_llama()
    ids, text = varied_text(model, 8)
    model.generation_config.eos_token_id = [text[8]]
    assert Decoder(model, max_length=60).generate([ids], 20)[0].new_tokens == text[:9]


def test_the_budget_is_lowered_to_what_is_left_of_the_context(small_model):
    decoder = Decoder(small_model, random_heads(small_model, 4), Tree.chain(4), max_length=96)
    assert decoder.generate([prompt(93)], 60, [])[0].new_tokens == own_text(small_model, prompt(93), 3)


def test_decoding_can_be_left_and_entered_again(small_model):
    decoder = Decoder(small_model, random_heads(small_model, 3), random_tree(3, 9), max_length=96)
    for steps, _ in zip(decoder.decode(decoder.slots_for([prompt(40)], 30)), range(3), strict=False):
        assert steps[0]
    for length in (40, 3, 60):
        ids = prompt(length, length)
        assert decoder.generate([ids], 30, [])[0].new_tokens == own_text(small_model, ids, 30)


@pytest.mark.parametrize(("longest", "columns"), [(1, 32), (23, 32), (24, 64), (96, 105)])
def test_attention_reads_a_multiple_of_columns_within_the_capacity(small_model, longest, columns):
    decoder = Decoder(small_model, random_heads(small_model, 3), random_tree(3, 9), max_length=96)
    assert decoder.draft.size == 9 and decoder.span(longest) == columns
    decoder.compile_seconds, decoder.verifier.device = 1.0, torch.device("cuda")
    assert decoder.span(longest) == decoder.verifier.capacity  # a CUDA graph has one shape


class Listener:
    """A streamer that notes what it is given."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.tolist()

    def end(self):
        self.ended = True


def test_a_streamer_gets_the_prompt_and_every_token_in_order(small_model):
    listener, decoder = Listener(), Decoder(small_model, random_heads(small_model, 2), Tree.chain(2), max_length=60)
    [result] = decoder.generate([prompt(5)], 20, streamer=listener)
    assert listener.tokens == result.sequences[0].tolist() and listener.ended


def test_stop_strings_end_the_text_where_transformers_ends_it(tiny_model, tokenizer):
    ids = tokenizer("def add(a, b):", return_tensors="pt").input_ids[0]
    middle = tokenizer.decode(own_text(tiny_model, ids, 40)[6:9])
    stop = middle[1:] if len(middle) > 2 else middle  # begins inside a token
    decoder = Decoder(tiny_model, random_heads(tiny_model, 2), Tree.chain(2), max_length=80)
    [ours] = decoder.generate([ids], 40, [], stop_strings=[stop], tokenizer=tokenizer)
    assert ours.new_tokens == own_text(tiny_model, ids, 40, stop_strings=[stop], tokenizer=tokenizer)
    assert ours.stopped_by == "stop string" and len(ours.new_tokens) < 40


def test_stopping_criteria_are_asked_after_each_token(small_model):
    ids, text = varied_text(small_model, 8)
    decoder = Decoder(small_model, draft=Perfect(text, 5), max_length=60)
    [result] = decoder.generate([ids], 40, [], stopping_criteria=lambda ids, scores: ids[:, -1] == text[8])
    assert (result.new_tokens, result.stopped_by) == (text[:9], "stopping criteria")


def test_cut_at_end():
    assert cut_at_end([1, 2, 3], {2}) == ([1, 2], "eos")
    assert cut_at_end([1, 2, 3], {9}) == ([1, 2, 3], "")


def test_who_drafted_each_token():
    assert Step([7, 1, 2, 3], [0, 1, 3], [1, 3, 9], [0, 0, 0, 1], {3}).drafted_by == [0, COPIED, None]
    assert Step([], [], [5]).drafted_by == [None]
    assert Step([7, 1], [0, 1], [1]).drafted_by == [0]  # cut at the end of the text


@pytest.mark.parametrize(
    ("ids", "limit", "message"),
    [
        (prompt(96), 9, "the prompt has 96 tokens"),
        (prompt(105), 9, "shorten the prompt"),
        (prompt(0), 9, "non-empty tensor"),
        (prompt(5).unsqueeze(0), 9, "non-empty tensor"),
        ([1, 2], 9, "non-empty tensor"),
        (prompt(5), 0, "at least one token"),
        (prompt(5), 30, "5 prompt tokens and 30 new ones do not fit.*max_length of 20"),
    ],
    ids=["context full", "too long", "empty", "two dimensions", "a list", "no token", "no room"],
)
def test_requests_that_are_refused(small_model, ids, limit, message):
    with pytest.raises(InputError, match=message):
        Decoder(small_model, max_length=20).generate([ids], limit)


def test_calls_that_are_refused(small_model):
    decoder = Decoder(small_model, max_length=20)
    with pytest.raises(InputError, match="2 prompts; decode them one by one"):
        decoder.generate([prompt(5)] * 2, 5, streamer=Listener())
    with pytest.raises(InputError, match="pass the tokenizer"):
        decoder.generate([prompt(5)], 5, stop_strings=["x"])
    with pytest.raises(InputError, match="2 prompts.*1 slot"):
        decoder.generate([prompt(5)] * 2, 5)
    with pytest.raises(InputError, match="0 prompts"):
        decoder.generate([], 5)


def test_plain_decoding_has_a_tree_of_one_node(small_model):
    assert Decoder(small_model, max_length=20).draft.size == StaticTree(None).size == 1
