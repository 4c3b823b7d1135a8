"""The options of head training: one schema, one set of defaults, for notebooks, commands, ``torchrun`` and JSON files.

They are those of ``transformers.TrainingArguments`` and of the tutorial's trainer. An option either works or is
refused by name, before anything is loaded.
"""

import importlib.util
import json
from dataclasses import dataclass, field

from transformers import HfArgumentParser, TrainingArguments

from medusa_nb.base_model import DTYPES
from medusa_nb.errors import InputError
from medusa_nb.logits import first_line
from medusa_nb.storage import read_json

QUANTISED = ("8bit", "4bit")
CHOICES = {"kind": ("medusa", "path"), "states": ("auto", "cached", "online"), "load_in": (None, *DTYPES, *QUANTISED)}
MANY, TINY = 2**31, 1e-9
RANGES = {
    (1, 64): "medusa_num_heads medusa_num_layers",
    (2, MANY): "model_max_length",
    (1, MANY): "per_device_train_batch_size gradient_accumulation_steps",
    (0, MANY): "draft_vocabulary loss_vocabulary max_grad_norm",
    (TINY, MANY): "num_train_epochs logging_steps save_steps",
    (TINY, 1e3): "learning_rate depth_decay",
    (0, 1): "soft_share",
}
RENAMED = {"model": "model_name_or_path", "warmup_ratio": "warmup_steps", "max_length": "model_max_length"}
REFUSED = {
    "the heads are judged on the answers of the split 'calibration' at the end": "do_eval do_predict eval_strategy "
    "evaluation_strategy eval_steps eval_delay eval_on_start eval_accumulation_steps eval_do_concat_batches "
    "eval_use_gather_object per_device_eval_batch_size prediction_loss_only include_for_metrics batch_eval_metrics "
    "bf16_full_eval fp16_full_eval",
    "the heads of the last step are kept": "load_best_model_at_end metric_for_best_model greater_is_better",
    "nothing is back-propagated through the base model": "gradient_checkpointing gradient_checkpointing_kwargs "
    "activation_checkpointing activation_checkpointing_kwargs",
    "the base model stays as it is": "neftune_noise_alpha use_liger_kernel liger_kernel_config use_cache",
    "soft_share mixes in the base model's own probabilities instead": "label_smoothing_factor",
    "the same command goes on from the last checkpoint by itself": "resume_from_checkpoint save_only_model",
    "publish with `medusa-nb export --push`": "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy "
    "hub_always_push hub_revision trackio_space_id trackio_bucket_id trackio_static_space_id",
    "it was never tried with these heads": "torch_compile torch_compile_backend torch_compile_mode parallelism_config "
    "auto_find_batch_size",
    "the optimizers that read it rewrite layers of a whole model": "optim_args optim_target_modules",
    "positions have no length": "length_column_name include_num_input_tokens_seen",
    "labels and columns are fixed": "label_names remove_unused_columns",
    "torchrun sets it": "local_rank",
    "states are memory-mapped or computed as they are needed": "lazy_preprocess",
    "set HF_HOME instead": "cache_dir",
}


def option(default, help: str):
    """A field with a line of help."""
    return field(default=default, metadata=dict(help=help))


@dataclass
class HeadTraining(TrainingArguments):
    """How heads are trained. Batches count positions with cached states, conversations with online ones.

    Raises:
        InputError: an option that does nothing here, or a value that cannot be.
    """

    # transformers' own, with defaults that suit heads
    output_dir: str = option("heads", "folder for heads, log and checkpoints")
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
    report_to: list[str] = field(  # type: ignore[assignment]
        default_factory=lambda: ["none"], metadata={"help": "where the log goes besides log.jsonl"}
    )
    seed: int = option(0, "of the order of positions")
    dataloader_pin_memory: bool = option(False, "pin batches in memory")
    remove_unused_columns: bool = field(default=False)
    # ours
    model_name_or_path: str | None = option(None, "folder or hub id of the base model; the packaged one by default")
    data_path: str = option("answers.jsonl", "answers, from `medusa-nb distill`")
    model_max_length: int = option(2048, "longer conversations are cut to so many tokens (also --max-length)")
    kind: str = option("medusa", "medusa: the paper's heads, which servers load; path: heads that see the path")
    medusa_num_heads: int = option(4, "K")
    medusa_num_layers: int = option(1, "residual blocks per head (kind medusa)")
    own_projection: bool = option(False, "a projection per head, the format's version 1 (kind medusa)")
    draft_vocabulary: int = option(4096, "path heads draft so many tokens, the most frequent in the answers; 0: all")
    loss_vocabulary: int = option(
        4096, "medusa heads with a shared projection are compared with so many tokens at a training step; 0: all"
    )
    depth_decay: float = option(0.8, "weight of head k in the loss: this to the power k")
    soft_share: float = option(0.5, "part of the loss on the base model's probabilities; 0: none, as in the paper")
    states: str = option("auto", "cached: computed once; online: at every step; auto: cached if the disk allows")
    features: str | None = option(None, "folder of cached hidden states, which trainings may share")
    kept_states: str | None = option(None, "folder of states kept by `distill --keep-states`")
    load_in: str | None = option(None, "base model in float32, bfloat16, float16, 8bit or 4bit; what suits by default")
    trust_remote_code: bool = option(False, "run code from the model's repository")
    # the tutorial's, known so that they are refused by name unless they are off
    evaluation_strategy: str = field(default="no")
    lazy_preprocess: bool = field(default=False)
    cache_dir: str | None = field(default=None)

    def __post_init__(self):
        check(self)
        super().__post_init__()


