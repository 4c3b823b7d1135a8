"""The axolotl plugin: its labels, its frozen base and its refusals here; a whole `axolotl train` where there is one."""

import json
import os
import subprocess
from types import SimpleNamespace

import pytest
import torch
import yaml
from pydantic import ValidationError
from tiny_models import small_llama
from transformers import TrainingArguments

from medusa_nb.base_model import fingerprint, load_base_model
from medusa_nb.errors import InputError
from medusa_nb.heads_file import CONFIG, WEIGHTS, load_heads
from medusa_nb.storage import repository
from medusa_nb.training.axolotl import REFUSED, HeadsOverBase, MedusaArgs, MedusaPlugin, OwnWords, refuse, write_splits
from medusa_nb.training.calibration import Calibration
from medusa_nb.training.features import IGNORED, encode_answer, supervise
from medusa_nb.training.options import HeadTraining
from medusa_nb.training.train import Conversations, HeadsTrainer, collate, train_heads

pytest_plugins = ["training_setting"]
YAML = repository() / "data" / "configs" / "axolotl_learner.yaml"
AXOLOTL = repository() / ".venv-axolotl" / "bin"
NAMES = " ".join(REFUSED.values()).split()
needs_axolotl = pytest.mark.skipif(
    not (AXOLOTL / "axolotl").exists(), reason="no .venv-axolotl here; see `make axolotl`"
)


def write_answers(file, rows: list[dict]):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def as_axolotl_has_it(tokenizer, row: dict) -> dict:
    encoded = encode_answer(tokenizer, row)
    labels = [i if own else IGNORED for i, own in zip(encoded.ids, encoded.own, strict=True)]
    return dict(input_ids=encoded.ids, labels=labels, attention_mask=[1] * len(labels))


# --- labels


def test_batches_are_those_of_our_own_online_training(tiny_model, tokenizer, rows):
    ours = collate(list(Conversations(*supervise(tiny_model, tokenizer, rows, 3, 1024))))
    theirs = OwnWords(tokenizer, num_heads=3, padding=True, pad_to_multiple_of=64)(
        [as_axolotl_has_it(tokenizer, row) for row in rows]
    )
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_a_head_learns_only_own_tokens_and_never_over_a_gap():
    ids, own = [10, 11, 12, 13, 14, 15, 16], [False, True, True, False, True, True, True]
    row = dict(input_ids=ids, labels=[i if mine else IGNORED for i, mine in zip(ids, own, strict=True)])
    batch = OwnWords(None, num_heads=2)([row, dict(input_ids=[1], labels=[IGNORED])])
    x = IGNORED
    assert batch["place"].tolist() == [0, 1, 3, 4, 5]
    assert batch["labels"].tolist() == [[11, 12, x], [12, x, x], [14, 15, 16], [15, 16, x], [16, x, x]]


def test_a_batch_without_own_words_is_refused():
    with pytest.raises(InputError, match="model's own"):
        OwnWords(None, num_heads=2)([dict(input_ids=[1, 2, 3], labels=[IGNORED] * 3)])


# --- the frozen base


def trainer_for(base, tokenizer, rows, folder, **medusa):
    trainer_class = type("MedusaTrainer", (HeadsOverBase, HeadsTrainer), dict(medusa=MedusaArgs(**medusa)))
    how = dict(max_steps=4, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=1, save_strategy="no")
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", **how)
    data = [as_axolotl_has_it(tokenizer, row) for row in rows]
    return trainer_class(base, arguments, train_dataset=data, data_collator=OwnWords(tokenizer, 2))


@pytest.mark.parametrize("kind", ["medusa", "path"])
def test_only_the_heads_are_trained_and_only_the_heads_are_saved(tokenizer, rows, tmp_path, kind):
    base = small_llama(len(tokenizer), context=256).to(torch.bfloat16).requires_grad_(True).train()
    before = fingerprint(base)
    trainer = trainer_for(base, tokenizer, rows, tmp_path, medusa_num_heads=2, medusa_kind=kind)
    assert not any(p.requires_grad for p in base.parameters()) and not base.training
    assert {id(p) for p in trainer.model.parameters()} == {id(p) for p in trainer.heads.parameters()}
    assert trainer.heads.dtype == torch.float32
    batch = trainer.data_collator([as_axolotl_has_it(tokenizer, row) for row in rows])
    untrained = trainer.model(**batch)["loss"].item()
    trainer.train()
    assert fingerprint(base) == before and trainer.heads.bias.abs().sum() > 0
    assert trainer.model(**batch)["loss"].item() < untrained
    assert {"head0_loss", "head1_top1"} <= trainer.state.log_history[0].keys()
    trainer.float32.close()
    base.save_pretrained(tmp_path / "saved", safe_serialization=True)
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == sorted([CONFIG, WEIGHTS])
    again = load_heads(tmp_path / "saved", base)
    assert again.dtype == torch.bfloat16 and type(again) is type(trainer.heads)
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in trainer.heads.tensors().items())


# --- refusals


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_honoured_is_refused_by_name(name):
    with pytest.raises(InputError, match=f"'{name}'"):
        MedusaPlugin().register({name: "lora"})
    refuse({name: False})


def test_the_gravest_ones_are_among_them():
    assert {"adapter", "unfrozen_parameters", "gradient_checkpointing", "sample_packing", "deepspeed"} <= set(NAMES)


def test_a_misspelt_option_is_refused():
    with pytest.raises(InputError, match="'medusa_heads'.*medusa_num_heads"):
        refuse(dict(medusa_heads=3))


