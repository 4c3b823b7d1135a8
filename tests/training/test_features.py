"""Which tokens are supervised with what, and hidden states that are computed once."""

import copy
import threading

import numpy as np
import pytest
import torch
from tiny_models import small_llama

from medusa_nb.distillation.states import KeptStates
from medusa_nb.errors import InputError
from medusa_nb.training import features as module
from medusa_nb.training.features import (
    ABOUT,
    DATA,
    IGNORED,
    LIKELY,
    cache_features,
    encode_answer,
    head_labels,
    likeliest,
    supervise,
)


def talk(*contents: str, **more) -> dict:
    """User and assistant take turns."""
    return dict(messages=[dict(role=("user", "assistant")[i % 2], content=c) for i, c in enumerate(contents)], **more)


CONVERSATIONS = [
    talk("def add(a, b):", "    return a + b", id="0"),
    talk("def f():", "    pass", "again", "    return None", id="1"),
    talk("x", "y", id="2"),
    talk("def long(values):", "    total = 0\n    for v in values:\n        total += v\n    return total", id="3"),
    talk("def g(text):", "    return text.strip().lower()", id="4"),
]


# --- labels


def test_labels_by_hand():
    ids = list(range(10, 20))
    own = [t in (3, 4, 5, 8, 9) for t in range(10)]
    positions, labels = head_labels(ids, own, num_heads=2)
    assert positions == [2, 3, 4, 7, 8]
    assert labels == [  # the base model's own token, head 0's, head 1's
        [13, 14, 15],
        [14, 15, IGNORED],
        [15, IGNORED, IGNORED],
        [18, 19, IGNORED],
        [19, IGNORED, IGNORED],
    ]


def test_head_k_at_t_is_to_predict_the_token_at_t_plus_k_plus_2():
    ids = list(range(100, 130))
    positions, labels = head_labels(ids, [True] * 30, num_heads=4)
    for t, row in zip(positions, labels, strict=True):
        for k in range(4):
            assert row[k + 1] == (ids[t + k + 2] if t + k + 2 < 30 else IGNORED)


def test_labels_do_not_jump_over_another_turn_of_one_token():
    positions, labels = head_labels([10, 11, 12, 13, 14], [False, True, True, False, True], num_heads=3)
    assert positions == [0, 1, 3]
    assert labels == [[11, 12, IGNORED, IGNORED], [12, IGNORED, IGNORED, IGNORED], [14, IGNORED, IGNORED, IGNORED]]


def test_nothing_of_its_own():
    assert head_labels([1, 2, 3], [False] * 3, num_heads=2) == ([], [])


def test_the_end_token_is_the_last_label_and_not_one_of_an_answer_that_the_limit_cut(tokenizer):
    end = tokenizer.eos_token_id
    whole, cut = (encode_answer(tokenizer, talk("hi", "one two", finish_reason=why)) for why in ("stop", "length"))
    assert whole.ids == cut.ids
    assert head_labels(whole.ids, whole.own, 2)[1][-1] == [end, IGNORED, IGNORED]
    assert end not in [label for row in head_labels(cut.ids, cut.own, 2)[1] for label in row]
    assert sum(whole.own) == sum(cut.own) + 1


# --- B11: what is cut is counted


def test_conversations_longer_than_the_limit_are_cut_and_counted(tiny_model, tokenizer):
    whole = [len(encode_answer(tokenizer, row).ids) for row in CONVERSATIONS]
    limit = sorted(whole)[2]
    supervised, counts = supervise(tiny_model, tokenizer, CONVERSATIONS, 2, limit)
    assert counts["cut"] == sum(length > limit for length in whole) == 2
    assert [len(one.ids) for one in supervised] == [min(length, limit) for length in whole]
    assert counts["positions"] == sum(len(one.positions) for one in supervised)


def test_prompts_longer_than_the_limit_leave_no_answer_and_are_counted(tiny_model, tokenizer):
    rows = [*CONVERSATIONS, talk("a long question " * 40, "short")]
    supervised, counts = supervise(tiny_model, tokenizer, rows, 2, 80)
    assert counts["cut"] == counts["without_answer"] == 1 and not supervised[-1].positions
    with pytest.raises(InputError, match="1 were cut to 80 tokens"):
        supervise(tiny_model, tokenizer, rows[-1:], 2, 80)


