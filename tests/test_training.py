"""Training: heads learn, the base model does not change, and interrupted work goes on."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import small_llama
from transformers import TrainerCallback

from medusa_nb import training
from medusa_nb.base_model import fingerprint
from medusa_nb.errors import InputError
from medusa_nb.features import IGNORED, Features
from medusa_nb.heads import MedusaHeads
from medusa_nb.training import (
    NEVER,
    HeadsWithLoss,
    TrainingSettings,
    accuracy,
    head_losses,
    label_ranks,
    rank_table,
    train_heads,
)

# soft_share=0: what comes after one of these positions is not what the position after it says
SETTINGS = TrainingSettings(epochs=4, batch_size=16, learning_rate=0.02, soft_share=0, logging_steps=4, save_steps=8)


def write_features(folder, positions: int = 128, heads: int = 2, width: int = 32, seed: int = 0) -> Features:
    """Learnable features: eight noisy prototypes, each always followed by the same tokens."""
    torch.manual_seed(seed)
    kinds = torch.randint(8, (positions,))
    hidden = (torch.randn(8, width)[kinds] + 0.05 * torch.randn(positions, width)).to(torch.bfloat16)
    labels = torch.randint(50, (8, heads + 1))[kinds]
    labels[::10, -1] = IGNORED
    folder.mkdir(parents=True, exist_ok=True)
    likely, probabilities = labels[:, :1].int(), torch.ones(positions, 1, dtype=torch.bfloat16)
    for name, array in {"hidden.bf16": hidden, "probabilities.bf16": probabilities}.items():
        (folder / name).write_bytes(array.view(torch.int16).numpy().tobytes())
    (folder / "likely.i32").write_bytes(likely.numpy().tobytes())
    np.save(folder / "labels.npy", labels.numpy())
    np.save(folder / "conversation.npy", np.arange(positions))
    about = dict(positions=positions, hidden_size=width, num_heads=heads, key=str(seed), likely=1)
    (folder / "features.json").write_text(json.dumps(about))
    return Features(folder)


@pytest.fixture
def features(tmp_path):
    return write_features(tmp_path / "features")


class Interrupt(TrainerCallback):
    """Fails at a step, as a killed process would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class StepsSeen(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


def weights(heads) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in heads.parameters()])


@pytest.mark.parametrize("own", [False, True])
def test_training_learns_and_leaves_the_base_model_alone(tmp_path, features, own):
    model = small_llama()
    before = fingerprint(model)
    heads = MedusaHeads.for_model(model, 2, own_projection=own)
    untrained = accuracy(rank_table(heads, features))
    log = train_heads(heads, features, tmp_path / "out", SETTINGS)
    trained = accuracy(rank_table(heads, features))
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert log[-1]["head0_loss"] < log[0]["head0_loss"]
    assert trained[0]["top1"] > max(0.8, untrained[0]["top1"])
    assert trained[0]["labels"] == 128 and trained[1]["labels"] == 115
    assert fingerprint(model) == before
    assert not any(p.requires_grad for p in model.parameters())
    assert not (tmp_path / "out" / "checkpoints").exists()
    again = MedusaHeads.from_pretrained(tmp_path / "out", model)
    assert torch.equal(weights(again), weights(heads))


def test_heads_with_a_draft_vocabulary_learn_its_tokens_and_never_know_others(tmp_path, features, small_model):
    rare = features.labels[0, 1]
    words = features.labels[:, 1:3].unique()
    words = words[(words >= 0) & (words != rare)]
    heads = MedusaHeads.for_model(small_model, 2, num_layers=0, own_projection=True, see_path=True, vocabulary=words)
    log = train_heads(heads, features, tmp_path / "out", SETTINGS)
    ranks, labels = rank_table(heads, features), features.labels[:, 1:3]
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert bool((ranks[labels == rare] == NEVER).all()) and bool((ranks[labels == IGNORED] == -1).all())
    known = (labels >= 0) & (labels != rare)
    assert bool((ranks[known] < len(words)).all())
    assert (ranks[:, 0][known[:, 0]] == 0).float().mean() > 0.9
    share = (labels[:, 0] == rare).sum() / (labels[:, 0] >= 0).sum()
    assert accuracy(ranks)[0]["top1"] <= 1 - share
    again = MedusaHeads.from_pretrained(tmp_path / "out", small_model)
    assert torch.equal(rank_table(again, features), ranks)


def test_fewer_heads_than_features_train_the_first_ones(tmp_path, features, small_model):
    heads = MedusaHeads.for_model(small_model, 1)
    train_heads(heads, features, tmp_path / "out", SETTINGS)
    assert accuracy(rank_table(heads, features))[0]["top1"] > 0.8


def test_all_labels_ignored():
    with pytest.raises(InputError, match="every label of this batch is ignored"):
        head_losses(torch.randn(2, 5, 50), torch.full((5, 2), IGNORED))