@pytest.mark.parametrize(
    "wrong",
    [
        dict(medusa_num_heads=0),
        dict(medusa_num_layers=-1),
        dict(medusa_depth_decay="x"),
        dict(medusa_soft_share=1.5),
        dict(medusa_kind="hydra"),
    ],
    ids=str,
)
def test_wrong_values_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        MedusaArgs(**wrong)


def test_a_trainer_of_another_plugin_is_refused():
    with pytest.raises(InputError, match="another plugin"):
        MedusaPlugin().post_trainer_create(SimpleNamespace(), object())


def test_the_yaml_is_one_that_the_plugin_takes():
    config = yaml.safe_load(YAML.read_text())
    assert config["plugins"] == [f"{MedusaPlugin.__module__}.{MedusaPlugin.__name__}"]
    refuse(config)
    own = {name: value for name, value in config.items() if name.startswith("medusa_")}
    assert MedusaArgs(**own).model_dump().items() >= own.items()
    assert not config["train_on_inputs"] and (repository() / config["medusa_answers"]).is_file()
    for part in config["datasets"] + config["test_datasets"]:
        assert part["roles_to_train"] == ["assistant"] and part["train_on_eos"] == "turn"


# --- the two files of conversations


def test_loops_and_held_out_answers_are_not_trained_on(rows, tmp_path):
    answers = write_answers(tmp_path / "answers.jsonl", [*rows, dict(rows[1], id="loop", loop=True)])
    write_splits(answers, tmp_path / "split")
    train_rows, held_out = (
        [json.loads(line) for line in (tmp_path / "split" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "held_out")
    )
    assert train_rows == [row for row in rows if row["split"] == "train"]
    assert held_out == [row for row in rows if row["split"] == "calibration"]
    write_answers(answers, train_rows)
    with pytest.raises(InputError, match="0 calibration"):
        write_splits(answers, tmp_path / "split")


# --- axolotl itself


def in_axolotl(*command: str, cwd) -> subprocess.CompletedProcess:
    environment = os.environ | dict(AXOLOTL_DO_NOT_TRACK="1", DO_NOT_TRACK="1", HF_HUB_OFFLINE="1")
    program, *arguments = command
    command = [str(AXOLOTL / program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, env=environment)


@pytest.fixture(scope="module")
def setting(tmp_path_factory, tiny_model, tokenizer, rows):
    """A tiny base model, answers and their splits, and the shipped YAML cut down to them."""
    folder = tmp_path_factory.mktemp("axolotl")
    tiny_model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    write_splits(write_answers(folder / "answers.jsonl", rows), folder)
    config = yaml.safe_load(YAML.read_text())
    config |= dict(base_model="base", output_dir="heads", dataset_prepared_path="prepared", sequence_len=256)
    config |= dict(medusa_answers="answers.jsonl", medusa_num_heads=2)
    config["datasets"][0]["path"], config["test_datasets"][0]["path"] = "train.jsonl", "held_out.jsonl"
    # one batch holds all conversations, so that the order in which they come cannot matter
    config |= dict(micro_batch_size=32, num_epochs=6, lr_scheduler="constant", warmup_ratio=0, logging_steps=1)
    config |= dict(learning_rate=1e-2)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@needs_axolotl
@pytest.mark.slow
def test_axolotl_trains_the_very_heads_of_our_own_training(setting):
    before = {file.name: file.read_bytes() for file in (setting / "base").iterdir()}
    done = in_axolotl("axolotl", "train", "config.yaml", "--launcher", "python", cwd=setting)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {file.name: file.read_bytes() for file in (setting / "base").iterdir()} == before
    out = setting / "heads"
    assert not list(out.glob("model*.safetensors"))
    model, tokenizer = load_base_model(setting / "base", dtype="float32")
    theirs = load_heads(out, model)
    how = HeadTraining(
        data_path=str(setting / "answers.jsonl"),
        output_dir=str(setting / "ours"),
        medusa_num_heads=2,
        num_train_epochs=6,
        learning_rate=1e-2,
        per_device_train_batch_size=32,
        lr_scheduler_type="constant",
        states="online",
        loss_vocabulary=0,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
    )
    ours = train_heads(how, model, tokenizer)["heads"]
    assert ours.weight.abs().sum() > 0
    for name, tensor in ours.tensors().items():
        torch.testing.assert_close(theirs.tensors()[name], tensor, atol=1e-4, rtol=0)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {"head0_loss", "head1_top1"} <= next(line.keys() for line in log if "loss" in line)
    assert any("eval_loss" in line for line in log) and '"accuracy"' in done.stdout
    assert Calibration.load(out).rank_counts == Calibration.load(setting / "ours").rank_counts


@needs_axolotl
@pytest.mark.slow
def test_axolotl_stops_at_a_refused_option_before_it_loads_the_model(setting):
    done = in_axolotl("axolotl", "train", "config.yaml", "--launcher", "python", "--adapter", "lora", cwd=setting)
    assert done.returncode != 0 and "'adapter' is not an option when heads are trained" in done.stderr + done.stdout


@needs_axolotl
@pytest.mark.slow
def test_every_key_we_write_or_refuse_is_one_that_axolotl_knows(setting):
    """It drops unknown keys silently, so a misspelt one would look as if it worked."""
    code = "import json; from axolotl.utils.schemas.config import AxolotlInputConfig as C; "
    done = in_axolotl("python", "-c", code + "print(json.dumps(sorted(C.model_fields)))", cwd=setting)
    known = set(json.loads(done.stdout.splitlines()[-1])) | MedusaArgs.model_fields.keys()
    known |= {"expert_parallel_size"}  # a key of axolotl's own expert_parallel plugin
    assert yaml.safe_load(YAML.read_text()).keys() <= known
    assert set(NAMES) <= known