def check(options: HeadTraining) -> None:
    """Refuse what does nothing here, and values that would stop the run later or mean nothing."""
    for reason, names in REFUSED.items():
        for name in names.split():
            if getattr(options, name) not in (None, False, [], HeadTraining.__dataclass_fields__[name].default):
                raise InputError(f"'{name}' is not an option here: {reason}; leave it out")
    for name, known in CHOICES.items():
        if getattr(options, name) not in known:
            listed = ", ".join(value for value in known if value)
            raise InputError(f"{name} is '{getattr(options, name)}'; choose one of {listed}")
    for (least, most), names in RANGES.items():
        for name in names.split():
            if not least <= getattr(options, name) <= most:  # NaN is in no range
                raise InputError(f"{name}={getattr(options, name)}; choose a number from {least} to {most}")
    for name, value in (("train_sampling_strategy", "group_by_length"), ("save_strategy", "best")):
        if getattr(options, name) == value:
            raise InputError(
                f"'{name}' cannot be '{value}' here: positions have no length and no evaluation; leave it out"
            )
    if options.load_in in QUANTISED and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"load_in={options.load_in} needs the package 'bitsandbytes'; install it or leave it out")


class _Parser(HfArgumentParser):
    def error(self, message):
        raise InputError(f"the options do not fit: {message}")


def parse(arguments: list[str]) -> HeadTraining:
    """Options from flags, or from one JSON file and flags that overrule it.

    Raises:
        InputError: an unknown or refused option, or a value of the wrong kind.
    """
    values: dict = {}
    flags = list(arguments)
    if flags and flags[0].endswith(".json"):
        values = read_json(flags.pop(0))
    flags = [_underscored(word) for word in flags]
    names = [*values, *(word[2:].partition("=")[0] for word in flags if word.startswith("--"))]
    known = {name for name, item in HeadTraining.__dataclass_fields__.items() if item.init} | RENAMED.keys()
    for name in names:
        if name not in known and name.removeprefix("no_") not in known:
            raise InputError(f"unknown option '{name}'; see `python -m medusa_nb.training --help`")
    words = [word for name, value in values.items() for word in _as_flag(RENAMED.get(name, name), value)] + flags
    try:
        [options] = _Parser(HeadTraining, exit_on_error=False).parse_args_into_dataclasses(words)  # type: ignore[arg-type]
    except InputError:
        raise
    except Exception as error:  # whatever argparse, transformers or accelerate object to
        raise InputError(f"the options do not fit: {first_line(error)}") from error
    return options


def _as_flag(name: str, value) -> list[str]:
    """An entry of a JSON file as words of a command line; null and an empty list are left out."""
    if value is None or value == []:
        return []
    annotation = str(HeadTraining.__dataclass_fields__[name].type)
    if isinstance(value, list | dict) and type(value).__name__ not in annotation:
        raise InputError(f"{name} is {json.dumps(value)[:80]}; one value is expected")
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}"]


def _underscored(word: str) -> str:
    """A flag with underscores, by the name it has today."""
    name, equals, value = word.partition("=")
    if not word.startswith("--"):
        return word
    name = name[2:].replace("-", "_")
    return f"--{RENAMED.get(name, name)}{equals}{value}"
