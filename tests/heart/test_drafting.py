"""Drafts: trees hold what a slow obvious version says, and never change the text."""

import pytest
import torch
from drafts import FEW, own_text, path_heads, prompt, random_heads
from tiny_models import random_tree, small_llama

from medusa_nb.decoding import COPIED, Decoder
from medusa_nb.drafting import Candidates, GrowingTree, State, StaticTree
from medusa_nb.errors import InputError
from medusa_nb.tree import Tree

WORTH = torch.tensor([[0.0] * 4, [0.3, 0.2, 0.1, 0.05], [0.6, 0.5, 0.4, 0.3], [0.9, 0.8, 0.7, 0.6]])
CERTAIN = torch.full((4, 4), 0.99).masked_fill(torch.arange(4).unsqueeze(1) == 0, 0.0)


def state_of(tokens: list[int], seed: int = 0) -> State:
    torch.manual_seed(seed)
    lengths = torch.randint(3, 15, (len(tokens),))
    text = torch.randint(4, (len(tokens), 20))
    return State(torch.tensor(tokens), 3 * torch.randn(len(tokens), 32), lengths, text)


def slow_logits(heads, hidden: torch.Tensor, path: tuple[int, ...]) -> torch.Tensor:
    """What the head below ``path`` (token ids, the root first) says, alone: ``[V']``."""
    whole = torch.tensor([path + (0,) * (heads.num_heads - len(path))])
    return heads(hidden, whole)[len(path) - 1, 0]


def slow_choice(heads, state: State, size: int, branch: int) -> set[tuple[int, ...]]:
    """Best-first, for one text: of all paths of tokens the most probable ones."""
    worth, level = {(state.token.item(),): 1.0}, [(state.token.item(),)]
    for _ in range(heads.num_heads):
        deeper = []
        for path in level:
            top = slow_logits(heads, state.hidden, path).softmax(-1).topk(branch)
            for p, token in zip(top.values.tolist(), heads.tokens(top.indices).tolist(), strict=True):
                worth[path + (token,)] = worth[path] * p
                deeper.append(path + (token,))
        level = deeper
    return set(sorted(worth, key=worth.get, reverse=True)[:size])


def paths_of(candidates: Candidates) -> list[tuple[int, ...]]:
    """The first text's nodes as paths of token ids, with the tree's shape checked on the way."""
    tokens, parents, depths, mask = (x[0].tolist() for x in candidates[:4])
    paths, above = [(tokens[0],)], [{0}]
    for node in range(1, len(tokens)):
        assert parents[node] < node
        paths.append(paths[parents[node]] + (tokens[node],))
        above.append(above[parents[node]] | {node})
    assert depths == [len(path) - 1 for path in paths]
    assert [{i for i, seen in enumerate(row) if seen} for row in mask] == above
    return paths


@pytest.mark.parametrize("make", [path_heads, random_heads])
@pytest.mark.parametrize("seed", range(8))
def test_the_growing_tree_holds_the_most_probable_paths(small_model, seed, make):
    heads, state = make(small_model, 3, seed), state_of([seed], seed)
    paths = paths_of(GrowingTree(heads, 9, beam=64, branch=6)(state))
    assert set(paths) == slow_choice(heads, state, 9, 6) and len(set(paths)) == 9


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("size", [2, 3, 8, 12])
def test_every_size_can_be_grown(small_model, K, size):
    candidates = GrowingTree(path_heads(small_model, K), size, ngram_worth=WORTH)(state_of([0, 1, 2]))
    assert candidates.tokens.shape == (3, size)
    assert len(set(paths_of(candidates))) > 1


