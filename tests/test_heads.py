"""Medusa heads: what they compute, and files that are complete or refused."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import small_llama
from safetensors.torch import load_file, save_file

from medusa_nb.errors import InputError
from medusa_nb.fast_heads import FastHeads
from medusa_nb.heads import CONFIG, WEIGHTS, MedusaHeads

SHAPES = [(K, layers, own) for K in range(1, 6) for layers in (1, 2) for own in (False, True)]


def random_heads(model, K=3, layers=1, own=False, seed=0) -> MedusaHeads:
    heads = MedusaHeads.for_model(model, K, layers, own)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return heads


@pytest.fixture
def saved(tmp_path, small_model):
    random_heads(small_model).save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, **changes):
    """Change tensors of a saved file; None removes one."""
    tensors = load_file(folder / WEIGHTS) | {name.replace("_", "."): t for name, t in changes.items()}
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / WEIGHTS)


@pytest.mark.parametrize(("K", "layers", "own"), SHAPES)
def test_round_trip(tmp_path, small_model, K, layers, own):
    heads, hidden = random_heads(small_model, K, layers, own), torch.randn(7, 32)
    heads.save_pretrained(tmp_path)
    again = MedusaHeads.from_pretrained(tmp_path, small_model)
    assert torch.equal(again(hidden), heads(hidden))
    assert again(hidden).shape == (K, 7, 50)
    assert not any(p.requires_grad for p in again.parameters())
    expected = {f"{k}.{i}.linear.{part}" for k in range(K) for i in range(layers) for part in ("weight", "bias")}
    expected |= {f"{k}.{layers}.weight" for k in range(K)} if own else set()
    assert set(load_file(tmp_path / WEIGHTS)) == expected
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["medusa_num_heads"], config["medusa_num_layers"]) == (K, layers)


@pytest.mark.parametrize(("K", "layers", "own"), [(1, 1, False), (4, 1, True), (3, 2, False), (5, 2, True)])
def test_batched_heads_equal_a_loop(small_model, K, layers, own):
    heads, hidden = random_heads(small_model, K, layers, own), torch.randn(2, 3, 32)
    logits = heads(hidden)
    for k in range(K):
        x = hidden
        for i in range(layers):
            x = x + F.silu(F.linear(x, heads.weight[k, i], heads.bias[k, i]))
        expected = F.linear(x, heads.projection[k]) if own else small_model.lm_head(x)
        assert torch.allclose(logits[k], expected, atol=1e-4)
    assert torch.allclose(heads(hidden, 1), logits[:1], atol=1e-5)
    assert torch.allclose(heads(hidden[0, 0]), logits[:, 0, 0], atol=1e-4)


@pytest.mark.parametrize("own", [False, True])
def test_untrained_heads_repeat_the_base_model(small_model, own):
    hidden = torch.randn(9, 32)
    logits = MedusaHeads.for_model(small_model, 3, 2, own)(hidden)
    for head in logits:
        assert torch.allclose(head, small_model.lm_head(hidden), atol=1e-5)


@pytest.mark.parametrize("own", [False, True])
def test_blocks_share_nothing_and_part_after_one_step(tmp_path, small_model, own):
    heads = MedusaHeads.for_model(small_model, 3, 2, own)
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.1)
    logits = heads(torch.randn(20, 32))
    loss = sum(F.cross_entropy(head, torch.randint(50, (20,))) for head in logits)
    loss.backward()
    for k in range(3):
        assert heads.weight.grad[k].abs().sum() > 0 and heads.bias.grad[k].abs().sum() > 0
        assert not own or heads.projection.grad[k].abs().sum() > 0
    optimizer.step()
    heads.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    weights = [tensors[f"{k}.{i}.linear.weight"] for k in range(3) for i in range(2)]
    assert len({t.data_ptr() for t in weights}) == 6
    for head in range(3):  # one head's two layers start equal; only different heads have different labels
        for other in range(head):
            assert not torch.equal(weights[2 * head], weights[2 * other])
    with torch.no_grad():
        before = heads.weight.clone()
        heads.weight[1, 0] += 1
    changed = (heads.weight != before).flatten(2).any(-1)
    assert changed.nonzero().tolist() == [[1, 0]]


def test_layers_of_one_head_are_trained_apart(small_model):
    heads = random_heads(small_model, 2, 2)
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.1)
    before = heads.weight.detach().clone()
    F.cross_entropy(heads(torch.randn(20, 32)).flatten(0, 1), torch.randint(50, (40,))).backward()
    optimizer.step()
    steps = heads.weight.detach() - before
    for k in range(2):
        assert steps[k, 0].abs().sum() > 0
        assert not torch.allclose(steps[k, 0], steps[k, 1])


def test_the_base_model_is_no_parameter_of_the_heads(small_model):
    heads = MedusaHeads.for_model(small_model, 2)
    assert sorted(name for name, _ in heads.named_parameters()) == ["bias", "weight"]
    assert sorted(heads.state_dict()) == ["bias", "weight"]


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_missing_file(saved, small_model, name):
    (saved / name).unlink()
    with pytest.raises(InputError, match=f"no {name}"):
        MedusaHeads.from_pretrained(saved, small_model)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"\xff" * 40, lambda data: b""])
def test_damaged_weights(saved, small_model, damage):
    (saved / WEIGHTS).write_bytes(damage((saved / WEIGHTS).read_bytes()))
    with pytest.raises(InputError, match="damaged or cut short"):
        MedusaHeads.from_pretrained(saved, small_model)


def test_missing_tensor(saved, small_model):
    rewrite(saved, **{"1_0_linear_bias": None})
    with pytest.raises(InputError, match="lacks 1.0.linear.bias"):
        MedusaHeads.from_pretrained(saved, small_model)


def test_extra_tensor(saved, small_model):
    rewrite(saved, **{"2_7_linear_bias": torch.zeros(32)})
    with pytest.raises(InputError, match="holds 2.7.linear.bias"):
        MedusaHeads.from_pretrained(saved, small_model)


@pytest.mark.parametrize("shape", [(16,), (1,), (32, 32)])
def test_tensor_of_another_shape(saved, small_model, shape):
    rewrite(saved, **{"1_0_linear_bias": torch.zeros(shape)})
    with pytest.raises(InputError, match="1.0.linear.bias"):
        MedusaHeads.from_pretrained(saved, small_model)


@pytest.mark.parametrize("own", [False, True])
def test_other_base_model(tmp_path, small_model, own):
    random_heads(small_model, own=own).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"hidden size 32\), this model has 64"):
        MedusaHeads.from_pretrained(tmp_path, small_llama(hidden_size=64))
    with pytest.raises(InputError, match=r"vocabulary 50\), this model has 51"):
        MedusaHeads.from_pretrained(tmp_path, small_llama(vocab_size=51))


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"a":\n}', "line 2"), ("{}", "medusa_num_heads"), ("[]", "does not describe Medusa heads")],
)
def test_bad_config(saved, small_model, text, message):
    (saved / CONFIG).write_text(text)
    with pytest.raises(InputError, match=message):
        MedusaHeads.from_pretrained(saved, small_model)


def test_no_head_is_refused(small_model):
    with pytest.raises(InputError, match="at least one head"):
        MedusaHeads.for_model(small_model, 0)


def seeing_heads(model, K=3, seed=0) -> MedusaHeads:
    heads = MedusaHeads.for_model(model, K, see_path=True)
    torch.manual_seed(seed)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return heads.requires_grad_(False)


def test_heads_that_see_the_path_equal_a_loop(small_model):
    heads, hidden, path = seeing_heads(small_model), torch.randn(2, 5, 32), torch.randint(50, (2, 5, 3))
    logits = heads(hidden, path=path)
    words = small_model.get_input_embeddings()(path)
    for k in range(3):
        x = hidden + F.silu(F.linear(hidden, heads.weight[k, 0], heads.bias[k, 0]))
        seen = torch.cat([x, *(words[:, :, i] for i in range(k + 1))], -1)
        x = x + F.silu(F.linear(seen, heads.path_weight[k], heads.path_bias[k]))
        assert torch.allclose(logits[k], small_model.lm_head(x), atol=1e-4)
        alone = heads.after(k, heads.blocks(hidden[0], 3)[k], path[0, :, None, : k + 1])
        assert torch.allclose(alone[:, 0], logits[k, 0], atol=1e-4)
    other = path.clone()
    other[..., 1] = (other[..., 1] + 1) % 50
    changed = [not torch.allclose(a, b) for a, b in zip(logits, heads(hidden, path=other), strict=True)]
    assert changed == [False, True, True]  # head 0 sees the root only


def test_untrained_heads_that_see_the_path_repeat_the_base_model(small_model):
    hidden = torch.randn(9, 32)
    logits = MedusaHeads.for_model(small_model, 2, see_path=True)(hidden, path=torch.arange(18).view(9, 2))
    assert torch.allclose(logits[1], small_model.lm_head(hidden), atol=1e-5)


def test_heads_that_see_the_path_come_back_as_they_went(tmp_path, small_model):
    heads = seeing_heads(small_model)
    heads.save_pretrained(tmp_path)
    again = MedusaHeads.from_pretrained(tmp_path, small_model)
    hidden, path = torch.randn(4, 32), torch.arange(12).view(4, 3)
    assert again.sees_path and torch.equal(again(hidden, path=path), heads(hidden, path=path))
    rewrite(tmp_path, **{"1_path_bias": None})
    with pytest.raises(InputError, match=r"lacks 1\.path\.bias"):
        MedusaHeads.from_pretrained(tmp_path, small_model)


def test_heads_that_see_the_path_need_it(small_model):
    with pytest.raises(InputError, match="these heads see the path"):
        seeing_heads(small_model)(torch.randn(2, 32))


FEW = torch.tensor([41, 7, 0, 30, 12])


def few_words_heads(model, own=True, seed=0) -> MedusaHeads:
    """Heads that guess only the tokens :data:`FEW`; the block that reads the path is their only one."""
    heads = MedusaHeads.for_model(model, 3, num_layers=0, own_projection=own, see_path=True, vocabulary=FEW)
    torch.manual_seed(seed)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return heads.requires_grad_(False)


@pytest.mark.parametrize("own", [False, True])
def test_heads_with_a_draft_vocabulary_equal_a_loop(small_model, own):
    heads, hidden, path = few_words_heads(small_model, own), torch.randn(4, 32), torch.randint(50, (4, 3))
    logits, words = heads(hidden, path=path), small_model.get_input_embeddings()(path)
    assert logits.shape == (3, 4, 5)
    for k in range(3):
        seen = torch.cat([hidden, *(words[:, i] for i in range(k + 1))], -1)
        x = hidden + F.silu(F.linear(seen, heads.path_weight[k], heads.path_bias[k]))
        rows = heads.projection[k] if own else small_model.lm_head.weight[FEW]
        assert torch.allclose(logits[k], F.linear(x, rows), atol=1e-4)
        assert torch.allclose(heads.after(k, heads.blocks(hidden, 3)[k], path[:, None, : k + 1])[:, 0], logits[k])
    assert heads.tokens(logits[0].argmax(-1)).tolist() == [FEW[i].item() for i in logits[0].argmax(-1)]
    assert heads.places(torch.tensor([[12, 41], [3, -100]])).tolist() == [[4, 0], [-1, -100]]


@pytest.mark.parametrize("own", [False, True])
def test_limited_heads_say_of_few_words_what_they_said_of_all(small_model, own):
    heads, hidden = random_heads(small_model, own=own), torch.randn(6, 32)
    limited = heads.limited_to(FEW)
    assert torch.allclose(limited(hidden), heads(hidden)[..., FEW], atol=1e-5)
    assert limited.weight is heads.weight and heads.vocabulary is None
    with pytest.raises(InputError, match="guess only 5 tokens already"):
        limited.limited_to(FEW[:2])


@pytest.mark.parametrize("own", [False, True])
def test_a_draft_vocabulary_comes_back_as_it_went(tmp_path, small_model, own):
    heads, hidden, path = few_words_heads(small_model, own), torch.randn(4, 32), torch.arange(12).view(4, 3)
    heads.save_pretrained(tmp_path)
    again = MedusaHeads.from_pretrained(tmp_path, small_model)
    assert torch.equal(again.vocabulary, FEW) and torch.equal(again(hidden, path=path), heads(hidden, path=path))
    assert json.loads((tmp_path / CONFIG).read_text())["vocab_size"] == 50
    rewrite(tmp_path, vocabulary=torch.tensor([41, 7, 0, 30, 50]))
    with pytest.raises(InputError, match="different token ids from 0 to 49"):
        MedusaHeads.from_pretrained(tmp_path, small_model)
    rewrite(tmp_path, vocabulary=None)
    with pytest.raises(InputError, match="lacks the draft vocabulary of 5 tokens"):
        MedusaHeads.from_pretrained(tmp_path, small_model)


@pytest.mark.parametrize("ids", [[3, 3], [50], [-1, 2], [], [[1, 2]], [1.0]])
def test_what_is_no_draft_vocabulary_is_refused(small_model, ids):
    with pytest.raises(InputError, match="different token ids from 0 to 49"):
        MedusaHeads.for_model(small_model, 1, vocabulary=torch.tensor(ids))


def test_heads_without_any_block_repeat_the_base_model(small_model):
    hidden = torch.randn(9, 32)
    logits = MedusaHeads.for_model(small_model, 2, num_layers=0)(hidden)
    assert torch.allclose(logits[1], small_model.lm_head(hidden), atol=1e-5)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_heads_say_what_the_heads_say(small_model, own, dtype):
    heads = few_words_heads(small_llama().to(dtype), own)
    hidden, root = torch.randn(2, 32).to(dtype), torch.tensor([9, 41])
    path = torch.cat([root.view(2, 1, 1).expand(2, 4, 1), FEW[torch.randint(5, (2, 4, 2))]], 2)
    fast = FastHeads.of(heads)
    near = fast.near(hidden, root, 3)
    for k in range(3):
        expected = heads.after(k, heads.blocks(hidden, 3)[k], path[..., : k + 1])
        gap = (fast.after(k, hidden, near[k], path[..., : k + 1]) - expected).abs().max()
        assert gap < (0.03 * expected.abs().max() if dtype == torch.bfloat16 else 1e-4)
    assert len(fast.near(hidden, root, 2)) == 2
    assert FastHeads.of(seeing_heads(small_model)) is None and FastHeads.of(random_heads(small_model)) is None
