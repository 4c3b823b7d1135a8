"""Drafts: dynamic trees and n-gram guesses are what a slow obvious version says, and never change the text."""

import random

import pytest
import torch
from conftest import random_model, random_tree, small_llama
from test_decoding import CONFIGS, prompt, random_heads
from test_heads import few_words_heads, seeing_heads

from medusa_nb.decoding import Decoder, greedy_generate
from medusa_nb.drafting import Candidates, DynamicDraft, State, TreeDraft
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


def slow_logits(heads, hidden: torch.Tensor, path: tuple[int, ...]) -> torch.Tensor:
    """What the head below ``path`` (token ids, the root first) says, alone: ``[V]``."""
    k = len(path) - 1
    whole = torch.tensor([path + (0,) * (heads.num_heads - len(path))])
    return heads(hidden, path=whole)[k, 0]


def slow_choice(heads, state: State, size: int, branch: int) -> set[tuple[int, ...]]:
    """The best-first way, for one text without n-grams: of all paths of tokens the most probable ones."""
    worth, level = {(state.root.item(),): 1.0}, [(state.root.item(),)]
    for _ in range(heads.num_heads):
        deeper = []
        for path in level:
            top = slow_logits(heads, state.hidden, path).softmax(-1).topk(branch)
            for p, token in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                worth[path + (token,)] = worth[path] * p
                deeper.append(path + (token,))
        level = deeper
    return set(sorted(worth, key=worth.get, reverse=True)[:size])


def paths_of(candidates: Candidates) -> list[tuple[int, ...]]:
    """The first text's nodes as paths of token ids, with the tree's shape checked on the way."""
    tokens, parents, depths, ancestors = (x[0].tolist() for x in candidates[:4])
    paths, above = [(tokens[0],)], [{0}]
    for node in range(1, len(tokens)):
        assert parents[node] < node
        paths.append(paths[parents[node]] + (tokens[node],))
        above.append(above[parents[node]] | {node})
    assert depths == [len(path) - 1 for path in paths]
    assert [{i for i, seen in enumerate(row) if seen} for row in ancestors] == above
    return paths


@pytest.mark.parametrize("seeing", [True, False], ids=["see the path", "plain"])
@pytest.mark.parametrize("seed", range(8))
def test_the_growing_tree_holds_the_most_probable_paths(small_model, seed, seeing):
    heads = seeing_heads(small_model, 3, seed) if seeing else random_heads(small_model, 3, seed)
    draft = DynamicDraft(heads, 9, "cpu", beam=64, branch=6)
    torch.manual_seed(seed)
    state = State(torch.tensor([seed]), 3 * torch.randn(1, 32), torch.tensor([5]))
    paths = paths_of(draft(state))
    assert set(paths) == slow_choice(heads, state, 9, 6) and len(set(paths)) == 9


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("size", [2, 3, 8, 12])
def test_every_size_can_be_grown(small_model, K, size):
    draft = DynamicDraft(seeing_heads(small_model, K), size, "cpu", WORTH)
    state = State(torch.arange(3), torch.randn(3, 32), torch.tensor([5, 9, 2]), torch.randint(4, (3, 20)))
    candidates = draft(state)
    assert candidates.tokens.shape == (3, size)
    assert len(set(paths_of(candidates))) > 1


@pytest.mark.parametrize("seed", range(5))
def test_a_static_tree_is_filled_path_by_path(small_model, seed):
    heads, tree = seeing_heads(small_model, 3, seed), random_tree(3, 14, seed)
    torch.manual_seed(seed)
    state = State(torch.tensor([seed, 7]), 3 * torch.randn(2, 32), torch.tensor([5, 5]))
    tokens = TreeDraft(heads, tree, "cpu")(state).tokens
    for line in range(2):
        words = [(tokens[line, 0].item(),)]
        for node in range(1, len(tree)):
            above, rank = words[tree.parents[node]], tree.paths[node][-1]
            best = slow_logits(heads, state.hidden[line : line + 1], above).argsort(descending=True)
            assert tokens[line, node] == best[rank]
            words.append(above + (tokens[line, node].item(),))


WORTH = torch.tensor([[0.0] * 4, [0.3, 0.2, 0.1, 0.05], [0.6, 0.5, 0.4, 0.3], [0.9, 0.8, 0.7, 0.6]])


