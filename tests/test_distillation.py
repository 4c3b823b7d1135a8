"""Self-distillation: the model's own words, kept through kills and resumptions."""

import copy
import json
import signal
import subprocess
import sys

import pytest
import torch
from conftest import small_llama
from datasets import Dataset

from medusa_nb import distillation
from medusa_nb.distillation import (
    DistillationSettings,
    distil,
    generate_batch,
    is_loop,
    load_answers,
    read_lines,
)
from medusa_nb.errors import InputError

ENDS = list(range(4, 8192, 12))  # a random model rarely says one given token, but often one of these
SETTINGS = DistillationSettings(max_new_tokens=24, batch_size=2)
WORDS = "def return class value for in index self name list yield import raise lambda".split()


@pytest.fixture(scope="module")
def model(tokenizer):
    """A tiny model whose answers end at different lengths."""
    model = small_llama(len(tokenizer), context=256)
    model.generation_config.eos_token_id = ENDS
    return model


def user(*texts: str, name: str = "p", split: str = "train") -> dict:
    return dict(id=name, split=split, messages=[dict(role="user", content=text) for text in texts])


@pytest.fixture
def prompts():
    return Dataset.from_list([user(" ".join(WORDS[: i + 1]), name=f"p{i}") for i in range(len(WORDS))])


def answer_alone(model, tokenizer, messages: list[dict], limit: int = 24) -> list[int]:
    """What transformers' own greedy decoding answers, without the end token."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    arguments = dict(max_new_tokens=limit, do_sample=False, eos_token_id=ENDS, pad_token_id=0)
    new = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)[0, ids.shape[1] :].tolist()
    return new[:-1] if new[-1] in ENDS else new


def test_batched_answers_equal_generate_one_by_one(model):
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 8192, (n,), generator=generator).tolist() for n in (1, 30, 4, 4, 17, 60, 2, 9)]
    answers = generate_batch(model, prompts, 40, ENDS)
    lengths = set()
    for prompt, (tokens, finished) in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        arguments = dict(max_new_tokens=40, do_sample=False, eos_token_id=ENDS, pad_token_id=0)
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)[0, len(prompt) :].tolist()
        assert finished == (theirs[-1] in ENDS)
        assert tokens == (theirs[:-1] if finished else theirs)
        lengths.add(len(tokens))
    assert len(lengths) > 2  # rows left the batch at different times
    assert generate_batch(model, prompts, 40, ENDS, slots=3) == answers


def test_records(tmp_path, model, tokenizer, prompts):
    report = distil(model, tokenizer, prompts, tmp_path / "answers.jsonl", SETTINGS)
    rows = read_lines(tmp_path / "answers.jsonl")
    assert report["answered"] == len(rows)
    assert report["answered"] + sum(report["dropped"].values()) == len(prompts)
    assert report["tokens"] == sum(row["completion_tokens"] for row in rows)
    for row in rows:
        answer = answer_alone(model, tokenizer, row["messages"][:1])
        assert row["messages"][1] == dict(role="assistant", content=tokenizer.decode(answer, skip_special_tokens=True))
        assert row["finish_reason"] == ("length" if len(answer) == 24 else "stop")
        assert row["completion_tokens"] == len(answer) + (row["finish_reason"] == "stop")
        assert row["split"] == "train"


def test_several_turns_are_answered_with_its_own_earlier_answers(tmp_path, model, tokenizer):
    given = [dict(role="assistant", content="not my words"), dict(role="user", content="def two():")]
    system = dict(role="system", content="Write Python.")
    rows = [user(f"def {word}():", name=word) for word in WORDS[:4]]
    rows = [row | dict(messages=[system, *row["messages"], *given]) for row in rows]
    distil(model, tokenizer, Dataset.from_list(rows), tmp_path / "a.jsonl", SETTINGS)
    answered = read_lines(tmp_path / "a.jsonl")
    assert len(answered) >= 2  # the others ended in an empty answer
    for messages in (row["messages"] for row in answered):
        assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
        assert "not my words" not in [m["content"] for m in messages]
        for i in (2, 4):
            answer = answer_alone(model, tokenizer, messages[:i])
            assert messages[i]["content"] == tokenizer.decode(answer, skip_special_tokens=True)


KILLED = """
import json, os, signal, sys
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from medusa_nb import distillation

