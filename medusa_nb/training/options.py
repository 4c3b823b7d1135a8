"""The options of head training: one schema, one set of defaults, for notebooks, commands, ``torchrun`` and JSON files.

They are those of ``transformers.TrainingArguments`` and of the tutorial's trainer. An option either works or is
refused by name, before anything is loaded.
"""

import argparse
import importlib.util
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser, TrainingArguments

from medusa_nb.base_model import DTYPES
from medusa_nb.errors import InputError
from medusa_nb.storage import read_json

KINDS, STATES, QUANTISED = ("medusa", "path"), ("auto", "cached", "online"), ("8bit", "4bit")
RENAMED = {"warmup_ratio": "warmup_steps"}  # transformers' name today
REFUSED = {
    "lazy_preprocess": "states are memory-mapped or computed as they are needed, there is nothing to be lazy about",
    "cache_dir": "set HF_HOME instead",
    "label_names": "the labels are fixed",
    "remove_unused_columns": "all columns are used",
    "do_predict": "measure with `medusa-nb measure`",
    "do_eval": "the heads are judged on the answers of the split 'calibration' at the end",
    "evaluation_strategy": "the heads are judged on the answers of the split 'calibration' at the end",
    "eval_strategy": "the heads are judged on the answers of the split 'calibration' at the end",
    "load_best_model_at_end": "the heads of the last step are kept",
    "gradient_checkpointing": "nothing is back-propagated through the base model",
    "neftune_noise_alpha": "it changes the embeddings, and the base model stays as it is",
    "label_smoothing_factor": "soft_share mixes in the base model's own probabilities instead",
    "resume_from_checkpoint": "the same command goes on from the last checkpoint by itself",
    "push_to_hub": "publish with `medusa-nb export --push`",
    "group_by_length": "positions have no length",
    "torch_compile": "it was never tried with these heads",
    "use_liger_kernel": "it replaces parts of the base model, which stays as it is",
}


def option(default, help: str):
    """A field with a line of help."""
    return field(default=default, metadata=dict(help=help))


@dataclass
class HeadTraining(TrainingArguments):
    """How heads are trained. Batches count positions with cached states, conversations with online ones."""

    # transformers' own, with defaults that suit heads
    output_dir: str | None = option("heads", "folder for heads, log and checkpoints")
    num_train_epochs: float = option(3.0, "how often every position is seen")
    per_device_train_batch_size: int = option(256, "positions (cached states) or conversations (online) a step")
    learning_rate: float = option(2e-3, "at its highest")
    lr_scheduler_type: str = option("cosine", "how it falls")
    warmup_steps: float = option(0.1, "steps it takes to rise, or (below 1) their share")
    logging_steps: float = option(20, "steps between two log records")
    logging_first_step: bool = option(True, "log the first step, too")
    save_strategy: str = option("steps", "when checkpoints are written")
    save_steps: float = option(200, "steps between two checkpoints")
    save_total_limit: int | None = option(1, "checkpoints that are kept")
    report_to: None | str | list[str] = option("none", "where the log goes besides log.jsonl")
    seed: int = option(0, "of the order of positions")
    dataloader_pin_memory: bool = option(False, "pin batches in memory")
    # ours
    model_name_or_path: str | None = option(None, "folder or hub id of the base model; the packaged one by default")
    data_path: str = option("answers.jsonl", "answers, from `medusa-nb distill`")
    model_max_length: int = option(2048, "longer conversations are cut to so many tokens")
    kind: str = option("medusa", "medusa: the paper's heads, which servers load; path: heads that see the path")
    medusa_num_heads: int = option(4, "K")
    medusa_num_layers: int = option(1, "residual blocks per head (kind medusa)")
    own_projection: bool = option(False, "a projection per head, the format's version 1 (kind medusa)")
    draft_vocabulary: int = option(4096, "path heads draft so many tokens, the most frequent in the answers; 0: all")
    loss_vocabulary: int = option(
        4096, "medusa heads with a shared projection are compared with so many tokens in training; 0: all"
    )
    depth_decay: float = option(0.8, "weight of head k in the loss: this to the power k")
    soft_share: float = option(0.5, "part of the loss on the base model's probabilities; 0: none, as in the paper")
    states: str = option("auto", "cached: computed once; online: at every step; auto: cached if the disk allows")
    kept_states: str | None = option(None, "folder of states kept by `distill --keep-states`")
    load_in: str | None = option(None, "base model in float32, bfloat16, float16, 8bit or 4bit; what suits by default")
    trust_remote_code: bool = option(False, "run code from the model's repository")

    def __post_init__(self):
        self.remove_unused_columns, self.label_names = False, ["labels"]
        super().__post_init__()
        check(self)


