"""Drafts: dynamic trees and n-gram guesses are what a slow obvious version says, and never change the text."""

import math
import random

import pytest
import torch
from conftest import random_model, random_tree, small_llama
from test_decoding import CONFIGS, prompt, random_heads
from test_heads import seeing_heads

from medusa_nb.decoding import Decoder, greedy_generate
from medusa_nb.drafting import DraftVocabulary, DynamicDraft, State, TreeDraft, frequent_tokens
from medusa_nb.errors import InputError
from medusa_nb.ngrams import ngram_guesses, ngram_worth
from medusa_nb.tree import chain


def slow_ngram(text: list[int], count: int, longest: int) -> tuple[list[int], int]:
    """The obvious way: try long endings first, and of equal ones the latest earlier place."""
    for n in range(min(longest, len(text) - 1), 0, -1):
        for end in range(len(text) - 2, n - 2, -1):
            if text[end - n + 1 : end + 1] == text[-n:]:
                follow = text[end + 1 :]
                return [follow[i % len(follow)] for i in range(count)], n
    return [], 0


@pytest.mark.parametrize("seed", range(40))
def test_ngram_guesses_equal_the_obvious_search(seed):
    source = random.Random(seed)
    texts = [[source.randrange(4) for _ in range(source.randint(1, 25))] for _ in range(6)]
    padded = torch.tensor([text + [source.randrange(4) for _ in range(30 - len(text))] for text in texts])
    ends = torch.tensor([len(text) - 1 for text in texts])
    guesses, matched = ngram_guesses(padded, ends, count=5, longest=3)
    for text, row, n in zip(texts, guesses.tolist(), matched.tolist(), strict=True):
        expected, length = slow_ngram(text, 5, 3)
        assert n == length
        assert not length or row == expected


def test_ngram_worth_by_hand():
    ids = [1, 2, 3, 4, 1, 2, 3, 5]  # from 4 on: '1' repeats; then 1 matches, 2 match, 3 match and fail
    worth = ngram_worth([ids], [4], count=2, longest=3)
    assert worth[0].tolist() == [0, 0]
    assert worth[1].tolist() == pytest.approx([1 / 2, 1 / 2])  # after '1': guessed 2, 3, both right
    assert worth[2].tolist() == pytest.approx([1 / 2, 0])  # after '1 2': guessed 3, 4; 4 is wrong
    assert worth[3].tolist() == [0, 0]  # after '1 2 3': guessed 4, wrong


def slow_choice(draft: DynamicDraft, state: State) -> set[tuple[int, ...]]:
    """The best-first way, for one text without n-grams: the most probable paths of ranks."""
    probabilities = draft.heads(state.hidden, root=state.root).softmax(-1)[:, 0].sort(descending=True).values
    worth = {p: math.prod(probabilities[k, rank].item() for k, rank in enumerate(p)) for p in draft.tree.paths}
    return set(sorted(worth, key=worth.get, reverse=True)[: draft.size])


@pytest.mark.parametrize("seed", range(10))
def test_the_dynamic_tree_holds_the_most_probable_paths(small_model, seed):
    heads, pool = seeing_heads(small_model, 3, seed), random_tree(3, 30, seed)
    draft = DynamicDraft(heads, pool, 9, "cpu")
    torch.manual_seed(seed)
    state = State(torch.tensor([seed]), 3 * torch.randn(1, 32), torch.tensor([5]))
    tokens, parents, depths, ancestors = (x[0] for x in draft(state))
    top = heads(state.hidden, root=state.root)[:, 0].argsort(descending=True)
    paths = [()]
    for node in range(1, 9):
        assert parents[node] < node
        head = depths[node] - 1
        rank = (top[head] == tokens[node]).nonzero().item()
        paths.append(paths[parents[node]] + (rank,))
        assert len(paths[node]) == depths[node]
        above = ancestors[node].nonzero()[:, 0].tolist()
        assert above == sorted({node, *ancestors[parents[node]].nonzero()[:, 0].tolist()})
    assert set(paths) == slow_choice(draft, state)