folder, out, ends = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
written = 0

def write_and_die(handle, record):
    global written
    written += 1
    line = json.dumps(record) + "\\n"
    handle.write(line if written < 6 else line[: len(line) // 2])
    if written == 6:
        handle.flush()
        os.kill(os.getpid(), signal.SIGKILL)

distillation.write_record = write_and_die
model = AutoModelForCausalLM.from_pretrained(folder).eval()
model.generation_config.eos_token_id = ends
prompts = Dataset.from_list(json.loads(sys.argv[4]))
settings = distillation.DistillationSettings(max_new_tokens=24, batch_size=2)
distillation.distil(model, AutoTokenizer.from_pretrained(folder), prompts, out, settings)
"""


def test_killed_run_goes_on_without_loss_or_repetition(tmp_path, model, tokenizer, prompts, monkeypatch):
    folder, file = tmp_path / "tiny", tmp_path / "parts.jsonl"
    plain = small_llama(len(tokenizer), context=256)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    arguments = [str(folder), str(file), json.dumps(ENDS), json.dumps(list(prompts))]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not file.read_bytes().endswith(b"\n")
    kept = file.read_text().count("\n")
    assert kept >= 4

    asked, compute = [], distillation.answer_all

    def recording(model, waiting, *arguments):
        asked.extend(request.about.id for request in waiting)
        return compute(model, waiting, *arguments)

    monkeypatch.setattr(distillation, "answer_all", recording)
    plain.config._name_or_path = str(folder)
    plain.generation_config.eos_token_id = ENDS
    report = distil(plain, tokenizer, prompts, file, SETTINGS)
    assert report["resumed"] == kept
    rows = read_lines(file)
    assert len({row["id"] for row in rows}) == len(rows) == kept + report["answered"]
    assert not {row["id"] for row in rows[:kept]} & set(asked)
    distil(plain, tokenizer, prompts, tmp_path / "whole.jsonl", SETTINGS)
    whole = {row["id"]: row for row in read_lines(tmp_path / "whole.jsonl")}
    assert {row["id"]: row for row in rows} == whole


def test_finished_run_asks_nothing(tmp_path, model, tokenizer, prompts, monkeypatch):
    file = tmp_path / "a.jsonl"
    first = distil(model, tokenizer, prompts, file, SETTINGS)
    before = file.read_bytes()
    monkeypatch.setattr(distillation, "answer_all", None)
    second = distil(model, tokenizer, prompts, file, SETTINGS)
    assert file.read_bytes() == before
    assert (second["answered"], second["resumed"]) == (0, first["answered"])
    assert second["dropped"] == first["dropped"]


def test_torn_last_line_is_repaired_on_request(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"id": 1}\n{"id": 2}\n{"id": ')
    with pytest.raises(InputError, match="line 3"):
        read_lines(file)
    assert read_lines(file, repair=True) == [dict(id=1), dict(id=2)]
    assert file.read_text() == '{"id": 1}\n{"id": 2}\n'
    file.write_text('{"id": ')
    assert read_lines(file, repair=True) == []
    assert read_lines(tmp_path / "none.jsonl") == []


def test_malformed_line_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1}\noops\n{"id": 2}\n')
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: not valid JSON"):
        read_lines(tmp_path / "a.jsonl", repair=True)


@pytest.mark.parametrize("change", [dict(max_new_tokens=25), dict(temperature=0.5), dict(seed=1)])
def test_other_settings_are_refused(tmp_path, model, tokenizer, prompts, change):
    distil(model, tokenizer, prompts.select([0]), tmp_path / "a.jsonl", SETTINGS)
    other = DistillationSettings(**(dict(max_new_tokens=24, batch_size=2) | change))
    with pytest.raises(InputError, match="other settings.*" + next(iter(change))):
        distil(model, tokenizer, prompts, tmp_path / "a.jsonl", other)


def test_another_batch_size_may_go_on(tmp_path, model, tokenizer, prompts):
    distil(model, tokenizer, prompts.select([0, 1, 2]), tmp_path / "a.jsonl", SETTINGS)
    report = distil(model, tokenizer, prompts, tmp_path / "a.jsonl", DistillationSettings(24, batch_size=9))
    assert report["resumed"] + report["answered"] + sum(report["dropped"].values()) == len(prompts)


def test_empty_answers_are_dropped_and_counted(tmp_path, model, tokenizer, prompts):
    silent = copy.deepcopy(model)
    silent.generation_config.eos_token_id = list(range(8192))
    report = distil(silent, tokenizer, prompts, tmp_path / "a.jsonl", SETTINGS)
    assert report["dropped"] == {"empty answer": len(prompts)}
    assert (report["answered"], read_lines(tmp_path / "a.jsonl")) == (0, [])
    assert {row["id"] for row in read_lines(tmp_path / "a.jsonl.dropped")} == set(prompts["id"])


def test_prompts_too_long_for_the_context_are_counted(tmp_path, model, tokenizer):
    rows = Dataset.from_list([user("x = 1\n" * 300, name="long"), user(WORDS[0], name="short")])
    report = distil(model, tokenizer, rows, tmp_path / "a.jsonl", SETTINGS)
    assert report["dropped"] == {"prompt too long for the context": 1}
    assert [row["id"] for row in read_lines(tmp_path / "a.jsonl")] == ["short"]


def test_sampled_answers_depend_on_the_seed_only_not_on_the_batch(tmp_path, model, tokenizer, prompts):
    answers = []
    for run, seed in enumerate((0, 0, 1)):
        torch.manual_seed(run)
        settings = DistillationSettings(max_new_tokens=24, temperature=1.0, batch_size=4 + run, seed=seed)
        distil(model, tokenizer, prompts, tmp_path / f"{run}.jsonl", settings)
        answers.append({row["id"]: row["messages"][1]["content"] for row in read_lines(tmp_path / f"{run}.jsonl")})
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


@pytest.mark.parametrize(
    "tokens",
    [[1] * 40, list(range(20)) + [1, 2, 3] * 13, list(range(50, 70)) * 3, [7] * 40 + list(range(20)), [1, 2] * 17],
)
def test_loops(tokens):
    assert is_loop(tokens)


@pytest.mark.parametrize(
    "tokens", [[], [1], [1] * 20, list(range(200)), list(range(40)) * 2, [1, 2, 3] * 5 + list(range(100, 150))]
)
def test_no_loops(tokens):
    assert not is_loop(tokens)


def test_no_prompts(tmp_path, model, tokenizer, prompts):
    with pytest.raises(InputError, match="no prompt to answer"):
        distil(model, tokenizer, prompts.select([]), tmp_path / "a.jsonl")


def test_no_chat_template(tmp_path, model, tokenizer, prompts):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        distil(model, bare, prompts, tmp_path / "a.jsonl")


def test_load_answers(tmp_path):
    kinds = [(1, "train", False), (2, "train", True), (3, "test", False)]
    rows = [dict(id=number, split=split, loop=loop) for number, split, loop in kinds]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["id"] for row in load_answers(tmp_path / "a.jsonl")] == [1, 2, 3]
    assert [row["id"] for row in load_answers(tmp_path / "a.jsonl", "train", loops=False)] == [1]
    with pytest.raises(InputError, match="no answered conversation of the split 'calibration'"):
        load_answers(tmp_path / "a.jsonl", "calibration")
    with pytest.raises(InputError, match="02_self_distillation"):
        load_answers(tmp_path / "none.jsonl")