def test_head_losses_are_means_over_labels():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 6, 50), torch.randint(50, (6, 3))
    labels[2:, 1] = IGNORED
    labels[:, 2] = IGNORED
    losses, used = head_losses(logits, labels)
    assert used.tolist() == [6, 2, 0]
    assert torch.allclose(losses[0], F.cross_entropy(logits[0], labels[:, 0]))
    assert torch.allclose(losses[1], F.cross_entropy(logits[1, :2], labels[:2, 1]))
    assert losses[2] == 0


def test_soft_labels_share_the_loss_with_the_label():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 6, 50), torch.randint(50, (6, 2))
    labels[4:, 1] = IGNORED
    ids, probabilities = torch.randint(50, (6, 2, 3)), torch.rand(6, 2, 3)
    probabilities /= probabilities.sum(-1, keepdim=True)
    losses, used = head_losses(logits, labels, (ids, 0.3 * probabilities))
    for k, rows in ((0, 6), (1, 4)):
        wanted = torch.zeros(rows, 50).scatter_add(1, ids[:rows, k], 0.3 * probabilities[:rows, k])
        wanted += 0.7 * F.one_hot(labels[:rows, k], 50)
        torch.testing.assert_close(losses[k], F.cross_entropy(logits[k, :rows], wanted))
    assert used.tolist() == [6, 4]


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_is_between_0_and_1(small_model, share):
    with pytest.raises(InputError, match=f"soft_share={share}; choose a number from 0"):
        HeadsWithLoss(MedusaHeads.for_model(small_model, 2), 0.8, share)


def test_training_learns_soft_labels_from_features(tmp_path, features, small_model):
    features.labels[:, 1:] = IGNORED
    features.labels[:, 1] = features.labels[:, 0].roll(-1)  # head 0's label is what the next position says
    features.labels[-1, 1] = IGNORED
    heads = MedusaHeads.for_model(small_model, 1)
    log = train_heads(heads, features, tmp_path / "out", dataclasses.replace(SETTINGS, soft_share=1.0))
    assert log[-1]["loss"] < log[0]["loss"] and weights(heads).any()


@pytest.mark.parametrize("count", [1, 2])
def test_half_of_the_loss_is_soft(small_model, count):
    torch.manual_seed(0)
    heads, hidden, labels = MedusaHeads.for_model(small_model, count), torch.randn(6, 32), torch.randint(50, (6, 3))
    soft = dict(likely=torch.randint(50, (6, 2, 1)), probabilities=torch.ones(6, 2, 1))
    other = torch.cat([labels[:, :1], soft["likely"][..., 0]], 1)
    hard, fully = (HeadsWithLoss(heads, 0.5)(hidden, wanted, **soft)["loss"] for wanted in (labels, other))
    half = HeadsWithLoss(heads, 0.5, soft_share=0.5)(hidden, labels, **soft)["loss"]
    torch.testing.assert_close(half, (hard + fully) / 2)


def test_loss_is_weighted_by_depth(small_model):
    torch.manual_seed(0)
    heads, hidden = MedusaHeads.for_model(small_model, 3), torch.randn(6, 32)
    labels = torch.randint(50, (6, 4))
    losses = [F.cross_entropy(logits, labels[:, k + 1]) for k, logits in enumerate(heads(hidden))]
    expected = losses[0] + 0.5 * losses[1] + 0.25 * losses[2]
    assert torch.allclose(HeadsWithLoss(heads, 0.5)(hidden, labels)["loss"], expected)


def test_label_ranks_equal_a_sort():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 6, (3, 20, 30), generator=generator).float()  # many ties
    labels = torch.randint(0, 30, (20, 3), generator=generator)
    labels[::4, 1] = IGNORED
    ranks = label_ranks(logits, labels)
    for k in range(3):
        for b in range(20):
            order = torch.argsort(logits[k, b], descending=True, stable=True).tolist()
            label = labels[b, k].item()
            assert ranks[b, k] == (-1 if label == IGNORED else order.index(label))


def test_accuracy_by_hand():
    scores = accuracy(torch.tensor([[0, 7], [1, -1], [5, -1], [0, 4]]), top=(1, 5))
    assert scores[0] == dict(top1=0.5, top5=0.75, labels=4)
    assert scores[1] == dict(top1=0.0, top5=0.5, labels=2)