@pytest.mark.parametrize("vocabulary", [None, FEW])
@pytest.mark.parametrize("seed", range(4))
def test_a_static_tree_is_filled_path_by_path(small_model, seed, vocabulary):
    heads, tree = path_heads(small_model, 3, seed, vocabulary=vocabulary), random_tree(3, 14, seed)
    state = state_of([seed, 7], seed)
    tokens = StaticTree(heads, tree)(state).tokens
    for line in range(2):
        words = [(tokens[line, 0].item(),)]
        for node in range(1, len(tree)):
            above, rank = words[tree.parents[node]], tree.paths[node][-1]
            best = slow_logits(heads, state.hidden[line : line + 1], above).argsort(descending=True)
            assert tokens[line, node] == heads.tokens(best)[rank]
            words.append(above + (tokens[line, node].item(),))


@pytest.mark.parametrize("worth", [None, WORTH], ids=["heads", "heads and n-grams"])
@pytest.mark.parametrize("vocabulary", [None, FEW], ids=["any token", "few tokens"])
@pytest.mark.parametrize("seed", range(3))
def test_growing_trees_do_not_change_the_text(worth, vocabulary, seed):
    model = small_llama(seed=seed)
    draft = GrowingTree(path_heads(model, 3, seed, vocabulary=vocabulary), 9, ngram_worth=worth)
    decoder = Decoder(model, draft=draft, slots=3, max_length=92)
    prompts, ends = [prompt(length, seed=length) for length in (1, 30, 52)], list(range(3, 50, 9))
    for ids, result in zip(prompts, decoder.generate(prompts, 40, ends), strict=True):
        assert result.new_tokens == own_text(model, ids, 40, ends)


def test_certain_copies_come_before_doubtful_heads(small_model):
    text = torch.tensor([7, 8, 9, 10, 11, 12, 7, 8, 9, 10])
    draft = GrowingTree(random_heads(small_model, 2), 5, ngram_worth=CERTAIN)
    state = Decoder(small_model, draft=draft, max_length=80).start([text])
    state.text[0, len(text)] = 11  # as if the model had gone on like this
    candidates = draft(state._replace(token=torch.tensor([11])))
    assert candidates.tokens[0].tolist() == [11, 12, 7, 8, 9]
    assert candidates.parents[0].tolist() == [0, 0, 1, 2, 3]
    assert candidates.copied[0].tolist() == [False, True, True, True, True]


def test_a_copied_token_that_a_head_drafted_too_is_verified_once(small_model):
    heads = path_heads(small_model, 2)
    draft, state = GrowingTree(heads, 6, ngram_worth=CERTAIN[:, :3]), state_of([7])
    drafted = slow_logits(heads, state.hidden, (7,)).argmax().item()
    text = torch.tensor([[7, drafted, 8, 9, 1, 2, 7, 0, 0]])  # after 7 came what head 0 drafts, then 8 and 9
    paths = paths_of(draft(state._replace(text=text, lengths=torch.tensor([6]))))
    assert (7, drafted, 8, 9) in paths
    assert paths.count((7, drafted)) == 1


def test_every_emitted_draft_token_is_told_from_the_base_models_own(small_model):
    draft = GrowingTree(random_heads(small_model, 2), 6, ngram_worth=CERTAIN)
    [result] = Decoder(small_model, draft=draft, max_length=96).generate([prompt(30)], 50, [])
    who = [source for step in result.steps for source in step.drafted_by]
    assert len(who) == len(result.new_tokens) and set(who) <= {None, COPIED, 0, 1}
    for step in result.steps[1:]:
        nodes = step.path[1:][: len(step.emitted)]
        assert [step.tokens[node] for node in nodes] == step.emitted[: len(nodes)]


def test_drafts_that_are_refused(small_model):
    heads = random_heads(small_model, 2)
    with pytest.raises(InputError, match="needs heads and at least 2 nodes"):
        GrowingTree(heads, 1)
    with pytest.raises(InputError, match="only 2 tokens cannot fill a tree of 30 nodes"):
        GrowingTree(path_heads(small_model, 2, vocabulary=torch.tensor([3, 9])), 30)
    with pytest.raises(InputError, match="3 tokens deep.*2 heads"):
        StaticTree(heads, Tree.chain(3))
    with pytest.raises(InputError, match="0 heads"):
        Decoder(small_model, None, Tree.chain(1), max_length=50)