WORTH = torch.tensor([[0.0] * 4, [0.3, 0.2, 0.1, 0.05], [0.6, 0.5, 0.4, 0.3], [0.9, 0.8, 0.7, 0.6]])


@pytest.mark.parametrize("config", CONFIGS[:6], ids=lambda config: config.model_type)
@pytest.mark.parametrize("worth", [None, WORTH], ids=["heads", "heads and n-grams"])
def test_dynamic_trees_do_not_change_the_text(config, worth):
    model = random_model(config, seed=7)
    draft = DynamicDraft(random_heads(model, 3, seed=7), random_tree(3, 20, seed=7), 9, "cpu", worth)
    decoder = Decoder(model, draft=draft, slots=3, capacity=52 + 40 + 9)
    prompts, ends = [prompt(length, seed=length)[0] for length in (1, 30, 52)], list(range(3, 50, 9))
    for ids, result in zip(prompts, decoder.generate(prompts, 40, ends), strict=True):
        assert result.new_tokens == greedy_generate(model, ids.unsqueeze(0), 40, ends).new_tokens


def test_certain_ngrams_come_before_doubtful_heads(small_model):
    text = torch.tensor([7, 8, 9, 10, 11, 12, 7, 8, 9, 10])
    certain = torch.full((4, 4), 0.99).masked_fill(torch.arange(4).unsqueeze(1) == 0, 0.0)
    draft = DynamicDraft(random_heads(small_model, 2), random_tree(2, 9), 5, "cpu", certain)
    state = Decoder(small_model, draft=draft, capacity=96).start([text])
    state.text[0, len(text)] = 11  # as if the model had gone on like this
    candidates = draft(state._replace(root=torch.tensor([11])))
    assert candidates.tokens[0].tolist() == [11, 12, 7, 8, 9]
    assert candidates.parents[0].tolist() == [0, 0, 1, 2, 3]


def test_the_compiled_dynamic_step_gives_the_same_text():
    model = small_llama(seed=3)
    draft = DynamicDraft(seeing_heads(model, 3), random_tree(3, 20), 9, "cpu", WORTH)
    decoder = Decoder(model, draft=draft, capacity=96)
    decoder.compile()
    if decoder.why_eager:
        pytest.skip(decoder.why_eager)
    for length in (2, 40):
        ids = prompt(length, seed=length)
        expected = greedy_generate(model, ids, 40, eos_token_id=[]).new_tokens
        assert decoder.generate([ids[0]], 40, eos_token_id=[])[0].new_tokens == expected


def test_pools_that_are_refused(small_model):
    with pytest.raises(InputError, match="9 nodes cannot be chosen from a pool of 3"):
        DynamicDraft(random_heads(small_model, 2), chain(2), 9, "cpu")
    with pytest.raises(InputError, match="3 guesses deep.*2 heads"):
        DynamicDraft(random_heads(small_model, 2), chain(3), 2, "cpu")


def test_a_draft_vocabulary_guesses_the_best_of_what_it_has(small_model):
    heads, tree = seeing_heads(small_model, 2), chain(2)
    ids = torch.arange(1, 50, 2)
    draft = TreeDraft(heads, tree, "cpu", DraftVocabulary(heads, ids))
    state = State(torch.tensor([3]), torch.randn(1, 32), torch.tensor([5]))
    logits = heads(state.hidden, root=state.root)[:, 0]
    expected = [ids[logits[k, ids].argmax()].item() for k in range(2)]
    assert draft(state).tokens[0].tolist() == [3, *expected]
    decoder = Decoder(small_model, draft=draft, capacity=60)
    plain = greedy_generate(small_model, prompt(5), 40, eos_token_id=[])
    assert decoder.generate([prompt(5)[0]], 40, eos_token_id=[])[0].new_tokens == plain.new_tokens


def test_frequent_tokens_are_those_said_most():
    assert frequent_tokens([[5, 5, 2], [2, 9, 5]], 2).tolist() == [2, 5]


def test_own_projections_have_no_draft_vocabulary(small_model):
    from medusa_nb.heads import MedusaHeads

    with pytest.raises(InputError, match="own projections"):
        DraftVocabulary(MedusaHeads.for_model(small_model, 1, own_projection=True), torch.arange(3))
