"""Heads that see the path: they equal a loop, and head k sees the first k + 1 tokens only."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import small_llama

from medusa_nb.path_heads import PathHeads

FEW = torch.tensor([41, 7, 0, 30, 12])


def random_path_heads(model, K=3, vocabulary=None, seed=0) -> PathHeads:
    heads = PathHeads(model, K, vocabulary)
    torch.manual_seed(seed)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return heads.requires_grad_(False)


@pytest.mark.parametrize("vocabulary", [None, FEW])
def test_they_equal_a_loop(small_model, vocabulary):
    heads, hidden, path = (
        random_path_heads(small_model, 3, vocabulary),
        torch.randn(2, 5, 32),
        torch.randint(50, (2, 5, 3)),
    )
    logits, words = heads(hidden, path), small_model.get_input_embeddings()(path)
    assert logits.shape == (3, 2, 5, 50 if vocabulary is None else 5)
    for k in range(3):
        seen = torch.cat([hidden, *(words[:, :, i] for i in range(k + 1))], -1)
        x = hidden + F.silu(seen @ heads.weight[k].T + heads.bias[k])
        assert torch.allclose(logits[k], x @ heads.projection.T, atol=1e-4)


def test_head_k_sees_the_first_k_plus_one_tokens_only(small_model):
    heads, hidden, path = random_path_heads(small_model), torch.randn(4, 32), torch.randint(50, (4, 3))
    for place in range(3):
        other = path.clone()
        other[..., place] = (other[..., place] + 1) % 50
        changed = [not torch.allclose(a, b) for a, b in zip(heads(hidden, path), heads(hidden, other), strict=True)]
        assert changed == [k >= place for k in range(3)]


@pytest.mark.parametrize("vocabulary", [None, FEW])
def test_untrained_they_repeat_the_base_model(small_model, vocabulary):
    hidden = torch.randn(9, 32)
    expected = small_model.lm_head(hidden)
    expected = expected if vocabulary is None else expected[:, vocabulary]
    for head in PathHeads(small_model, 2, vocabulary)(hidden, torch.arange(18).view(9, 2)):
        assert torch.allclose(head, expected, atol=1e-5)


def test_heads_in_another_dtype_than_the_model(small_model):
    """In training they are float32 beside a base model in bf16."""
    heads = PathHeads(small_llama().to(torch.bfloat16), 2).float()
    assert heads(torch.randn(4, 32), torch.zeros(4, 2, dtype=torch.long)).dtype == torch.float32


def test_no_server_takes_them_for_plain_heads(small_model):
    config = random_path_heads(small_model, vocabulary=FEW).config()
    assert config["sees_path"] and config["draft_vocabulary_size"] == 5 and "medusa_num_layers" not in config
