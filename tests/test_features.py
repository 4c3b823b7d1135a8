"""Which tokens are supervised with what, and hidden states that are computed once."""

import copy
from collections import namedtuple

import pytest
import torch

from medusa_nb import features as module
from medusa_nb.errors import InputError
from medusa_nb.features import IGNORED, cache_features, encode_conversation, head_labels

END = "<|end|>"


def talk(*contents: str) -> list[dict]:
    """User and assistant take turns."""
    return [dict(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(contents)]


CONVERSATIONS = [
    dict(id=str(i), messages=talk(*contents))
    for i, contents in enumerate(
        [
            ("def add(a, b):", "    return a + b"),
            ("def f():", "    pass", "again", "    return None"),
            ("x", "y"),
            ("def long(values):", "    total = 0\n    for value in values:\n        total += value\n    return total"),
            ("def g(text):", "    return text.strip().lower()"),
        ]
    )
]


def own_text(tokenizer, encoded) -> str:
    return tokenizer.decode([i for i, own in zip(encoded.ids, encoded.own, strict=True) if own])


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


def test_head_k_at_t_is_to_guess_the_token_at_t_plus_k_plus_2():
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


def test_own_words_of_several_turns_with_their_end_tokens(tokenizer):
    encoded = encode_conversation(tokenizer, talk("a", "first answer", "b", "second answer"))
    assert own_text(tokenizer, encoded) == f"first answer{END}second answer{END}"
    assert tokenizer.decode(encoded.ids) == tokenizer.apply_chat_template(
        talk("a", "first answer", "b", "second answer"), tokenize=False
    )


def test_labels_of_a_turn_stay_in_it(tokenizer):
    encoded = encode_conversation(tokenizer, talk("a", "one two three", "b", "four five six"))
    first_end = encoded.ids.index(tokenizer.eos_token_id, encoded.own.index(True))
    positions, labels = head_labels(encoded.ids, encoded.own, num_heads=5)
    for t, row in zip(positions, labels, strict=True):
        if t < first_end:
            known = [label for label in row if label != IGNORED]
            assert known == encoded.ids[t + 1 : t + 1 + len(known)]
            assert t + len(known) <= first_end


def test_answer_that_also_stands_in_the_users_turn(tokenizer):
    encoded = encode_conversation(tokenizer, talk("return x", "return x"))
    assert own_text(tokenizer, encoded) == f"return x{END}"
    first = encoded.own.index(True)
    assert encoded.own == [False] * first + [True] * (len(encoded.ids) - first)
    assert encoded.ids[:first].count(encoded.ids[first]) == 1  # the same word, in the user's turn


def test_the_end_token_is_the_last_label(tokenizer):
    encoded = encode_conversation(tokenizer, talk("def f():", "    return 1"))
    positions, labels = head_labels(encoded.ids, encoded.own, num_heads=2)
    assert labels[-1] == [tokenizer.eos_token_id, IGNORED, IGNORED]
    assert labels[-2][1] == tokenizer.eos_token_id
    assert positions[-1] == len(encoded.ids) - 2


def test_truncation(tokenizer):
    messages = CONVERSATIONS[3]["messages"]
    whole = encode_conversation(tokenizer, messages)
    cut = encode_conversation(tokenizer, messages, max_length=len(whole.ids) - 4)
    assert (cut.ids, cut.own) == (whole.ids[:-4], whole.own[:-4])
    positions, labels = head_labels(cut.ids, cut.own, num_heads=2)
    assert positions[-1] == len(cut.ids) - 2
    assert labels[-1] == [cut.ids[-1], IGNORED, IGNORED]


def test_no_chat_template(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        encode_conversation(bare, talk("a", "b"))


def test_chat_template_that_rewrites_earlier_turns(tokenizer):
    rewriting = copy.deepcopy(tokenizer)
    rewriting.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(InputError, match="rewrites earlier turns"):
        encode_conversation(rewriting, talk("a", "b", "c", "d"))


def same(one, other) -> bool:
    pairs = [(one.hidden, other.hidden), (one.labels, other.labels), (one.conversation, other.conversation)]
    return all(torch.equal(a, b) for a, b in pairs)


def test_cached_features_equal_a_computation_one_by_one(tmp_path, tiny_model, tokenizer):
    features = cache_features(tiny_model, tokenizer, CONVERSATIONS, tmp_path, num_heads=3, batch_tokens=60)
    assert set(features.conversation.tolist()) == set(range(len(CONVERSATIONS)))
    for i, conversation in enumerate(CONVERSATIONS):
        encoded = encode_conversation(tokenizer, conversation["messages"])
        positions, labels = head_labels(encoded.ids, encoded.own, 3)
        rows = features.conversation == i
        states = tiny_model.model(input_ids=torch.tensor([encoded.ids])).last_hidden_state[0, positions]
        assert torch.allclose(features.hidden[rows].float(), states, rtol=0.02, atol=0.02)
        assert features.labels[rows].tolist() == labels
        top = tiny_model.lm_head(states).softmax(-1).topk(module.LIKELY)
        assert (features.likely[rows] == top.indices).float().mean() > 0.95  # but for near-ties
        torch.testing.assert_close(
            features.probabilities[rows].float(), top.values / top.values.sum(1, True), rtol=0.02, atol=0
        )


def test_soft_labels_come_from_where_the_label_was_said(tmp_path, tiny_model, tokenizer):
    features = cache_features(tiny_model, tokenizer, CONVERSATIONS, tmp_path, num_heads=3)
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


def test_batches_of_rows(tmp_path, tiny_model, tokenizer):
    features = cache_features(tiny_model, tokenizer, CONVERSATIONS, tmp_path, num_heads=3)
    batch = features.__getitems__([2, 0])
    assert torch.equal(batch["hidden"], torch.stack([features[2]["hidden"], features[0]["hidden"]]))
    for name in ("labels", "likely", "probabilities"):
        assert torch.equal(batch[name], torch.stack([features[2][name], features[0][name]]))


def no_computing(*_):
    raise AssertionError("hidden states were computed again")


def test_second_call_only_opens(tmp_path, tiny_model, tokenizer, monkeypatch):
    first = cache_features(tiny_model, tokenizer, CONVERSATIONS, tmp_path)
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    monkeypatch.setattr(module, "_hidden_states", no_computing)
    assert same(cache_features(tiny_model, tokenizer, CONVERSATIONS, tmp_path), first)
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("change", ["conversations", "heads", "length", "template"])
def test_other_inputs_are_computed_anew(tmp_path, tiny_model, tokenizer, change):
    cache_features(tiny_model, tokenizer, CONVERSATIONS, tmp_path / "a", num_heads=2)
    inputs = dict(tokenizer=tokenizer, conversations=CONVERSATIONS, num_heads=2)
    other = copy.deepcopy(tokenizer)
    other.chat_template = "Answer. " + tokenizer.chat_template
    inputs |= dict(
        conversations=dict(conversations=CONVERSATIONS[1:]),
        heads=dict(num_heads=3),
        length=dict(max_length=12),
        template=dict(tokenizer=other),
    )[change]
    again = cache_features(tiny_model, folder=tmp_path / "a", **inputs)
    assert same(again, cache_features(tiny_model, folder=tmp_path / "b", **inputs))


def interrupt_at(monkeypatch, call: int) -> list[int]:
    """Let the ``call``-th batch fail; returns a list that grows with every batch."""
    calls, compute = [], module._hidden_states

    def failing(model, rows):
        calls.append(len(rows))
        if len(calls) == call:
            raise KeyboardInterrupt
        return compute(model, rows)

    monkeypatch.setattr(module, "_hidden_states", failing)
    return calls


def test_interrupted_run_goes_on(tmp_path, tiny_model, tokenizer, monkeypatch):
    arguments = dict(num_heads=3, batch_tokens=1)  # one conversation a batch
    whole = cache_features(tiny_model, tokenizer, CONVERSATIONS, tmp_path / "whole", **arguments)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 2)
        cache_features(tiny_model, tokenizer, CONVERSATIONS, tmp_path / "parts", **arguments)
    calls = interrupt_at(monkeypatch, 0)
    parts = cache_features(tiny_model, tokenizer, CONVERSATIONS, tmp_path / "parts", **arguments)
    assert len(calls) == len(CONVERSATIONS) - 1  # the first batch was not computed again
    assert same(parts, whole)


def test_interrupted_run_over_older_features(tmp_path, tiny_model, tokenizer, monkeypatch):
    arguments = dict(num_heads=3, batch_tokens=1)
    whole = cache_features(tiny_model, tokenizer, CONVERSATIONS, tmp_path / "whole", **arguments)
    cache_features(tiny_model, tokenizer, CONVERSATIONS, tmp_path / "used", **arguments)
    other = [dict(messages=talk("z", "another text of some length")) for _ in CONVERSATIONS]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 3)
        cache_features(tiny_model, tokenizer, other, tmp_path / "used", **arguments)
    assert same(cache_features(tiny_model, tokenizer, CONVERSATIONS, tmp_path / "used", **arguments), whole)


def test_no_conversation(tmp_path, tiny_model, tokenizer):
    with pytest.raises(InputError, match="data set is empty"):
        cache_features(tiny_model, tokenizer, [], tmp_path)


def test_no_assistant_turn(tmp_path, tiny_model, tokenizer):
    with pytest.raises(InputError, match="are there assistant turns"):
        cache_features(tiny_model, tokenizer, [dict(messages=talk("only a question"))], tmp_path)


def test_no_disk_space(tmp_path, tiny_model, tokenizer, monkeypatch):
    usage = namedtuple("usage", "total used free")(1000, 990, 10)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="free some space"):
        cache_features(tiny_model, tokenizer, CONVERSATIONS, tmp_path)
    assert not (tmp_path / "hidden.bf16").exists()
