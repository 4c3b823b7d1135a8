"""Candidate trees against slow, obvious computations."""

from collections import Counter
from itertools import combinations

import pytest
import torch
from tiny_models import random_tree

from medusa_nb.errors import InputError
from medusa_nb.tree import ROOT_ONLY, Tree, build_tree, count_ranks, expected_tokens


def random_counts(seed: int, positions: int = 200, heads: int = 3, ranks: int = 3) -> Counter:
    generator = torch.Generator().manual_seed(seed)
    return count_ranks(torch.randint(-1, ranks, (positions, heads), generator=generator))


@pytest.mark.parametrize("seed", range(8))
def test_mask_is_what_a_walk_to_the_root_meets(seed):
    tree = random_tree(K=5, n=20, seed=seed)
    mask = tree.mask()
    for i in range(len(tree)):
        met, node = set(), i
        while node >= 0:
            met.add(node)
            node = tree.parents[node]
        assert set(mask[i].nonzero().flatten().tolist()) == met
        assert mask[i].sum() == tree.depths()[i] + 1


@pytest.mark.parametrize("seed", range(8))
def test_parents_come_first_and_know_their_children(seed):
    tree = random_tree(K=4, n=20, seed=seed)
    for i, parent in enumerate(tree.parents[1:], 1):
        assert parent < i
        assert tree.paths[i][:-1] == tree.paths[parent]
        assert i in tree.children[parent]
    assert sum(map(len, tree.children)) == len(tree) - 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_build_tree_is_the_best_subset(seed, size):
    counts = random_counts(seed, heads=2, ranks=3)
    nodes = [path for path in counts if path]
    best = 0
    for chosen in combinations(nodes, size - 1):
        if all(path[:-1] == () or path[:-1] in chosen for path in chosen):
            best = max(best, sum(counts[path] for path in chosen))
    tree = build_tree(counts, size)
    assert len(tree) == size
    assert sum(counts[path] for path in tree.paths[1:]) == best


def test_build_tree_by_hand():
    counts = Counter({(): 10, (0,): 6, (1,): 3, (0, 0): 4, (0, 1): 1, (0, 0, 0): 2})
    assert build_tree(counts, 4).paths == ((), (0,), (0, 0), (1,))
    assert set(build_tree(counts, 100).paths) == set(counts)


def test_build_tree_puts_the_parent_first_when_counts_are_equal():
    assert build_tree(Counter({(): 2, (0, 0): 2, (0,): 2, (0, 0, 0): 2}), 3).paths == ((), (0,), (0, 0))


def test_count_ranks_by_hand():
    ranks = torch.tensor([[0, 2], [0, -1], [1, 0], [-1, 0], [0, 2], [40, 0]])
    assert count_ranks(ranks) == {(): 6, (0,): 3, (0, 2): 2, (1,): 1, (1, 0): 1}
    assert count_ranks(ranks, max_rank=2) == {(): 6, (0,): 3, (1,): 1, (1, 0): 1}


def test_expected_tokens_by_hand():
    counts = Counter({(): 10, (0,): 6, (0, 0): 3})
    assert expected_tokens(ROOT_ONLY, counts) == 1
    assert expected_tokens(Tree.chain(2), counts) == pytest.approx(1.9)
    with pytest.raises(InputError, match="no entry"):
        expected_tokens(Tree.chain(2), Counter({(0,): 6}))


@pytest.mark.parametrize("seed", range(3))
def test_expected_tokens_is_the_mean_of_accepted_paths(seed):
    ranks = torch.randint(-1, 3, (100, 3), generator=torch.Generator().manual_seed(seed))
    tree = random_tree(K=3, n=9, seed=seed, width=3)
    total = 0
    for row in ranks.tolist():
        accepted = 0
        while accepted < 3 and tuple(row[: accepted + 1]) in tree.paths:
            accepted += 1
        total += 1 + accepted
    assert expected_tokens(tree, count_ranks(ranks)) == pytest.approx(total / 100)


def test_chain_and_tree_from_paths():
    assert Tree.chain(2).paths == ((), (0,), (0, 0))
    assert (Tree.chain(3).depth, Tree.chain(3).width, ROOT_ONLY.depth, ROOT_ONLY.width) == (3, 1, 0, 0)
    assert Tree.from_paths([(0, 1), (0,), (2,)]).paths == ((), (0,), (2,), (0, 1))


@pytest.mark.parametrize("seed", range(5))
def test_a_tree_from_parents_has_the_same_shape(seed):
    tree = random_tree(3, 12, seed)
    again = Tree.from_parents(tree.parents)
    assert again.parents == tree.parents and again.depths().tolist() == tree.depths().tolist()


@pytest.mark.parametrize(
    "paths",
    [((), (0, 0), (0,)), ((), (0, 0)), ((0,),), (), ((), (0,), (0,)), ((0,), ())],
    ids=["child first", "no parent", "no root", "nothing", "twice", "root last"],
)
def test_bad_trees_are_refused(paths):
    with pytest.raises(InputError):
        Tree(paths)


def test_size_zero_is_refused():
    with pytest.raises(InputError, match="size=0"):
        build_tree(Counter({(): 1, (0,): 1}), 0)