def test_conversations_longer_than_the_models_context_are_cut_there(tmp_path, tokenizer):
    model = small_llama(len(tokenizer), context=45)
    features = cache_features(model, tokenizer, CONVERSATIONS, tmp_path / "f", 2)
    assert features.about["cut"] == sum(len(encode_answer(tokenizer, row).ids) > 45 for row in CONVERSATIONS) > 0


def test_a_template_that_adds_68_tokens_to_every_turn(tmp_path, tokenizer):
    padded = copy.deepcopy(tokenizer)
    padded.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ 'note ' * 66 }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{{ 'note ' * 66 }}\n{% endif %}"
    )
    six_turns = talk("a", "one two", "b", "three four", "c", "five six", id="six")
    model = small_llama(len(tokenizer), context=256)
    features = cache_features(model, padded, [six_turns], tmp_path / "f", 2)
    assert features.about["cut"] == 1 and 0 < len(features) < sum(encode_answer(padded, six_turns).own)


# --- the cache


def same(one, other) -> bool:
    names = "hidden labels conversation likely probabilities".split()
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def test_cached_features_equal_a_computation_one_by_one(tmp_path, tiny_model, tokenizer):
    features = cache_features(tiny_model, tokenizer, CONVERSATIONS, tmp_path / "f", num_heads=3)
    assert set(features.conversation.tolist()) == set(range(len(CONVERSATIONS)))
    for i, row in enumerate(CONVERSATIONS):
        encoded = encode_answer(tokenizer, row)
        positions, labels = head_labels(encoded.ids, encoded.own, 3)
        mine = features.conversation == i
        states = tiny_model.model(input_ids=torch.tensor([encoded.ids])).last_hidden_state[0, positions]
        torch.testing.assert_close(features.hidden[mine].float(), states, rtol=0.01, atol=0.01)
        assert features.labels[mine].tolist() == labels
        top = tiny_model.lm_head(states).softmax(-1).topk(LIKELY)
        assert (features.likely[mine] == top.indices).float().mean() > 0.95  # but for near-ties
        share = top.values / top.values.sum(1, True)
        torch.testing.assert_close(features.probabilities[mine].float(), share, rtol=0.02, atol=0)


def test_soft_labels_come_from_where_the_label_was_said(tmp_path, tiny_model, tokenizer):
    features = cache_features(tiny_model, tokenizer, CONVERSATIONS, tmp_path / "f", num_heads=3)
    everything = features.__getitems__(list(range(len(features))))
    counted = 0
    for p, labels in enumerate(features.labels):
        for k, label in enumerate(labels[1:].tolist()):
            if label != IGNORED:
                assert features.labels[p + k + 1, 0] == label  # there the base model was to say it
                assert torch.equal(everything["likely"][p, k], features.likely[p + k + 1].long())
                assert torch.equal(everything["probabilities"][p, k], features.probabilities[p + k + 1])
                counted += 1
    assert counted > len(features)


def test_batches_and_chosen_rows_are_those_positions(tmp_path, tiny_model, tokenizer):
    features = cache_features(tiny_model, tokenizer, CONVERSATIONS, tmp_path / "f", num_heads=3)
    batch = features.__getitems__([2, 0])
    part = features.chosen(torch.tensor([5, 2, 0]))
    assert len(part) == part.about["positions"] == 3 and len(features) > 3
    for name in ("hidden", "labels", "likely", "probabilities"):
        assert torch.equal(batch[name], torch.stack([features[2][name], features[0][name]]))
        assert torch.equal(part.__getitems__([1, 2])[name], batch[name])


def test_a_hidden_size_and_count_that_are_odd(tmp_path, tokenizer):
    model = small_llama(len(tokenizer), context=256, hidden_size=30, num_attention_heads=3, num_key_value_heads=3)
    one, three = (cache_features(model, tokenizer, CONVERSATIONS, tmp_path / str(k), num_heads=k) for k in (1, 3))
    assert torch.equal(one.hidden, three.hidden) and torch.equal(one.labels, three.labels[:, :2])


