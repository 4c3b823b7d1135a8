"""The key-value cache: what is written, kept and read back, for layers of one shape and of several."""

import pytest
import torch

from medusa_nb.kv_cache import SlotCache

# for each layer: (heads, head_dim) of its keys and of its values
SAME, MIXED = [((2, 4), (2, 4))] * 3, [((2, 4), (2, 4)), ((1, 8), (1, 6)), ((2, 4), (2, 4))]


def states(shapes, texts: int, count: int, seed: int):
    """Random keys and values ``[texts, heads, count, head_dim]`` of each layer."""
    torch.manual_seed(seed)
    return [tuple(torch.randn(texts, heads, count, width) for heads, width in pair) for pair in shapes]


@pytest.mark.parametrize("shapes", [SAME, MIXED], ids=["one shape", "several shapes"])
def test_the_accepted_path_moves_after_the_text_in_every_layer(shapes):
    cache = SlotCache(slots=2, capacity=9)
    prompts, lengths, path = states(shapes, 2, 4, seed=0), torch.tensor([4, 2]), torch.tensor([[0, 2], [0, 3]])
    cache.fill([0, 1], prompts)
    assert len(cache.buffers) == sum(len({pair[i] for pair in shapes}) for i in (0, 1))  # keys, then values
    cache.write_at(lengths, count=4, span=9)
    drafted = states(shapes, 2, 4, seed=1)
    for number, pair in enumerate(drafted):
        for written, read in zip(pair, cache.update(*pair, number), strict=True):
            for text, start in enumerate(lengths.tolist()):
                assert torch.equal(read[text, :, start : start + 4], written[text])
    cache.keep(lengths, path)
    cache.write_at(lengths + 2, count=1, span=9)
    for number, pair in enumerate(states(shapes, 2, 1, seed=2)):
        for before, wrote, read in zip(prompts[number], drafted[number], cache.update(*pair, number), strict=True):
            for text, start in enumerate(lengths.tolist()):
                assert torch.equal(read[text, :, :start], before[text, :, :start])
                assert torch.equal(read[text, :, start : start + 2], wrote[text, :, path[text]])


def test_a_slot_is_copied_to_another_and_the_rest_stays():
    cache, prompts = SlotCache(slots=3, capacity=6), states(MIXED, 3, 5, seed=0)
    cache.fill([0, 1, 2], prompts)
    cache.move_slot(2, 0, 3)
    cache.write_at(torch.tensor([5, 5, 5]), count=1, span=6)
    for number, pair in enumerate(states(MIXED, 3, 1, seed=1)):
        for before, read in zip(prompts[number], cache.update(*pair, number), strict=True):
            assert torch.equal(read[0, :, :3], before[2, :, :3]) and torch.equal(read[0, :, 3:5], before[0, :, 3:])
            assert torch.equal(read[1:, :, :5], before[1:])
