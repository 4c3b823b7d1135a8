"""Every option works or is refused in one sentence, before a model is loaded; config files of any kind."""

import dataclasses
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments

from medusa_nb.errors import InputError
from medusa_nb.storage import repository
from medusa_nb.training import train as module
from medusa_nb.training.__main__ import main
from medusa_nb.training.options import REFUSED, HeadTraining, parse

pytest_plugins = ["training_setting"]
FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments)}
CONFIGS = repository() / "data" / "configs"


@pytest.fixture
def no_loading(monkeypatch):
    """Loading a model fails the test."""

    def no(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(module, "load_model", no)


def run(values: dict, tmp_path, capsys) -> tuple[int, list[str]]:
    """Exit status and lines of standard error of `python -m medusa_nb.training CONFIG`."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values))
    capsys.readouterr()
    status = main([str(file)])
    return status, [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]


# --- E27: each field of TrainingArguments

SPECIAL = dict(
    lr_scheduler_kwargs={"num_cycles": 0.25},
    optim="adamw_torch",
    optim_args="a=1",
    accelerator_config={"even_batches": False},
    include_num_input_tokens_seen="all",
    log_level="info",
    log_level_replica="error",
    logging_strategy="epoch",
    lr_scheduler_type="linear",
    eval_strategy="epoch",
    save_strategy="epoch",
    hub_strategy="end",
    report_to=["tensorboard"],
    debug="underflow_overflow",
    train_sampling_strategy="sequential",
    dataloader_multiprocessing_context="fork",
    ddp_backend="gloo",
    local_rank=0,
    fsdp="full_shard",
    fsdp_config={"min_num_params": 1},
    deepspeed={"zero_optimization": {"stage": 2}},
    activation_checkpointing_kwargs={"use_reentrant": False},
    gradient_checkpointing_kwargs={"use_reentrant": False},
    liger_kernel_config={"rope": True},
    parallelism_config={"dp_size": 2},
    include_for_metrics=["loss"],
    label_names=["labels"],
    optim_target_modules=["linear"],
    trackio_static_space_id="me/space",
    num_train_epochs=1.0,
    max_steps=2,
    warmup_steps=3,
    seed=5,
    max_grad_norm=0.5,
    logging_first_step=False,
    use_cpu=True,
    dataloader_pin_memory=True,
    save_total_limit=2,
    remove_unused_columns=True,
    per_device_train_batch_size=32,
    dataloader_num_workers=1,
)


def other_value(name: str):
    """A value of this option that is not its default."""
    if name in SPECIAL:
        return SPECIAL[name]
    kind, default = str(FIELDS[name].type), FIELDS[name].default
    if isinstance(default, bool) or "bool" in kind:
        return not default
    if isinstance(default, float) or "float" in kind:
        return (default or 0) + 0.5
    if isinstance(default, int) or "int" in kind:
        return (default or 0) + 1
    return "something"


@pytest.mark.parametrize("name", sorted(FIELDS.keys() - {"output_dir", "dataloader_prefetch_factor"}))
def test_every_option_of_transformers_works_or_is_refused_by_name(
    name, values, few, tiny_model, tokenizer, tmp_path, capsys, monkeypatch
):
    loaded = []
    monkeypatch.setattr(module, "load_model", lambda options: loaded.append(1) or (tiny_model, tokenizer))
    assert HeadTraining.__dataclass_fields__[name].default != other_value(name)
    status, errors = run(
        values | dict(num_train_epochs=1, data_path=few, per_device_train_batch_size=24) | {name: other_value(name)},
        tmp_path,
        capsys,
    )
    if status == 0:
        assert not errors and (tmp_path / "heads" / "medusa_lm_head.safetensors").exists()
    else:
        assert status == 2 and len(errors) == 1 and not loaded, errors
        assert not (tmp_path / "heads" / "medusa_lm_head.safetensors").exists()
    assert (status == 2) >= (name in " ".join(REFUSED).split())


def test_the_names_that_are_refused_are_options():
    names = " ".join(REFUSED.values()).split()
    assert len(names) == len(set(names)) and set(names) <= {field.name for field in dataclasses.fields(HeadTraining)}
    for name in names:
        with pytest.raises(InputError, match=f"'{name}' is not an option here"):
            HeadTraining(**{name: "something"})


@pytest.mark.parametrize(
    "name", ["dataloader_prefetch_factor", "lr_scheduler_type", "optim", "accelerator_config", "bf16"]
)
def test_what_transformers_itself_objects_to_is_one_sentence_before_loading(name, values, tmp_path, capsys, no_loading):
    wrong = dict(dataloader_prefetch_factor=2, lr_scheduler_type="warmup_stable_decay", optim="adamw_8bit")
    wrong |= dict(accelerator_config={"no_such": 1}, bf16="perhaps")
    status, errors = run(values | {name: wrong[name]}, tmp_path, capsys)
    assert status == 2 and len(errors) == 1 and name in errors[0] or "do not fit" in errors[0]


@pytest.mark.parametrize(
    "tutorial",
    [
        {"evaluation_strategy": "epoch"},
        {"gradient_checkpointing": True},
        {"neftune_noise_alpha": 5},
        {"label_smoothing_factor": 0.1},
        {"resume_from_checkpoint": "heads/checkpoint-8"},
        {"lazy_preprocess": True},
        {"load_best_model_at_end": True},
        {"group_by_length": True},
        {"no_such_option": 3},
        {"no_cuda": True},
        {"load_in": "4bit"},
        {"load_in": "int3"},
        {"states": "sometimes"},
        {"kind": "hydra"},
        {"soft_share": 1.5},
        {"soft_share": -0.1},
        {"medusa_num_heads": 0},
        {"medusa_num_layers": -1},
        {"learning_rate": float("nan")},
        {"learning_rate": 0},
        {"depth_decay": float("inf")},
        {"num_train_epochs": "many"},
        {"per_device_train_batch_size": 0},
        {"logging_steps": 0},
        {"save_steps": 0},
        {"save_strategy": "best"},
        {"model_max_length": 1},
        {"train_sampling_strategy": "group_by_length"},
        {"data_path": "nowhere.jsonl"},
        {"output_dir": "/proc/none"},
        {"output_dir": "a\0b"},
        {"deepspeed": "ds.json"},
        {"report_to": "nobody"},
    ],
    ids=str,
)
def test_the_tutorials_options_are_refused_by_name_before_a_model_is_loaded(
    tutorial, values, tmp_path, capsys, no_loading
):
    status, errors = run(values | tutorial, tmp_path, capsys)
    [(name, value)] = tutorial.items()
    assert status == 2 and len(errors) == 1
    assert any(word in errors[0] for word in (name, str(value), name.replace("_", " "), "/proc", "cannot write")), (
        errors
    )


@pytest.mark.parametrize(
    "off",
    [
        {"evaluation_strategy": "no"},
        {"gradient_checkpointing": False},
        {"lazy_preprocess": False},
        {"neftune_noise_alpha": None},
    ],
    ids=str,
)
def test_an_option_that_is_off_is_no_reason_to_refuse(off, values):
    HeadTraining(**(values | off))
    [(name, value)] = off.items()
    if value is not None:
        parse([f"--{name}={str(value).lower()}"])


# --- E28: null is absent, lists are lists


def test_null_and_an_empty_list_mean_left_out(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({name: None for name in FIELDS} | dict(report_to=[], deepspeed=[])))
    assert parse([str(tmp_path / "c.json")]) == parse([])


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_list_of_reports_is_understood_and_a_missing_package_named(name, values, tmp_path, capsys, no_loading):
    status, errors = run(values | dict(report_to=[name]), tmp_path, capsys)
    assert status == 2 and len(errors) == 1 and name in errors[0].lower()
    (tmp_path / "c.json").write_text(json.dumps(dict(report_to=[name, "mlflow"])))
    assert parse([str(tmp_path / "c.json")]).report_to == [name, "mlflow"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"kind": "path"}]', "a JSON object is expected, found list"),
        ('{\n"a": 1,\n}', "line 3: not valid JSON"),
        ("", "not valid JSON"),
        ('{"seed": [1, 2]}', "seed is [1, 2]; one value is expected"),
        ('{"kind": {"a": 1}}', 'kind is {"a": 1}; one value is expected'),
        ('{"learning_rate": true}', "learning_rate"),
    ],
)
def test_a_config_that_is_none_is_one_sentence(text, message, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    assert main([str(tmp_path / "config.json")]) == 2
    assert message in capsys.readouterr().err


def test_a_byte_order_mark_before_a_config_is_no_trouble(tmp_path):
    (tmp_path / "c.json").write_bytes(b'\xef\xbb\xbf{"seed": 7}')
    assert parse([str(tmp_path / "c.json")]).seed == 7


def test_a_missing_config(capsys):
    assert main(["missing.json"]) == 2
    assert "there is no file 'missing.json'" in capsys.readouterr().err


# --- flags


def test_flags_are_the_same_as_a_file(values, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(values))
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    assert parse(flags) == parse([str(tmp_path / "c.json")]) == HeadTraining(**values)


def test_flags_overrule_the_file_and_dashes_are_underscores(tmp_path):
    (tmp_path / "c.json").write_text('{"seed": 7, "learning_rate": 1e-05}')
    options = parse([str(tmp_path / "c.json"), "--seed=8", "--max-length", "99", "--warmup-ratio", "0.3"])
    assert (options.seed, options.learning_rate, options.model_max_length, options.warmup_steps) == (8, 1e-5, 99, 0.3)


@pytest.mark.parametrize(
    "words", [["--foo", "1"], ["--no-such"], ["stray"], ["--seed"], ["--seed", "x"], ["--learn", "1"]]
)
def test_wrong_flags_are_one_sentence(words, capsys):
    assert main(words) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_help_names_every_option_of_ours(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert {"medusa_num_heads", "soft_share", "output_dir"} <= set(text.split()) and "lazy_preprocess" not in text


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.json")), ids=lambda file: file.name)
def test_the_configs_that_ship_are_understood(file):
    options = parse([str(file), "--use_cpu=true", "--tf32=false"])
    assert options.medusa_num_heads >= 3


# --- any config at all

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from(
        [
            10**30,
            -(10**30),
            1e300,
            float("nan"),
            float("inf"),
            0.5,
            1e-9,
            "",
            "no",
            "none",
            "-1",
            "--x",
            "\0",
            "\ud83d",
            "ü" * 300,
            "all",
        ]
    ),
    st.text(max_size=6),
    st.lists(st.one_of(st.text(max_size=4), st.integers(-3, 3), st.none()), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(0, 2), max_size=2),
)
ENDLESS = {"max_steps", "num_train_epochs", "dataloader_num_workers", "output_dir", "model_name_or_path", "log_level"}
NAMES = sorted({field.name for field in dataclasses.fields(HeadTraining)} - ENDLESS) + [
    "warmup_ratio",
    "nonsense",
    "",
    "a=b",
    "no_",
    "data path",
]
EXAMPLES = int(os.environ.get("MEDUSA_NB_FUZZ", 200))


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(changes=st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1, max_size=4))
def test_any_config_gives_a_result_or_one_sentence(
    changes, values, few, tiny_model, tokenizer, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(module, "load_model", lambda options: (tiny_model, tokenizer))
    status, errors = run(values | dict(max_steps=1, data_path=few) | changes, tmp_path, capsys)
    assert (status, len(errors)) in ((0, 0), (2, 1))
