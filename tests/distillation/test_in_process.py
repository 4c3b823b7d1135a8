"""The model answers in this process: its own greedy words, batched or not, once each, or a reason."""

import copy
import io
import json

import pytest
import torch
from datasets import Dataset
from tiny_models import small_llama

from medusa_nb import cli
from medusa_nb.cli import main
from medusa_nb.decoding import Decoder
from medusa_nb.distillation import in_process
from medusa_nb.distillation.in_process import DistillationSettings, distil
from medusa_nb.distillation.records import AnswerFile, load_answers
from medusa_nb.errors import InputError
from medusa_nb.storage import read_lines
from medusa_nb.training.features import encode_answer

pytest_plugins = ["distillation_fixtures"]

SETTINGS = DistillationSettings(max_new_tokens=12, batch_size=3)
LAYOUT = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def row(*turns, name="p") -> dict:
    roles = dict(s="system", u="user", a="assistant")
    messages = [dict(role=roles[turn[0]], content=turn[2:]) for turn in turns]
    return dict(id=name, split="train", messages=messages)


def with_template(tokenizer, template: str):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def answered_alone(model, tokenizer, messages: list[dict], limit: int = 12) -> list[int]:
    """What transformers' own greedy decoding answers, with the end token."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    new = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False, pad_token_id=0
    )
    return new[0, ids.shape[1] :].tolist()


def test_answers_are_those_of_generate_batched_or_not(tmp_path, ending_model, tokenizer, few_prompts):
    ends = set(ending_model.generation_config.eos_token_id)
    found = []
    for batch_size in (3, 1, 64):
        settings, file = (
            DistillationSettings(max_new_tokens=12, batch_size=batch_size),
            tmp_path / f"{batch_size}.jsonl",
        )
        report = distil(ending_model, tokenizer, few_prompts, file, settings)
        rows = read_lines(file)
        assert report["answered"] == len(rows) == len({row["id"] for row in rows}) >= 8
        assert report["answered"] + sum(report["dropped"].values()) == len(few_prompts)
        assert report["tokens"] == sum(row["completion_tokens"] for row in rows)
        found.append({row["id"]: row for row in rows})
    assert found[0] == found[1] == found[2]
    lengths = set()
    for row in rows:
        total = 0
        for i in range(1, len(row["messages"]), 2):
            answer = answered_alone(ending_model, tokenizer, row["messages"][:i])
            words = answer[:-1] if answer[-1] in ends else answer
            assert row["messages"][i]["content"] == tokenizer.decode(words)
            total += len(answer)
        assert row["finish_reason"] == ("length" if answer == words else "stop")
        assert row["completion_tokens"] == total
        lengths.add(total)
    assert len(lengths) > 3  # they left the batch at different times


def test_later_turns_follow_its_own_earlier_answers(tmp_path, tiny_model, tokenizer):
    chats = [row("s:Brief.", f"u:def {i}", "a:not mine", "u:def two", "s:behind", name=str(i)) for i in range(3)]
    distil(tiny_model, tokenizer, Dataset.from_list(chats), tmp_path / "a.jsonl", SETTINGS)
    for found in load_answers(tmp_path / "a.jsonl"):
        messages = found["messages"]
        assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
        assert "not mine" not in [m["content"] for m in messages]
        for i in (2, 4):
            assert messages[i]["content"] == tokenizer.decode(answered_alone(tiny_model, tokenizer, messages[:i]))


def test_a_finished_run_asks_nothing(tmp_path, ending_model, tokenizer, few_prompts, monkeypatch):
    file = tmp_path / "a.jsonl"
    first = distil(ending_model, tokenizer, few_prompts, file, SETTINGS)
    before = file.read_bytes()
    monkeypatch.setattr(in_process, "answer_all", None)
    second = distil(ending_model, tokenizer, few_prompts, file, SETTINGS)
    assert file.read_bytes() == before
    assert (second["answered"], second["resumed"]) == (0, first["answered"])
    assert second["dropped"] == first["dropped"]


@pytest.mark.parametrize("change", [dict(max_new_tokens=13), dict(temperature=0.5), dict(seed=1)])
def test_other_settings_are_refused_but_not_another_batch_size(tmp_path, tiny_model, tokenizer, few_prompts, change):
    file = tmp_path / "a.jsonl"
    distil(tiny_model, tokenizer, few_prompts.select([0]), file, SETTINGS)
    with pytest.raises(InputError, match="other settings.*" + next(iter(change))):
        distil(tiny_model, tokenizer, few_prompts, file, DistillationSettings(**(dict(max_new_tokens=12) | change)))
    report = distil(tiny_model, tokenizer, few_prompts.select([0, 1]), file, DistillationSettings(12, batch_size=9))
    assert (report["resumed"], report["answered"]) == (1, 1)


def test_sampled_answers_depend_on_the_seed_not_on_the_batch(tmp_path, tiny_model, tokenizer, few_prompts):
    answers = []
    for run, seed in enumerate((0, 0, 1)):
        torch.manual_seed(run)
        settings = DistillationSettings(max_new_tokens=6, temperature=1.0, batch_size=4 + run, seed=seed)
        distil(tiny_model, tokenizer, few_prompts, tmp_path / f"{run}.jsonl", settings)
        answers.append({row["id"]: row["messages"] for row in read_lines(tmp_path / f"{run}.jsonl")})
    first, again, other = answers
    # the last bit of a sum depends on the batch, and with it now and then a token of so flat a distribution
    assert sum(first[name] == again.get(name) for name in first) >= len(first) - 2
    assert not any(first[name] == other.get(name) for name in first)


def test_empty_answers_are_dropped_and_counted(tmp_path, ending_model, tokenizer, few_prompts):
    silent = copy.deepcopy(ending_model)
    silent.generation_config.eos_token_id = list(range(silent.config.vocab_size))
    report = distil(silent, tokenizer, few_prompts, tmp_path / "a.jsonl", SETTINGS)
    assert report["dropped"] == {"empty answer": len(few_prompts)}
    assert (report["answered"], read_lines(tmp_path / "a.jsonl")) == (0, [])
    assert {row["id"] for row in read_lines(tmp_path / "a.jsonl.dropped")} == set(few_prompts["id"])


def test_answers_with_special_tokens_inside_are_dropped_with_the_reason(
    tmp_path, tiny_model, tokenizer, monkeypatch
):  # case 10
    def answer_all(model, waiting, *arguments):
        for request in list(waiting):
            request.tokens = tokenizer("<|im_start|>analysis").input_ids
            yield request

    monkeypatch.setattr(in_process, "answer_all", answer_all)
    report = distil(tiny_model, tokenizer, Dataset.from_list([row("u:Hi")]), tmp_path / "a.jsonl", SETTINGS)
    [reason] = report["dropped"]
    assert "special tokens" in reason and report["answered"] == 0


def test_prompts_too_long_for_the_context_are_counted(tmp_path, tokenizer):
    model = small_llama(len(tokenizer), context=256)
    rows = Dataset.from_list([row("u:" + "x = 1\n" * 300, name="long"), row("u:Hi", name="short")])
    report = distil(model, tokenizer, rows, tmp_path / "a.jsonl", SETTINGS)
    assert report["dropped"] == {"prompt too long for the context": 1}
    assert [row["id"] for row in read_lines(tmp_path / "a.jsonl")] == ["short"]


REFUSES_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    + LAYOUT + "{% endfor %}" + ASK
)  # fmt: skip


def test_a_template_that_refuses_system_turns(tmp_path, tiny_model, tokenizer):  # case 12
    refusing = with_template(tokenizer, REFUSES_SYSTEM)
    rows = [row("s:Be brief.", "u:Why?", name="a"), row("u:Hi", "s:And now?", "u:Well?", name="b"), row("u:Hi")]
    report = distil(tiny_model, refusing, Dataset.from_list(rows), tmp_path / "a.jsonl", SETTINGS)
    found = {row["id"]: row["messages"] for row in load_answers(tmp_path / "a.jsonl")}
    assert found["a"][0] == dict(role="user", content="Be brief.\n\nWhy?") and len(found["a"]) == 2
    assert set(found) == {"a", "p"}
    [(reason, count)] = report["dropped"].items()
    assert "no system" in reason and count == 1


EARLIER_TURNS_CHANGE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}" + ASK
)
OPEN_THOUGHT = "{% for m in messages %}" + LAYOUT + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"  # fmt: skip  # noqa: E501


def test_a_template_that_drops_the_think_block_of_earlier_turns(tmp_path, tiny_model, tokenizer):  # case 8
    changing = with_template(tokenizer, EARLIER_TURNS_CHANGE)
    distil(tiny_model, changing, Dataset.from_list([row("u:Hi", "u:And?")]), tmp_path / "a.jsonl", SETTINGS)
    [found] = load_answers(tmp_path / "a.jsonl")
    assert any(encode_answer(changing, found).own)  # training takes it


@pytest.mark.parametrize("turns", [["u:Hi"], ["u:Hi", "u:And?"]])
def test_what_training_would_refuse_is_said_before_anything_is_answered(
    tmp_path, tiny_model, tokenizer, turns, monkeypatch
):  # cases 8 and 9
    refusing, file = with_template(tokenizer, OPEN_THOUGHT), tmp_path / "a.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr(in_process, "answer_all", None)
        with pytest.raises(InputError, match="heads could not be trained on answers to these prompts: .*think block"):
            distil(tiny_model, refusing, Dataset.from_list([row(*turns)]), file, SETTINGS)
    assert not file.exists() or not file.read_bytes()
    more = DistillationSettings(max_new_tokens=8)
    assert distil(tiny_model, tokenizer, Dataset.from_list([row(*turns)]), file, more)["answered"] == 1


def test_a_template_that_adds_many_tokens_to_every_turn(tmp_path, tiny_model, tokenizer):  # case 19
    words = "be kind " * 34
    ask = "{% if add_generation_prompt %}" + words + "<|im_start|>assistant\n{% endif %}"
    wordy = with_template(tokenizer, "{% for m in messages %}" + words + LAYOUT + "{% endfor %}" + ask)
    rows = Dataset.from_list([row(*["u:Hi"] * 6), row("u:Hi", name="q")])
    report = distil(tiny_model, wordy, rows, tmp_path / "a.jsonl", SETTINGS)
    assert (report["answered"], report["dropped"]) == (2, {})


def test_no_chat_template_no_prompts(tmp_path, tiny_model, tokenizer, few_prompts):
    with pytest.raises(InputError, match="no chat template"):
        distil(tiny_model, with_template(tokenizer, ""), few_prompts, tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="no prompt to answer"):
        distil(tiny_model, tokenizer, few_prompts.select([]), tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "wrong", [dict(batch_size=0), dict(max_new_tokens=0), dict(temperature=-1), dict(temperature=float("nan"))]
)
def test_settings_out_of_range(wrong):  # case 21
    with pytest.raises(InputError, match=next(iter(wrong))):
        DistillationSettings(**wrong)


@pytest.mark.parametrize(
    "wrong", [("--batch-size", "0"), ("--limit", "-1"), ("--concurrency", "0"), ("--batch-size", "many")]
)
def test_options_out_of_range(tmp_path, wrong, capsys):  # case 21
    with pytest.raises(SystemExit) as ended:
        main(["distill", str(tmp_path / "a.jsonl"), *wrong])
    assert ended.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_the_command_says_that_its_output_is_a_folder(tmp_path, tiny_folder, capsys):  # case 21
    arguments = ["--model", str(tiny_folder), "--prompts", "everyday", "--limit", "2", "--max-new-tokens", "4"]
    assert main(["distill", str(tmp_path), *arguments]) == 2
    assert "is a folder; name a JSONL file" in capsys.readouterr().err
    assert main(["distill", str(tmp_path / "a.jsonl"), *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["answered"] == 2


@pytest.mark.parametrize("given", ["command line", "standard input"])
def test_half_a_surrogate_pair_in_a_prompt(tiny_folder, monkeypatch, capsys, given):  # case 16
    monkeypatch.setattr(cli, "_decoder", lambda options, model, length, size: Decoder(model, max_length=length))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a \xff \xed\xa0\xbd")))
    prompt = "a \udcff \ud83d" if given == "command line" else "-"
    assert main(["generate", "heads", prompt, "--model", str(tiny_folder), "--max-new-tokens", "3"]) == 0
    assert "3 tokens in 3 passes" in capsys.readouterr().err


def test_ctrl_c_keeps_what_is_answered(tmp_path, tiny_folder, monkeypatch, capsys):
    def add(self, record):
        if self.report["answered"] == 2:
            raise KeyboardInterrupt
        plain(self, record)

    plain = AnswerFile.add
    monkeypatch.setattr(AnswerFile, "add", add)
    arguments = ["--model", str(tiny_folder), "--prompts", "everyday", "--limit", "5", "--max-new-tokens", "4"]
    assert main(["distill", str(tmp_path / "a.jsonl"), *arguments]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    assert len(load_answers(tmp_path / "a.jsonl")) == 2
    monkeypatch.setattr(AnswerFile, "add", plain)
    assert main(["distill", str(tmp_path / "a.jsonl"), *arguments]) == 0
    assert len({row["id"] for row in load_answers(tmp_path / "a.jsonl")}) == 5
