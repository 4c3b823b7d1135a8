"""Training: heads learn, the base model does not change, killed work goes on, and nothing wrong is saved."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny_models import small_llama
from transformers import TrainerCallback

from medusa_nb.base_model import fingerprint
from medusa_nb.distillation.records import load_answers
from medusa_nb.errors import InputError
from medusa_nb.heads import MedusaHeads
from medusa_nb.heads_file import WEIGHTS, load_heads
from medusa_nb.path_heads import PathHeads
from medusa_nb.training import features as features_module
from medusa_nb.training.__main__ import main
from medusa_nb.training.calibration import FILE, Calibration
from medusa_nb.training.features import IGNORED, cache_features, supervise
from medusa_nb.training.loss import HeadsWithLoss, accuracy, rank_table
from medusa_nb.training.train import (
    Conversations,
    OnlineHeads,
    SampledSoftmax,
    collate,
    fit,
    last_checkpoint,
    train_heads,
)

pytest_plugins = ["training_setting"]
KINDS = [dict(), dict(own_projection=True), dict(kind="path"), dict(states="online", per_device_train_batch_size=8)]


class Interrupt(TrainerCallback):
    """Fails at a step, as a killed process would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Explode(TrainerCallback):
    """Weights overflow at the third step."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            model.heads.bias.data.fill_(float("inf"))


class Watch(TrainerCallback):
    """The steps that were made and those that were saved."""

    def __init__(self):
        self.steps, self.saved = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)

    def on_save(self, args, state, control, **kwargs):
        self.saved.append(state.global_step)


def equal(one, other) -> bool:
    return all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())


def test_trainings_on_the_same_answers_share_their_features(options, tiny_model, tokenizer, tmp_path, monkeypatch):
    shared, computed = tmp_path / "shared", []
    hidden_states = features_module.hidden_states
    monkeypatch.setattr(features_module, "hidden_states", lambda *a: computed.append(1) or hidden_states(*a))
    alone = train_heads(options(output_dir=str(tmp_path / "alone")), tiny_model, tokenizer)["heads"]
    computed.clear()
    for kind in ("medusa", "path"):
        how = options(output_dir=str(tmp_path / kind), kind=kind, features=str(shared))
        heads = train_heads(how, tiny_model, tokenizer)["heads"]
        assert bool(computed) == (kind == "medusa") and not (tmp_path / kind / "features").exists()
        assert kind == "path" or equal(heads, alone)
        computed.clear()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_heads_learn_and_the_base_model_stays_as_it_is(kind, options, tiny_model, tokenizer, tmp_path):
    before = fingerprint(tiny_model)
    how = options(num_train_epochs=6, lr_scheduler_type="constant", soft_share=0.0, **kind)
    report = train_heads(how, tiny_model, tokenizer)
    log = [json.loads(line) for line in (tmp_path / "heads" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in log if "loss" in line]
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"] and {"head0_loss", "head1_top5"} <= steps[0].keys()
    assert fingerprint(tiny_model) == before and not any(p.requires_grad for p in tiny_model.parameters())
    again = load_heads(tmp_path / "heads", tiny_model)
    assert equal(again, report["heads"]) and again.config()["medusa_num_heads"] == 2
    judged = cache_features(tiny_model, tokenizer, load_answers(how.data_path, "calibration"), tmp_path / "judge", 2)
    ranks = rank_table(again, judged)
    assert report["accuracy"] == accuracy(ranks)
    assert Calibration.load(tmp_path / "heads").rank_counts[()] == len(judged)
    assert json.loads((tmp_path / "heads" / "report.json").read_text())["positions"] == report["positions"]
    assert not list((tmp_path / "heads").glob("checkpoints*"))


def test_the_first_loss_in_the_log_equals_one_computed_here(options, tiny_model, tokenizer, rows, tmp_path):
    how = options(loss_vocabulary=0, soft_share=0.0, per_device_train_batch_size=10**6)
    train_heads(how, tiny_model, tokenizer)
    features = cache_features(tiny_model, tokenizer, [r for r in rows if r["split"] == "train"], tmp_path / "f", 2)
    wanted = 0.0
    for k in range(2):  # untrained heads say what the base model says
        labels = features.labels[:, k + 1]
        logits = tiny_model.lm_head(features.hidden[labels != IGNORED].float())
        wanted += 0.8**k * torch.nn.functional.cross_entropy(logits, labels[labels != IGNORED]).item()
    first = json.loads((tmp_path / "heads" / "log.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(wanted, rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("soft_share", [0.0, 0.5])
def test_cached_and_online_give_the_same_loss(soft_share, tiny_model, tokenizer, rows, tmp_path):
    heads = MedusaHeads(tiny_model, 2)
    torch.nn.init.normal_(heads.weight, std=0.1)
    inner = HeadsWithLoss(heads, 0.8, soft_share, torch.float32)
    batch = collate(list(Conversations(*supervise(tiny_model, tokenizer, rows[:6], 2, 256))))
    online = OnlineHeads(tiny_model, inner)(**batch)["loss"].item()
    cached = cache_features(tiny_model, tokenizer, rows[:6], tmp_path / "f", 2)
    loss = inner(**cached.__getitems__(list(range(len(cached)))))["loss"].item()
    assert online == pytest.approx(loss, rel=1e-4)  # near-ties among probabilities


def test_a_bf16_base_model_stays_bf16_and_heads_are_saved_in_it(options, tokenizer, tmp_path):
    model = small_llama(len(tokenizer)).to(torch.bfloat16)
    before, lm_head = fingerprint(model), model.get_output_embeddings()
    heads = train_heads(options(), model, tokenizer)["heads"]
    assert heads.weight.dtype == model.dtype == torch.bfloat16 and heads.lm_head is lm_head
    assert fingerprint(model) == before and heads.weight.any()


# --- A1: nothing that is not finite is saved


@pytest.mark.parametrize(
    "how", [dict(states="cached"), dict(states="online"), dict(states="online", soft_share=0.0)], ids=str
)
def test_a_base_whose_states_overflow_in_float16_is_refused_and_nothing_is_saved(
    how, values, tokenizer, tmp_path, capsys
):
    model = small_llama(len(tokenizer))
    model.model.norm.weight.data.fill_(9e4)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    values |= dict(model_name_or_path=str(tmp_path / "base"), load_in="float16") | how
    (tmp_path / "c.json").write_text(json.dumps(values))
    assert main([str(tmp_path / "c.json")]) == 2
    error = capsys.readouterr().err
    assert "not finite in float16; use bfloat16 or float32" in error
    assert not list((tmp_path / "heads").glob("*.safetensors")) and not (tmp_path / "heads" / FILE).exists()


def test_training_that_explodes_is_an_error_and_leaves_earlier_heads_alone(options, tiny_model, tokenizer, tmp_path):
    train_heads(options(), tiny_model, tokenizer)
    before = (tmp_path / "heads" / WEIGHTS).read_bytes()
    with pytest.raises(InputError, match="the loss is not finite"):
        train_heads(options(), tiny_model, tokenizer, [Explode()])
    assert (tmp_path / "heads" / WEIGHTS).read_bytes() == before


# --- B11 and C17: data


def test_max_length_cuts_and_the_count_is_said_and_reported(
    values, tiny_model, tokenizer, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("medusa_nb.training.train.load_model", lambda options: (tiny_model, tokenizer))
    (tmp_path / "c.json").write_text(json.dumps(values))
    assert main([str(tmp_path / "c.json"), "--max-length", "46"]) == 0
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "heads" / "report.json").read_text())
    assert report["cut"] > 0
    assert f"{report['cut']} of 32 conversations are longer than 46 tokens and were cut" in out
    assert main([str(tmp_path / "c.json")]) == 0
    assert "were cut" not in capsys.readouterr().out


SHARE_GPT = [{"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}]


@pytest.mark.parametrize("form", ["lines", "list"])
def test_a_sharegpt_file_is_named_as_such_and_the_command_to_run_first(form, values, tmp_path, capsys):
    file = tmp_path / "chats.json"
    file.write_text(json.dumps(SHARE_GPT if form == "list" else SHARE_GPT[0]))
    (tmp_path / "c.json").write_text(json.dumps(values | dict(data_path=str(file))))
    assert main([str(tmp_path / "c.json")]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and "medusa-nb distill" in error and "chats.json" in error


def test_a_file_without_held_out_answers(options, rows, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows if r["split"] == "train"))
    with pytest.raises(InputError, match="32 train and 0 calibration answers"):
        train_heads(options(data_path=str(tmp_path / "a.jsonl")))


def test_loops_are_not_trained_on(options, rows, tiny_model, tokenizer, tmp_path):
    looped = [row | dict(loop=i % 2 == 0) for i, row in enumerate(rows)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in looped))
    assert train_heads(options(data_path=str(tmp_path / "a.jsonl")), tiny_model, tokenizer)["conversations"] == 16


def test_answers_without_a_label_for_the_last_head(options, tiny_model, tokenizer, tmp_path, rows):
    short = [row | dict(messages=[row["messages"][0], dict(role="assistant", content="a")]) for row in rows]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short))
    report = train_heads(options(data_path=str(tmp_path / "a.jsonl"), medusa_num_heads=3), tiny_model, tokenizer)
    assert report["accuracy"][2] == dict(top1=None, top5=None, labels=0)
    assert (
        "NaN" not in (tmp_path / "heads" / "log.jsonl").read_text() + (tmp_path / "heads" / "report.json").read_text()
    )


# --- interrupted work


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_interrupted_training_ends_at_the_same_weights(kind, options, tiny_model, tokenizer, tmp_path):
    more = dict(save_steps=3) | kind
    whole = train_heads(options(output_dir=str(tmp_path / "whole"), **more), tiny_model, tokenizer)
    with pytest.raises(KeyboardInterrupt):
        train_heads(options(**more), tiny_model, tokenizer, [Interrupt(5)])
    watch = Watch()
    parts = train_heads(options(**more), tiny_model, tokenizer, [watch])
    assert watch.steps[0] == 4 and equal(whole["heads"], parts["heads"])
    assert {step % 3 for step in watch.saved} == {0} and watch.steps[-1] not in watch.saved
    for name in (WEIGHTS, FILE, "report.json", "config.json"):
        assert (tmp_path / "heads" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines()[:-1] for name in ("heads", "whole")]
    assert [json.loads(a) for a in logs[0]] == [json.loads(b) for b in logs[1]]


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_checkpoint_that_a_kill_left_unfinished_is_passed_over(damage, options, tiny_model, tokenizer, tmp_path):
    how = dict(save_steps=2, save_total_limit=3)
    whole = train_heads(options(output_dir=str(tmp_path / "whole"), **how), tiny_model, tokenizer)
    with pytest.raises(KeyboardInterrupt):
        train_heads(options(**how), tiny_model, tokenizer, [Interrupt(7)])
    state = tmp_path / "heads" / "checkpoints" / "checkpoint-6" / "trainer_state.json"
    if damage == "gone":
        state.unlink()
    else:
        state.write_text(state.read_text()[:100])
    assert last_checkpoint(tmp_path / "heads" / "checkpoints").endswith("checkpoint-4")
    watch = Watch()
    parts = train_heads(options(**how), tiny_model, tokenizer, [watch])
    assert watch.steps[0] == 5 and equal(whole["heads"], parts["heads"])


@pytest.mark.parametrize(
    "other",
    [dict(learning_rate=0.5), dict(num_train_epochs=3), dict(medusa_num_heads=1), dict(kind="path"), dict(seed=9)],
    ids=str,
)
def test_other_work_does_not_go_on_from_a_checkpoint(other, options, tiny_model, tokenizer):
    with pytest.raises(KeyboardInterrupt):
        train_heads(options(save_steps=2), tiny_model, tokenizer, [Interrupt(5)])
    with pytest.raises(InputError, match="was made with other settings"):
        train_heads(options(save_steps=2, **other), tiny_model, tokenizer)


def test_dtype_is_put_back_after_an_interruption(options, tokenizer, rows, tmp_path):
    model = small_llama(len(tokenizer)).to(torch.bfloat16)
    heads = MedusaHeads(model, 2)
    features = cache_features(model, tokenizer, rows[:8], tmp_path / "f", 2)
    with pytest.raises(KeyboardInterrupt):
        fit(heads, features, options(per_device_train_batch_size=16), model, tokenizer, rows, [Interrupt(3)])
    assert heads.weight.dtype == torch.bfloat16 and not heads.weight.requires_grad


def test_an_unwritable_place_is_named(options):
    with pytest.raises(InputError, match="cannot write to '/proc/none'"):
        train_heads(options(output_dir="/proc/none"))


def test_path_heads_draft_the_most_frequent_tokens_only(options, tiny_model, tokenizer):
    heads = train_heads(options(kind="path", draft_vocabulary=7), tiny_model, tokenizer)["heads"]
    assert isinstance(heads, PathHeads) and len(heads.vocabulary) == 7


def test_other_tokens_are_drawn_for_every_step(tiny_model):
    frequent = torch.tensor([9, 4, 30])
    heads = MedusaHeads(tiny_model, 2).limited_to(frequent)
    softmax, drawn = SampledSoftmax(heads, 8, seed=1), {}
    for step in (1, 2, 1):
        softmax.draw(step)
        vocabulary = heads.vocabulary.tolist()
        assert vocabulary[:3] == [9, 4, 30] and len(set(vocabulary)) == 8
        assert drawn.setdefault(step, vocabulary) == vocabulary, "the same step draws the same tokens again"
        assert torch.equal(heads.rows, tiny_model.get_output_embeddings().weight[heads.vocabulary])
        assert heads.places(torch.tensor([4, vocabulary[5]])).tolist() == [1, 5]
    assert drawn[1] != drawn[2]


# --- SIGKILL


KILLS = int(os.environ.get("MEDUSA_NB_KILLS", 2))
ENDS = (WEIGHTS, FILE, "report.json", "config.json", "features/train/features.bin", "features/calibration/features.bin")


def killed_after(config, seconds: float | None) -> bool:
    """Run the training in a process and kill it after so long; True if it came to its end."""
    command = [sys.executable, "-m", "medusa_nb.training", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, error = process.communicate(timeout=seconds)
        assert process.returncode == 0, error.decode()[-2000:]
        return True
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return False


@pytest.mark.slow
def test_killed_again_and_again_it_ends_at_the_same_files(values, tmp_path):
    values |= dict(num_train_epochs=6, save_steps=10, per_device_train_batch_size=16, logging_steps=10)
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    whole.write_text(json.dumps(values | dict(output_dir=str(tmp_path / "whole"))))
    parts.write_text(json.dumps(values | dict(output_dir=str(tmp_path / "parts"))))
    start = time.monotonic()
    assert killed_after(whole, None)
    longest, source, kills = time.monotonic() - start, random.Random(0), 0
    while kills < KILLS:
        shutil.rmtree(tmp_path / "parts", ignore_errors=True)
        while kills < KILLS and not killed_after(parts, longest * source.uniform(0.4, 0.9)):
            kills += 1
        assert killed_after(parts, None)
        for name in ENDS:
            assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    print(f"{kills} kills")
    assert not list((tmp_path / "parts").glob("checkpoints*"))