def check(options: HeadTraining) -> None:
    """Refuse values that would stop the run later, or mean nothing."""
    for name, known in (("kind", KINDS), ("states", STATES), ("load_in", (None, *DTYPES, *QUANTISED))):
        if getattr(options, name) not in known:
            listed = ", ".join(str(value) for value in known if value)
            raise InputError(f"{name} is '{getattr(options, name)}'; choose one of {listed}")
    least = dict(medusa_num_heads=1, medusa_num_layers=1, model_max_length=2, draft_vocabulary=0, loss_vocabulary=0)
    least |= dict(per_device_train_batch_size=1, gradient_accumulation_steps=1, logging_steps=1e-9)
    for name, lowest in least.items():
        if getattr(options, name) < lowest:
            raise InputError(f"{name}={getattr(options, name)}; choose {lowest if lowest >= 0 else 0} or more")
    for name in ("num_train_epochs", "learning_rate", "depth_decay"):
        if not 0 < getattr(options, name) < float("inf"):
            raise InputError(f"{name}={getattr(options, name)}; choose a number above 0")
    if not 0 <= options.soft_share <= 1:
        raise InputError(
            f"soft_share={options.soft_share}; choose a number from 0 (labels only) to 1 (soft labels only)"
        )
    reports = [options.report_to] if isinstance(options.report_to, str) else options.report_to or []
    needed = {"deepspeed": bool(options.deepspeed), "bitsandbytes": options.load_in in QUANTISED}
    needed |= {name: name in reports for name in ("wandb", "tensorboard", "mlflow", "trackio")}
    for package, wanted in needed.items():
        if wanted and importlib.util.find_spec(package) is None:
            raise InputError(f"'{package}' is asked for and not installed; install it or leave the option out")


def parse(arguments: list[str]) -> HeadTraining:
    """Options from flags, or from one JSON file and flags that overrule it.

    Raises:
        InputError: an unknown or refused option, or a value of the wrong kind.
    """
    values, flags = {}, list(arguments)
    if flags and flags[0].endswith(".json"):
        values = read_json(flags.pop(0))
    given = {word[2:].split("=")[0].replace("-", "_") for word in flags if word.startswith("--")} | values.keys()
    known = {name for name, item in HeadTraining.__dataclass_fields__.items() if item.init}
    for name in sorted(given):
        if name in REFUSED and not (name in values and values[name] in (None, False)):
            raise InputError(f"'{name}' is not an option here: {REFUSED[name]}; leave it out")
        if name not in known and name not in RENAMED and name not in REFUSED and not name.startswith("no_"):
            raise InputError(f"unknown option '{name}'; see `python -m medusa_nb.training --help`")
    words: list[str] = []
    for name, value in values.items():
        if value is not None and name not in REFUSED:
            words += _as_flag(RENAMED.get(name, name), value)
    words += [_renamed(word) for word in flags]
    parser = HfArgumentParser(HeadTraining, exit_on_error=False)
    parser.error = _refuse
    try:
        [options] = parser.parse_args_into_dataclasses(words)
    except InputError:
        raise
    except (argparse.ArgumentError, ValueError, TypeError, ImportError, KeyError, OSError) as error:
        raise InputError(
            f"the options do not fit: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        ) from error
    return options


def _as_flag(name: str, value) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}", str(value).lower()]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]


def _renamed(word: str) -> str:
    name = word[2:].split("=")[0]
    return word.replace(name, RENAMED[name], 1) if word.startswith("--") and name in RENAMED else word


def _refuse(message: str):
    raise InputError(message)


def require_writable(folder: Path) -> None:
    """Raise :class:`InputError` unless files can be written into ``folder``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to '{folder}': {error.strerror}; choose another output_dir") from error