@pytest.mark.parametrize("own", [False, True])
def test_interrupted_training_ends_at_the_same_weights(tmp_path, features, small_model, own):
    whole, first, second = (MedusaHeads.for_model(small_model, 2, own_projection=own) for _ in range(3))
    train_heads(whole, features, tmp_path / "whole", SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        train_heads(first, features, tmp_path / "parts", SETTINGS, [Interrupt(13)])
    seen = StepsSeen()
    train_heads(second, features, tmp_path / "parts", SETTINGS, [seen])
    assert seen.steps == list(range(9, 33))
    assert torch.allclose(weights(second), weights(whole), atol=1e-6)
    assert not torch.allclose(weights(first), weights(whole), atol=1e-3)


def test_no_checkpoint_is_made_of_the_finished_heads(tmp_path, features, small_model):
    class Saves(TrainerCallback):
        steps = []

        def on_save(self, args, state, control, **kwargs):
            self.steps.append(state.global_step)

    saves = Saves()
    train_heads(MedusaHeads.for_model(small_model, 2), features, tmp_path / "h", SETTINGS, [saves])
    assert saves.steps == [8, 16, 24]  # and not 32, the last step
    assert (tmp_path / "h" / "medusa_lm_head.safetensors").exists()


def test_other_settings_do_not_go_on_from_a_checkpoint(tmp_path, features, small_model):
    heads = MedusaHeads.for_model(small_model, 2)
    with pytest.raises(KeyboardInterrupt):
        train_heads(heads, features, tmp_path, SETTINGS, [Interrupt(13)])
    with pytest.raises(InputError, match="unfinished training with other settings"):
        train_heads(heads, features, tmp_path, TrainingSettings(epochs=5))


def test_other_features_do_not_go_on_from_a_checkpoint(tmp_path, features, small_model):
    with pytest.raises(KeyboardInterrupt):
        train_heads(MedusaHeads.for_model(small_model, 2), features, tmp_path, SETTINGS, [Interrupt(13)])
    other = write_features(tmp_path / "other", seed=1)
    with pytest.raises(InputError):
        train_heads(MedusaHeads.for_model(small_model, 2), other, tmp_path, SETTINGS)


@pytest.mark.parametrize(("count", "layers", "own"), [(1, 1, False), (2, 2, False), (2, 1, True)])
def test_other_heads_do_not_go_on_from_a_checkpoint(tmp_path, features, small_model, count, layers, own):
    with pytest.raises(KeyboardInterrupt):
        train_heads(MedusaHeads.for_model(small_model, 2), features, tmp_path, SETTINGS, [Interrupt(13)])
    with pytest.raises(InputError):
        train_heads(MedusaHeads.for_model(small_model, count, layers, own), features, tmp_path, SETTINGS)


def test_another_draft_vocabulary_does_not_go_on_from_a_checkpoint(tmp_path, features, small_model):
    words = features.labels[features.labels >= 0].unique()
    with pytest.raises(KeyboardInterrupt):
        train_heads(
            MedusaHeads.for_model(small_model, 2, vocabulary=words), features, tmp_path, SETTINGS, [Interrupt(13)]
        )
    with pytest.raises(InputError, match="other settings, heads or features"):
        train_heads(MedusaHeads.for_model(small_model, 2, vocabulary=words.flip(0)), features, tmp_path, SETTINGS)


def test_bf16_base_model_stays_bf16(tmp_path, features):
    model = small_llama().to(torch.bfloat16)
    lm_head, before = model.get_output_embeddings(), fingerprint(model)
    heads = MedusaHeads.for_model(model, 2)
    log = train_heads(heads, features, tmp_path, SETTINGS)
    assert log[-1]["loss"] < log[0]["loss"]
    assert heads.weight.dtype == heads.bias.dtype == model.dtype == torch.bfloat16
    assert heads.shared[0] is lm_head is model.get_output_embeddings()
    assert fingerprint(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_trained_in_fp32_and_multiplied_in_the_base_models_dtype(tmp_path, features, dtype, monkeypatch):
    seen = set()

    def listen(logits, labels, soft):
        seen.add((heads.weight.dtype, heads.shared[0].weight.dtype, logits.dtype))
        return head_losses(logits, labels, soft)

    monkeypatch.setattr(training, "head_losses", listen)
    heads = MedusaHeads.for_model(small_llama().to(dtype), 2)
    train_heads(heads, features, tmp_path, SETTINGS)
    assert seen == {(torch.float32, torch.float32, dtype)} and heads.weight.dtype == dtype


def test_dtype_is_put_back_after_an_interruption(tmp_path, features):
    model = small_llama().to(torch.bfloat16)
    heads = MedusaHeads.for_model(model, 2)
    with pytest.raises(KeyboardInterrupt):
        train_heads(heads, features, tmp_path, SETTINGS, [Interrupt(3)])
    assert heads.weight.dtype == torch.bfloat16
    assert heads.shared[0] is model.get_output_embeddings()


def test_features_that_do_not_fit(tmp_path, small_model, features):
    with pytest.raises(InputError, match="labels for 2 heads, there are 3"):
        train_heads(MedusaHeads.for_model(small_model, 3), features, tmp_path)
    wide = write_features(tmp_path / "wide", width=16)
    with pytest.raises(InputError, match="hidden size 16, the heads 32"):
        train_heads(MedusaHeads.for_model(small_model, 2), wide, tmp_path)
