"""The loss equals a plain reference, ranks equal a sort, and nothing is counted among NaN."""

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import small_llama

from medusa_nb.errors import InputError
from medusa_nb.heads import MedusaHeads
from medusa_nb.path_heads import PathHeads
from medusa_nb.training.features import IGNORED, cache_features
from medusa_nb.training.loss import NEVER, RANKS, HeadsWithLoss, accuracy, head_losses, label_ranks, rank_table

pytest_plugins = ["training_setting"]
WORDS = torch.tensor([7, 3, 21, 40])


def trained_looking(heads):
    """Heads with random weights: untrained ones all say the same."""
    torch.manual_seed(3)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return heads.requires_grad_(False)


def reference(logits, labels, soft=None) -> list[float]:
    """The loss of each head, written out number by number."""
    losses = []
    for k, rows in enumerate(logits):
        terms = []
        for b, row in enumerate(rows):
            if labels[b, k] != IGNORED:
                target = torch.zeros(len(row))
                target[labels[b, k]] = 1
                if soft:
                    ids, weights = soft[0][b, k], soft[1][b, k]
                    target *= 1 - sum(weights)
                    for token, weight in zip(ids, weights, strict=True):
                        target[token] += weight
                terms.append(-(target * row.log_softmax(-1)).sum().item())
        losses.append(sum(terms) / len(terms) if terms else 0.0)
    return losses


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 7), st.booleans())
def test_losses_equal_a_plain_reference(seed, heads, rows, with_soft):
    torch.manual_seed(seed)
    logits, labels = 3 * torch.randn(heads, rows, 20), torch.randint(20, (rows, heads))
    labels[torch.rand(rows, heads) < 0.3] = IGNORED
    labels[0, 0] = 5
    soft = (torch.randint(20, (rows, heads, 3)), 0.3 * torch.rand(rows, heads, 3)) if with_soft else None
    torch.testing.assert_close(head_losses(logits, labels, soft), torch.tensor(reference(logits, labels, soft)))


def test_losses_equal_torchs_cross_entropy():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 6, 50), torch.randint(50, (6, 3))
    labels[2:, 1] = IGNORED
    labels[:, 2] = IGNORED
    losses = head_losses(logits, labels)
    torch.testing.assert_close(losses[0], F.cross_entropy(logits[0], labels[:, 0]))
    torch.testing.assert_close(losses[1], F.cross_entropy(logits[1, :2], labels[:2, 1]))
    assert losses[2] == 0


def test_all_labels_ignored():
    with pytest.raises(InputError, match="every label of this batch is ignored"):
        head_losses(torch.randn(2, 5, 50), torch.full((5, 2), IGNORED))


def test_head_k_is_compared_with_column_k_plus_1_and_weighted_by_depth(small_model):
    torch.manual_seed(0)
    heads, hidden, labels = trained_looking(MedusaHeads(small_model, 3)), torch.randn(6, 32), torch.randint(50, (6, 4))
    losses = [F.cross_entropy(logits, labels[:, k + 1]) for k, logits in enumerate(heads(hidden))]
    expected = losses[0] + 0.5 * losses[1] + 0.25 * losses[2]
    found = HeadsWithLoss(heads, 0.5, 0.0, torch.float32)(hidden, labels)
    torch.testing.assert_close(found["loss"], expected)
    torch.testing.assert_close(found["head_loss"], torch.stack(losses))


@pytest.mark.parametrize("kind", [MedusaHeads, PathHeads])
def test_half_of_the_loss_is_soft(small_model, kind):
    torch.manual_seed(0)
    heads, hidden, labels = trained_looking(kind(small_model, 2)), torch.randn(6, 32), torch.randint(50, (6, 3))
    likely, probabilities = torch.randint(50, (6, 2, 3)), torch.tensor([0.5, 0.3, 0.2]).expand(6, 2, 3)
    logits = heads(hidden, labels[:, :2])
    wanted = reference(logits, labels[:, 1:], (likely, 0.5 * probabilities))
    found = HeadsWithLoss(heads, 0.5, 0.5, torch.float32)(hidden, labels, likely, probabilities)
    torch.testing.assert_close(found["loss"].item(), wanted[0] + 0.5 * wanted[1])


def test_tokens_outside_the_draft_vocabulary_are_no_labels_and_no_soft_labels(small_model):
    torch.manual_seed(0)
    heads = trained_looking(PathHeads(small_model, 1, WORDS))
    hidden, labels = torch.randn(3, 32), torch.tensor([[1, 3], [1, 9], [1, 40]])
    likely, probabilities = torch.tensor([[[21, 9]], [[3, 7]], [[8, 9]]]), torch.tensor([[[0.6, 0.4]]] * 3)
    logits = heads(hidden, labels[:, :1])[0]
    first = torch.tensor([0.0, 0.5 * 0.4 + 0.5, 0.5 * 0.6, 0.0])  # 9 is none of 7, 3, 21, 40: its weight is the label's
    last = torch.tensor([0.0, 0.0, 0.0, 1.0])
    rows = [-(target * logits[b].log_softmax(-1)).sum() for b, target in ((0, first), (2, last))]
    found = HeadsWithLoss(heads, 1.0, 0.5, torch.float32)(hidden, labels, likely, probabilities)
    torch.testing.assert_close(found["loss"], sum(rows) / 2)
    assert found["places"].tolist() == [[1], [-1], [3]]


