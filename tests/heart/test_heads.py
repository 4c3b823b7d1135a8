"""Medusa heads: what they compute, what they draft, and what is trained."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import small_llama

from medusa_nb.errors import InputError
from medusa_nb.heads import MedusaHeads
from medusa_nb.path_heads import PathHeads

FEW = torch.tensor([41, 7, 0, 30, 12])
SHAPES = [(1, 1, False), (4, 1, True), (3, 2, False), (5, 2, True)]


def random_heads(model, K=3, layers=1, own=False, vocabulary=None, seed=0) -> MedusaHeads:
    heads = MedusaHeads(model, K, layers, own, vocabulary)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return heads


@pytest.mark.parametrize(("K", "layers", "own"), SHAPES)
def test_batched_heads_equal_a_loop(small_model, K, layers, own):
    heads, hidden = random_heads(small_model, K, layers, own), torch.randn(2, 3, 32)
    logits = heads(hidden)
    assert logits.shape == (K, 2, 3, 50)
    for k in range(K):
        x = hidden
        for i in range(layers):
            x = x + F.silu(F.linear(x, heads.weight[k, i], heads.bias[k, i]))
        expected = F.linear(x, heads.projection[k]) if own else small_model.lm_head(x)
        assert torch.allclose(logits[k], expected, atol=1e-4)
    assert torch.allclose(heads(hidden[0, 0]), logits[:, 0, 0], atol=1e-4)
    assert torch.allclose(heads.project(heads.blocks(hidden[0], 1)), logits[:1, 0], atol=1e-4)


@pytest.mark.parametrize("own", [False, True])
def test_untrained_heads_repeat_the_base_model(small_model, own):
    hidden = torch.randn(9, 32)
    for head in MedusaHeads(small_model, 3, 2, own)(hidden):
        assert torch.allclose(head, small_model.lm_head(hidden), atol=1e-5)


@pytest.mark.parametrize("vocabulary", [None, FEW])
@pytest.mark.parametrize("kind", [MedusaHeads, PathHeads])
def test_drafts_are_the_likeliest_tokens_of_the_same_logits(small_model, kind, vocabulary):
    """Head by head, as drafting asks for them, gives what all heads at once give."""
    heads = kind(small_model, 3, vocabulary=vocabulary)
    torch.manual_seed(1)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hidden, paths = torch.randn(2, 32), torch.randint(50, (2, 4, 3))
    for k in range(3):
        started = heads.start(hidden, 3, 2)
        tokens, scores = heads.draft(k, started, paths[..., : k + 1])
        assert tokens.shape == scores.shape == (2, 4, 2)
        for b in range(2):
            for p in range(4):
                chances = heads(hidden[b], paths[b, p])[k].log_softmax(-1)
                best = chances.topk(2)
                assert tokens[b, p].tolist() == heads.tokens(best.indices).tolist()
                assert torch.allclose(scores[b, p], best.values, atol=1e-4)
                assert vocabulary is None or set(tokens[b, p].tolist()) <= set(FEW.tolist())


@pytest.mark.parametrize("own", [False, True])
def test_no_two_heads_share_a_block_and_all_are_trained(small_model, own):
    heads = MedusaHeads(small_model, 3, 2, own)
    torch.manual_seed(0)
    before = {name: parameter.detach().clone() for name, parameter in heads.named_parameters()}
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        logits = heads(torch.randn(20, 32))
        sum(F.cross_entropy(head, torch.randint(50, (20,))) for head in logits).backward()
        optimizer.step()
    for name, parameter in heads.named_parameters():
        steps = (parameter.detach() - before[name]).flatten(1)
        assert (steps.abs().sum(1) > 0).all(), name
        assert not torch.allclose(steps[0], steps[1]) and not torch.allclose(steps[1], steps[2])
    both_layers = heads.weight.detach() - before["weight"]
    assert not torch.allclose(both_layers[:, 0], both_layers[:, 1])


@pytest.mark.parametrize("heads", [MedusaHeads, PathHeads])
def test_the_base_model_is_no_parameter_of_the_heads(small_model, heads):
    made = heads(small_model, 2)
    mine = {id(tensor) for tensor in small_model.state_dict(keep_vars=True).values()}
    assert not mine & {id(parameter) for parameter in made.parameters()}
    assert not any(name.startswith("base") for name in made.state_dict())
    made(torch.randn(4, 32), torch.randint(50, (4, 2))).sum().backward()
    assert all(parameter.grad is None for parameter in small_model.parameters())


def test_heads_take_the_dtype_of_the_base_model():
    heads = MedusaHeads(small_llama().to(torch.bfloat16), 2)
    assert heads.dtype == torch.bfloat16 and heads.device.type == "cpu"
    assert heads(torch.randn(4, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("own", [False, True])
def test_limited_heads_say_of_few_words_what_they_said_of_all(small_model, own):
    heads, hidden = random_heads(small_model, own=own), torch.randn(6, 32)
    limited = heads.limited_to(FEW)
    assert torch.allclose(limited(hidden), heads(hidden)[..., FEW], atol=1e-5)
    assert limited.weight is heads.weight and heads.vocabulary is None and limited.num_choices == 5
    fewer = limited.limited_to(FEW[[3, 1]])
    assert torch.allclose(fewer(hidden), heads(hidden)[..., FEW[[3, 1]]], atol=1e-5)


@pytest.mark.parametrize("own", [False, True])
def test_heads_limited_to_a_word_they_do_not_draft_are_refused(small_model, own):
    limited = random_heads(small_model, own=own).limited_to(FEW)
    with pytest.raises(InputError, match="do not draft token 3"):
        limited.limited_to(torch.tensor([7, 3]))


def test_places_and_tokens_of_a_draft_vocabulary(small_model):
    heads = random_heads(small_model, vocabulary=FEW)
    assert heads.places(torch.tensor([[12, 41], [3, -100]])).tolist() == [[4, 0], [-1, -100]]
    assert heads.tokens(torch.tensor([[4, 0]])).tolist() == [[12, 41]]
    everything = random_heads(small_model)
    assert everything.places(torch.tensor([3, -100])).tolist() == [3, -100] and everything.num_choices == 50


@pytest.mark.parametrize("kind", [MedusaHeads, PathHeads])
@pytest.mark.parametrize("ids", [[3, 3], [50], [-1, 2], [], [[1, 2]], [1.0]])
def test_what_is_no_draft_vocabulary_is_refused(small_model, kind, ids):
    with pytest.raises(InputError, match="different token ids from 0 to 49"):
        kind(small_model, 1, vocabulary=torch.tensor(ids))


@pytest.mark.parametrize("kind", [MedusaHeads, PathHeads])
@pytest.mark.parametrize("count", [0, -1])
def test_no_head_is_refused(small_model, kind, count):
    with pytest.raises(InputError, match="at least one head"):
        kind(small_model, count)


def test_no_block_is_refused(small_model):
    with pytest.raises(InputError, match="at least one residual block"):
        MedusaHeads(small_model, 2, num_layers=0)