@pytest.mark.parametrize("config", CONFIGS[:6], ids=lambda config: config.model_type)
@pytest.mark.parametrize("worth", [None, WORTH], ids=["heads", "heads and n-grams"])
@pytest.mark.parametrize("few", [False, True], ids=["any word", "few words"])
def test_dynamic_trees_do_not_change_the_text(config, worth, few):
    model = random_model(config, seed=7)
    heads = few_words_heads(model) if few else random_heads(model, 3, seed=7, see_path=True)
    draft = DynamicDraft(heads, 9, "cpu", worth)
    decoder = Decoder(model, draft=draft, slots=3, capacity=52 + 40 + 9)
    prompts, ends = [prompt(length, seed=length)[0] for length in (1, 30, 52)], list(range(3, 50, 9))
    for ids, result in zip(prompts, decoder.generate(prompts, 40, ends), strict=True):
        assert result.new_tokens == greedy_generate(model, ids.unsqueeze(0), 40, ends).new_tokens


def test_certain_ngrams_come_before_doubtful_heads(small_model):
    text = torch.tensor([7, 8, 9, 10, 11, 12, 7, 8, 9, 10])
    certain = torch.full((4, 4), 0.99).masked_fill(torch.arange(4).unsqueeze(1) == 0, 0.0)
    draft = DynamicDraft(random_heads(small_model, 2), 5, "cpu", certain)
    state = Decoder(small_model, draft=draft, capacity=96).start([text])
    state.text[0, len(text)] = 11  # as if the model had gone on like this
    candidates = draft(state._replace(root=torch.tensor([11])))
    assert candidates.tokens[0].tolist() == [11, 12, 7, 8, 9]
    assert candidates.parents[0].tolist() == [0, 0, 1, 2, 3]
    assert candidates.copied[0].tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("own", [False, True], ids=["shared lm_head", "own projections, tables"])
def test_the_compiled_dynamic_step_gives_the_same_text(own, compiler_works):
    model = small_llama(seed=3)
    heads = few_words_heads(model) if own else seeing_heads(model, 3).limited_to(torch.arange(40))
    draft = DynamicDraft(heads, 9, "cpu", WORTH)
    decoder = Decoder(model, draft=draft, capacity=96)
    assert decoder.compile(), decoder.why_eager
    for length in (2, 40):
        ids = prompt(length, seed=length)
        expected = greedy_generate(model, ids, 40, eos_token_id=[]).new_tokens
        assert decoder.generate([ids[0]], 40, eos_token_id=[])[0].new_tokens == expected


def test_a_copied_token_that_a_head_guessed_too_is_checked_once(small_model):
    heads = seeing_heads(small_model, 2)
    draft = DynamicDraft(heads, 6, "cpu", torch.full((4, 3), 0.9).masked_fill(torch.arange(4).unsqueeze(1) == 0, 0.0))
    state = State(torch.tensor([7]), 3 * torch.randn(1, 32), torch.tensor([6]))
    guessed = heads(state.hidden, path=torch.tensor([[7, 0]]))[0, 0].argmax().item()
    text = torch.tensor([[7, guessed, 8, 9, 1, 2, 7, 0, 0]])  # after 7 came what head 0 guesses, then 8 and 9
    paths = paths_of(draft(state._replace(text=text)))
    assert (7, guessed, 8, 9) in paths
    assert len(set(paths)) == len(paths) or sum(path == (7, guessed) for path in paths) == 1


def test_drafts_that_are_refused(small_model):
    with pytest.raises(InputError, match="needs heads and at least 2 nodes"):
        DynamicDraft(random_heads(small_model, 2), 1, "cpu")
    with pytest.raises(InputError, match="only 2 tokens cannot fill a tree of 30 nodes"):
        DynamicDraft(random_heads(small_model, 2).limited_to(torch.tensor([3, 9])), 30, "cpu")
    with pytest.raises(InputError, match="3 guesses deep.*2 heads"):
        Decoder(small_model, random_heads(small_model, 2), chain(3), capacity=50)


def test_a_draft_vocabulary_guesses_the_best_of_what_it_has(small_model):
    heads, tree = seeing_heads(small_model, 2), chain(2)
    ids = torch.arange(1, 50, 2)
    draft = TreeDraft(heads.limited_to(ids), tree, "cpu")
    state = State(torch.tensor([3]), torch.randn(1, 32), torch.tensor([5]))
    expected = [3]
    for _ in range(2):
        logits = slow_logits(heads, state.hidden, tuple(expected))
        expected.append(ids[logits[ids].argmax()].item())
    assert draft(state).tokens[0].tolist() == expected
    decoder = Decoder(small_model, draft=draft, capacity=60)
    plain = greedy_generate(small_model, prompt(5), 40, eos_token_id=[])
    assert decoder.generate([prompt(5)[0]], 40, eos_token_id=[])[0].new_tokens == plain.new_tokens