# --- ranks


def test_label_ranks_equal_a_sort():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 6, (3, 20, 30), generator=generator).float()  # many ties
    labels = torch.randint(0, 30, (20, 3), generator=generator)
    labels[::4, 1] = IGNORED
    ranks = label_ranks(logits, labels)
    for k in range(3):
        for b in range(20):
            scores, label = logits[k, b], labels[b, k]
            if label == IGNORED:
                assert ranks[b, k] == -1
            else:  # among equal ones any order will do
                assert (scores > scores[label]).sum() <= ranks[b, k] < (scores >= scores[label]).sum()


def test_no_two_tokens_share_a_rank():
    logits = torch.zeros(1, 30, 30)
    assert sorted(label_ranks(logits, torch.arange(30)[:, None])[:, 0].tolist()) == list(range(30))


def test_ranks_beyond_those_told_apart_and_tokens_never_drafted_are_never():
    logits = -torch.arange(100.0).expand(1, 3, 100)
    assert label_ranks(logits, torch.tensor([[RANKS - 1], [RANKS], [-1]])).tolist() == [[RANKS - 1], [NEVER], [NEVER]]


@pytest.mark.parametrize("where", ["everywhere", "one", "the label's"])
def test_a_rank_among_nan_logits_is_refused_and_never_0(where):
    logits, labels = torch.randn(2, 5, 80), torch.randint(80, (5, 2))
    place = dict(everywhere=(slice(None),) * 3, one=(1, 4, 17), **{"the label's": (0, 2, labels[2, 0])})[where]
    logits[place] = float("nan")
    with pytest.raises(InputError, match="logits are not finite"):
        label_ranks(logits, labels)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_an_error(bad):
    logits, labels = torch.randn(2, 5, 80), torch.randint(80, (5, 2))
    logits[1, 3, 7] = bad
    with pytest.raises(InputError, match="the loss is not finite"):
        head_losses(logits, labels)


def test_heads_with_nan_weights_are_not_judged(tiny_model, tokenizer, rows, tmp_path):
    features = cache_features(tiny_model, tokenizer, rows[:4], tmp_path / "f", 2)
    heads = MedusaHeads(tiny_model, 2)
    heads.bias.data[1, 0, 5] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        rank_table(heads, features)


@pytest.mark.parametrize("kind", ["medusa", "path", "draft vocabulary"])
def test_the_rank_table_equals_a_computation_position_by_position(tiny_model, tokenizer, rows, tmp_path, kind):
    features = cache_features(tiny_model, tokenizer, rows[:6], tmp_path / "f", 3)
    said = features.labels[features.labels >= 0].unique()
    words = said[torch.randperm(len(said), generator=torch.Generator().manual_seed(0))[: len(said) // 2]]
    heads = (
        MedusaHeads(tiny_model, 3) if kind == "medusa" else PathHeads(tiny_model, 3, words if kind[0] == "d" else None)
    )
    trained_looking(heads)
    table = rank_table(heads, features, batch=7)
    assert table.shape == (len(features), 3)
    source = random.Random(0)
    for p in source.sample(range(len(features)), 12):
        labels = features.labels[p]
        logits = heads(features.hidden[p : p + 1].float(), labels[:-1].clamp(min=0)[None])[:, 0]
        for k, label in enumerate(labels[1:].tolist()):
            ids = heads.tokens(logits[k].topk(min(RANKS, logits.shape[-1])).indices).tolist()
            rank = -1 if label == IGNORED else ids.index(label) if label in ids else NEVER
            assert table[p, k] == rank
    assert not bool((table == NEVER).all())


def test_accuracy_by_hand():
    scores = accuracy(torch.tensor([[0, 7, -1], [1, -1, -1], [5, -1, -1], [0, 4, -1]]), top=(1, 5))
    assert scores[0] == dict(top1=0.5, top5=0.75, labels=4)
    assert scores[1] == dict(top1=0.0, top5=0.5, labels=2)
    assert scores[2] == dict(top1=None, top5=None, labels=0)


def test_accuracy_of_a_token_never_drafted_counts_as_wrong():
    assert accuracy(torch.tensor([[0], [NEVER]]))[0]["top5"] == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_stay_in_fp32_and_products_are_in_the_base_models_dtype(dtype):
    model = small_llama().to(dtype)
    heads = MedusaHeads(model, 2).float()
    outputs = HeadsWithLoss(heads, 0.8, 0.0, dtype)(torch.randn(4, 32), torch.randint(50, (4, 3)))
    assert outputs["logits"].dtype == dtype and outputs["loss"].dtype == torch.float32
    assert heads.weight.dtype == torch.float32 and model.lm_head.weight.dtype == dtype
