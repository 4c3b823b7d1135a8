"""Hidden states kept while the model answers are those that a separate pass computes."""

import pytest
import torch
from datasets import Dataset
from tiny_models import small_llama

from medusa_nb.chat import prompt_ids
from medusa_nb.distillation.in_process import DistillationSettings, distil
from medusa_nb.distillation.records import load_answers
from medusa_nb.distillation.states import KeptStates
from medusa_nb.errors import InputError
from medusa_nb.training.features import cache_features

pytest_plugins = ["distillation_fixtures"]


def states_of_a_pass(model, prompt: list[int], said: list[int]) -> torch.Tensor:
    """The states that the tokens ``said`` after ``prompt`` are predicted from."""
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.tensor([prompt + said]), use_cache=False).last_hidden_state[0]
    return hidden[len(prompt) - 1 : -1]


def close(kept: torch.Tensor, computed: torch.Tensor) -> bool:
    return torch.allclose(kept.float(), computed.float(), rtol=0.01, atol=0.02 * computed.abs().max().item())


def test_kept_states_are_those_of_a_separate_pass(tmp_path, ending_model, tokenizer, few_prompts):
    settings = DistillationSettings(max_new_tokens=12, batch_size=3)
    distil(ending_model, tokenizer, few_prompts, tmp_path / "a.jsonl", settings, states=tmp_path / "states")
    kept, rows = KeptStates(tmp_path / "states", ending_model), load_answers(tmp_path / "a.jsonl")
    one_turn = [row for row in rows if len(row["messages"]) == 2]
    assert kept.index.keys() == {row["id"] for row in one_turn} and len(one_turn) >= 6
    assert {row["finish_reason"] for row in one_turn} == {"stop", "length"}
    for row in one_turn:
        said = kept.index[row["id"]]["ids"]
        assert len(said) == row["completion_tokens"]
        states = kept.get(row["id"], said)
        assert states is not None
        assert close(states, states_of_a_pass(ending_model, prompt_ids(tokenizer, row["messages"][:1]), said))
    assert kept.get(row["id"], said[:-1]) is None and kept.get("unknown", said) is None


def test_features_are_the_same_with_kept_states_and_without(tmp_path, tiny_model, tokenizer, few_prompts):
    settings = DistillationSettings(max_new_tokens=8)
    distil(tiny_model, tokenizer, few_prompts, tmp_path / "a.jsonl", settings, states=tmp_path / "states")
    rows = load_answers(tmp_path / "a.jsonl")
    how = dict(num_heads=2, max_length=512)
    computed = cache_features(tiny_model, tokenizer, rows, tmp_path / "computed", **how)
    reused = cache_features(tiny_model, tokenizer, rows, tmp_path / "reused", states=tmp_path / "states", **how)
    assert computed.hidden.shape == reused.hidden.shape and close(reused.hidden, computed.hidden)
    assert torch.equal(computed.labels, reused.labels)


def test_what_a_killed_process_left_half_written_is_cut_off(tmp_path, small_model):
    states = list(torch.randn(3, 32))
    KeptStates(tmp_path, small_model).add("a", [7, 8, 9], states)
    with (tmp_path / "states.bf16").open("ab") as handle:
        handle.write(b"half of something")
    with (tmp_path / "states.jsonl").open("a") as handle:
        handle.write('{"id": "b", "ids": [')
    kept = KeptStates(tmp_path, small_model)
    kept.add("c", [5], states[:1])
    again = KeptStates(tmp_path, small_model)
    assert again.index.keys() == {"a", "c"}
    assert close(again.get("a", [7, 8, 9]), torch.stack(states)) and close(again.get("c", [5]), states[0][None])


def test_another_models_states_are_refused_and_left_alone(tmp_path, small_model):
    KeptStates(tmp_path, small_model).add("a", [7], list(torch.randn(1, 32)))
    before = (tmp_path / "states.bf16").read_bytes()
    for other in (small_llama(seed=1), small_llama(hidden_size=16)):
        with pytest.raises(InputError, match="made with other settings .*choose another place"):
            KeptStates(tmp_path, other)
    assert (tmp_path / "states.bf16").read_bytes() == before


def test_conversations_of_several_turns_keep_none(tmp_path, tiny_model, tokenizer):
    turns = [dict(role="user", content="Hi")] * 2
    chats = Dataset.from_list([dict(id="a", split="train", messages=turns)])
    distil(tiny_model, tokenizer, chats, tmp_path / "a.jsonl", DistillationSettings(4), states=tmp_path / "states")
    assert not KeptStates(tmp_path / "states", tiny_model).index