def forbid_computing(monkeypatch):
    def no(*_):
        raise AssertionError("hidden states were computed again")

    monkeypatch.setattr(module, "hidden_states", no)


def test_second_call_only_opens(tmp_path, tiny_model, tokenizer, monkeypatch):
    first = cache_features(tiny_model, tokenizer, CONVERSATIONS, tmp_path / "f")
    before = (tmp_path / "f" / DATA).read_bytes()
    forbid_computing(monkeypatch)
    assert same(cache_features(tiny_model, tokenizer, CONVERSATIONS, tmp_path / "f"), first)
    assert (tmp_path / "f" / DATA).read_bytes() == before


def test_of_several_processes_one_computes_and_the_others_open(tmp_path, tiny_model, tokenizer, monkeypatch):
    compute, calls, found = module.hidden_states, [], []

    def counting(model, rows):
        calls.append(len(rows))
        return compute(model, rows)

    monkeypatch.setattr(module, "hidden_states", counting)

    def work():
        found.append(cache_features(tiny_model, tokenizer, CONVERSATIONS, tmp_path / "f"))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(calls) == 1 and same(found[0], found[1]) and same(found[0], found[2])


@pytest.mark.parametrize("change", ["conversations", "heads", "length", "template", "finish", "model"])
def test_other_inputs_are_computed_anew(tmp_path, tiny_model, tokenizer, change):
    inputs = dict(model=tiny_model, tokenizer=tokenizer, conversations=CONVERSATIONS, num_heads=2)
    cache_features(folder=tmp_path / "a", **inputs)
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("You are a helpful AI assistant", "You are terse")
    inputs |= dict(
        conversations=dict(conversations=CONVERSATIONS[1:]),
        heads=dict(num_heads=3),
        length=dict(max_length=40),
        template=dict(tokenizer=other),
        finish=dict(conversations=[row | dict(finish_reason="length") for row in CONVERSATIONS]),
        model=dict(model=small_llama(len(tokenizer), seed=1)),
    )[change]
    again = cache_features(folder=tmp_path / "a", **inputs)
    assert same(again, cache_features(folder=tmp_path / "b", **inputs))


def interrupt_at(monkeypatch, call: int) -> list[int]:
    """Let the ``call``-th batch fail; returns a list that grows with every batch."""
    calls, compute = [], module.hidden_states

    def failing(model, rows):
        calls.append(len(rows))
        if len(calls) == call:
            raise KeyboardInterrupt
        return compute(model, rows)

    monkeypatch.setattr(module, "hidden_states", failing)
    return calls


@pytest.mark.parametrize("torn", [0, 5])
def test_an_interrupted_run_goes_on(tmp_path, tiny_model, tokenizer, monkeypatch, torn):
    monkeypatch.setattr(module, "BATCH_TOKENS", 1)  # one conversation a batch
    whole = cache_features(tiny_model, tokenizer, CONVERSATIONS, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 3)
        cache_features(tiny_model, tokenizer, CONVERSATIONS, tmp_path / "parts")
    with (tmp_path / "parts" / DATA).open("ab") as handle:
        handle.write(b"x" * torn)  # a record that a kill cut off
    calls = interrupt_at(monkeypatch, 0)
    parts = cache_features(tiny_model, tokenizer, CONVERSATIONS, tmp_path / "parts")
    assert len(calls) == len(CONVERSATIONS) - 2  # two batches were not computed again
    assert same(parts, whole)
    for name in (DATA, ABOUT):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_interrupted_run_over_older_features(tmp_path, tiny_model, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "BATCH_TOKENS", 1)
    whole = cache_features(tiny_model, tokenizer, CONVERSATIONS, tmp_path / "whole")
    cache_features(tiny_model, tokenizer, CONVERSATIONS, tmp_path / "used")
    other = [talk("z", "another text of some length") for _ in CONVERSATIONS]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 3)
        cache_features(tiny_model, tokenizer, other, tmp_path / "used")
    assert same(cache_features(tiny_model, tokenizer, CONVERSATIONS, tmp_path / "used"), whole)


def own_ids(tokenizer, row: dict) -> list[int]:
    encoded = encode_answer(tokenizer, row)
    return [token for token, mine in zip(encoded.ids, encoded.own, strict=True) if mine]


def test_kept_states_are_used_and_those_that_are_missing_are_computed(tmp_path, tiny_model, tokenizer, monkeypatch):
    whole = cache_features(tiny_model, tokenizer, CONVERSATIONS, tmp_path / "whole", 2)
    kept = KeptStates(tmp_path / "kept", tiny_model)
    for i in (0, 3, 4):
        kept.add(str(i), own_ids(tokenizer, CONVERSATIONS[i]), list(whole.hidden[whole.conversation == i]))
    calls = interrupt_at(monkeypatch, 0)
    features = cache_features(tiny_model, tokenizer, CONVERSATIONS, tmp_path / "f", 2, states=tmp_path / "kept")
    assert calls == [2]
    assert torch.equal(features.labels, whole.labels)
    torch.testing.assert_close(features.hidden.float(), whole.hidden.float(), rtol=0.02, atol=0.02)


# --- refusals


def test_a_folder_of_something_else_is_left_alone(tmp_path, tiny_model, tokenizer):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="something else than features"):
        cache_features(tiny_model, tokenizer, CONVERSATIONS, tmp_path / "train")
    assert (tmp_path / "train" / "thesis.txt").read_text() == "years of work"


def test_no_conversation(tmp_path, tiny_model, tokenizer):
    with pytest.raises(InputError, match="data set is empty"):
        cache_features(tiny_model, tokenizer, [], tmp_path / "f")


def test_no_assistant_turn(tmp_path, tiny_model, tokenizer):
    with pytest.raises(InputError, match="are there assistant turns"):
        cache_features(tiny_model, tokenizer, [talk("only a question")], tmp_path / "f")


def test_no_disk_space(tmp_path, tiny_model, tokenizer, monkeypatch):
    monkeypatch.setattr("medusa_nb.storage.free_disk", lambda _: 10)
    with pytest.raises(InputError, match="free some space"):
        cache_features(tiny_model, tokenizer, CONVERSATIONS, tmp_path / "f")
    assert not (tmp_path / "f" / DATA).exists()


# --- A1: what is not finite is refused by name


def overflowing(tokenizer, dtype):
    model = small_llama(len(tokenizer))
    model.model.norm.weight.data.fill_(9e4)
    return model.to(dtype)


def test_states_that_overflow_in_float16_are_refused_by_name(tmp_path, tokenizer):
    with pytest.raises(InputError, match="not finite in float16; use bfloat16 or float32"):
        cache_features(overflowing(tokenizer, torch.float16), tokenizer, CONVERSATIONS, tmp_path / "f")
    assert not (tmp_path / "f" / ABOUT).exists()
    features = cache_features(overflowing(tokenizer, torch.bfloat16), tokenizer, CONVERSATIONS, tmp_path / "f")
    assert torch.isfinite(features.hidden).all() and torch.isfinite(features.probabilities).all()


def test_states_that_were_kept_and_are_not_finite_are_refused(tmp_path, tiny_model, tokenizer):
    kept = KeptStates(tmp_path / "kept", tiny_model)
    own = own_ids(tokenizer, CONVERSATIONS[0])
    kept.add("0", own, [torch.full((32,), np.inf)] * len(own))
    with pytest.raises(InputError, match="not finite"):
        cache_features(tiny_model, tokenizer, CONVERSATIONS[:1], tmp_path / "f", states=tmp_path / "kept")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_likeliest_tokens_at_one_bad_state_of_many_are_refused(tiny_model, bad):
    hidden = torch.randn(600, 32)
    likeliest(tiny_model, hidden)
    hidden[555, 3] = bad
    with pytest.raises(InputError, match="not finite in float32"):
        likeliest(tiny_model, hidden)


def test_states_that_fit_whose_logits_do_not_are_refused(tokenizer):
    model = small_llama(len(tokenizer)).half()
    states = torch.full((3, 32), 6e4, dtype=torch.float16)
    assert torch.isfinite(states).all()
    with pytest.raises(InputError, match="not finite in float16"):
        likeliest(model, states)
