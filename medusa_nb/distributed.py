"""Head training for a model of your own: ``torchrun --nproc_per_node=N -m medusa_nb.training CONFIG.json``.

The tutorial's options, as a JSON file or as flags. ``transformers.Trainer`` does the work, so data-parallel
training, DeepSpeed ZeRO and FSDP come from there. An option either works or is refused by name.
"""

import argparse
import importlib.util
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from medusa_nb.base_model import load_base_model, require_chat_template
from medusa_nb.calibration import calibrate, draft_vocabulary
from medusa_nb.distillation import load_answers
from medusa_nb.errors import InputError
from medusa_nb.features import cache_features, encode_conversation, head_labels, likeliest, soft_labels
from medusa_nb.heads import MedusaHeads
from medusa_nb.training import HeadsTrainer, HeadsWithLoss, accuracy, in_float32, rank_table

RENAMED = {"warmup_ratio": "warmup_steps", "evaluation_strategy": "eval_strategy"}  # today's names in transformers
REFUSED = {
    "lazy_preprocess": "states are memory-mapped or computed as they are needed, there is nothing to be lazy about",
    "cache_dir": "set HF_HOME instead",
    "label_names": "the labels are fixed",
    "remove_unused_columns": "all columns are used",
    "do_predict": "measure with `python -m medusa_nb measure`",
}


@dataclass
class HeadOptions:
    """What :class:`transformers.TrainingArguments` does not hold."""

    model_name_or_path: str = field(metadata=dict(help="folder or hub id of the base model; it stays frozen"))
    data_path: str = field(metadata=dict(help="JSONL file of answers, from `python -m medusa_nb distill`"))
    model_max_length: int = field(default=2048, metadata=dict(help="longer conversations are cut"))
    medusa_num_heads: int = field(default=4, metadata=dict(help="K"))
    medusa_num_layers: int = field(default=1, metadata=dict(help="residual blocks per head"))
    own_projection: bool = field(default=False, metadata=dict(help="version 1: a projection per head"))
    see_path: bool = field(default=False, metadata=dict(help="heads that see the path; no server loads them"))
    draft_vocabulary: int | None = field(
        default=None, metadata=dict(help="guess so many tokens only, the most frequent in the answers")
    )
    depth_decay: float = field(default=0.8, metadata=dict(help="weight of head k in the loss: this to the power k"))
    soft_share: float = field(
        default=0.5, metadata=dict(help="part of the loss on the base model's probabilities; 0: none")
    )
    states: str = field(default="auto", metadata=dict(help="cached, online, or auto: cached if the disk allows"))
    load_in: str = field(
        default="bfloat16", metadata=dict(help="base model in float32, bfloat16, float16, 8bit or 4bit")
    )
    trust_remote_code: bool = field(default=False, metadata=dict(help="run code from the model's repository"))


def parse(arguments: list[str]) -> tuple[HeadOptions, TrainingArguments]:
    """Options from one JSON file or from flags.

    Raises:
        InputError: an unknown or refused option, a missing one, a value of the wrong kind.
    """
    if len(arguments) == 1 and arguments[0].endswith(".json"):
        file = Path(arguments[0])
        if not file.is_file():
            raise InputError(f"there is no file '{file}'")
        try:
            values = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise InputError(f"{file}, line {error.lineno}: not valid JSON ({error.msg})") from error
        arguments = []
        for name, value in values.items():
            arguments += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    given = {word[2:].split("=")[0] for word in arguments if word.startswith("--")}
    for name in sorted(given & REFUSED.keys()):
        raise InputError(f"'{name}' is not an option here: {REFUSED[name]}; leave it out")
    arguments = [f"--{RENAMED[word[2:]]}" if word[2:] in RENAMED else word for word in arguments]
    parser = HfArgumentParser((HeadOptions, TrainingArguments), exit_on_error=False)
    parser.error = _raise
    try:
        options, training, rest = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    except (argparse.ArgumentError, ValueError, TypeError, ImportError) as error:
        raise InputError(str(error).strip().splitlines()[0]) from error
    if rest:
        raise InputError(f"unknown option '{rest[0].lstrip('-')}'; see --help")
    return options, training


def _raise(message: str):
    raise InputError(message)


def check_before_the_first_step(options: HeadOptions, training: TrainingArguments) -> None:
    """Whatever would stop the run later stops it now.

    Raises:
        InputError: a missing optional package, an output folder that cannot be written, an odd choice.
    """
    needed = {"deepspeed": bool(training.deepspeed), "bitsandbytes": options.load_in in ("8bit", "4bit")}
    needed |= {name: name in (training.report_to or []) for name in ("wandb", "tensorboard", "mlflow", "trackio")}
    for package, wanted in needed.items():
        if wanted and importlib.util.find_spec(package) is None:
            raise InputError(f"'{package}' is asked for and not installed; install it or leave the option out")
    if options.states not in ("auto", "cached", "online"):
        raise InputError(f"states='{options.states}'; choose cached, online or auto")
    if options.load_in not in ("float32", "bfloat16", "float16", "8bit", "4bit"):
        raise InputError(f"load_in='{options.load_in}'; choose float32, bfloat16, float16, 8bit or 4bit")
    try:
        Path(training.output_dir).mkdir(parents=True, exist_ok=True)
        probe = Path(training.output_dir) / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"cannot write to '{training.output_dir}': {error.strerror}; choose another output_dir"
        ) from error


class Conversations(Dataset):
    """Token ids and labels of whole conversations, for training that runs the base model at every step."""

    def __init__(self, tokenizer, rows: list[dict], num_heads: int, max_length: int):
        self.items = []
        for row in rows:
            encoded = encode_conversation(tokenizer, row["messages"], max_length)
            positions, labels = head_labels(encoded.ids, encoded.own, num_heads)
            if positions:
                self.items.append((encoded.ids, positions, labels))
        if not self.items:
            raise InputError("no token of these conversations is the model's own; are there assistant turns?")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int):
        return self.items[i]


def collate(items: list) -> dict[str, torch.Tensor]:
    """Right-padded ``input_ids [B, T]``, and for all P supervised positions ``place [P]`` in ``B * T`` and labels."""
    width = max(len(ids) for ids, _, _ in items)
    input_ids = torch.zeros(len(items), width, dtype=torch.long)
    for line, (ids, _, _) in enumerate(items):
        input_ids[line, : len(ids)] = torch.tensor(ids)
    place = torch.tensor([line * width + t for line, (_, positions, _) in enumerate(items) for t in positions])
    return dict(input_ids=input_ids, place=place, labels=torch.tensor([row for _, _, rows in items for row in rows]))


class OnlineHeads(nn.Module):
    """Heads behind the frozen base model, which runs without gradient at every step."""

    def __init__(self, base, heads_with_loss: HeadsWithLoss):
        super().__init__()
        self.base = (base,)  # in a tuple: neither trained, nor saved, nor wrapped
        self.inner = heads_with_loss

    def forward(self, input_ids, place, labels):
        with torch.no_grad():
            hidden = self.base[0].base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1)[place]
        soft = {}
        if self.inner.soft_share:
            said = likeliest(self.base[0].get_output_embeddings(), hidden)
            soft = soft_labels(torch.arange(len(hidden), device=hidden.device), labels.shape[1] - 1, *said)
        return self.inner(hidden.to(torch.bfloat16), labels, **soft)


class JsonLines(TrainerCallback):
    """Every log record as a line of ``log.jsonl`` in the output folder."""

    def __init__(self, file: Path):
        self.file = file

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            with self.file.open("a") as handle:
                handle.write(json.dumps({"step": state.global_step} | logs) + "\n")


def estimate(config, positions: int) -> dict[str, float]:
    """Gigabytes of the cached states of so many positions, and of the base model's weights in bf16."""
    text = config.get_text_config()
    width, layers = text.hidden_size, text.num_hidden_layers
    inner = getattr(text, "intermediate_size", 4 * width)
    heads = getattr(text, "num_attention_heads", 1)
    ratio = getattr(text, "num_key_value_heads", heads) / heads
    block = width * width * (2 + 2 * ratio) + 3 * width * inner
    return dict(states=positions * width * 2 / 1e9, weights=(layers * block + 2 * text.vocab_size * width) * 2 / 1e9)


def run(options: HeadOptions, training: TrainingArguments) -> dict:
    """Train heads as asked; returns the last log records and the held-out accuracy of each head.

    Interrupted and started again with the same options it goes on from the last checkpoint in
    ``output_dir/checkpoints``.
    """
    check_before_the_first_step(options, training)
    out = Path(training.output_dir)
    training.output_dir = str(out / "checkpoints")
    training.remove_unused_columns, training.label_names = False, ["labels"]
    rows = load_answers(options.data_path, loops=False)
    held_out = [row for row in rows if row["split"] == "calibration"]
    rows = [row for row in rows if row["split"] == "train"]
    if not rows:
        raise InputError(f"'{options.data_path}' has no answers of the split 'train'")
    model, tokenizer = load(options, training)
    require_chat_template(tokenizer)
    vocabulary = draft_vocabulary(tokenizer, rows, options.draft_vocabulary)
    heads = MedusaHeads.for_model(
        model, options.medusa_num_heads, options.medusa_num_layers, options.own_projection, options.see_path, vocabulary
    )
    positions = sum(row["completion_tokens"] for row in rows)
    sizes = estimate(model.config, positions)
    cached = choose_cached(options, out, sizes["states"])
    if training.process_index == 0:
        how = "cached" if cached else "computed at every step"
        print(
            f"{len(rows):,} conversations, about {positions:,} positions; base model {sizes['weights']:.2f} GB in "
            f"bf16, hidden states {sizes['states']:.2f} GB, {how}",
            flush=True,
        )
    length = options.model_max_length
    with training.main_process_first(desc="hidden states"):
        if cached:
            data = cache_features(model, tokenizer, rows, out / "features" / "train", heads.num_heads, length)
        else:
            data = Conversations(tokenizer, rows, heads.num_heads, length)
        judge = (
            cache_features(model, tokenizer, held_out, out / "features" / "held_out", heads.num_heads, length)
            if held_out
            else None
        )
    with in_float32(heads):
        inner = HeadsWithLoss(heads, options.depth_decay, options.soft_share)
        trainer = HeadsTrainer(
            inner if cached else OnlineHeads(model, inner),
            training,
            train_dataset=data,
            data_collator=(lambda batch: batch) if cached else collate,
            callbacks=[JsonLines(out / "log.jsonl")],
        )
        checkpoints = Path(training.output_dir)
        trainer.train(resume_from_checkpoint=get_last_checkpoint(checkpoints) if checkpoints.is_dir() else None)
        whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # gathers what ZeRO or FSDP has split
    result = dict(log=[record for record in trainer.state.log_history if "loss" in record][-3:])
    if trainer.is_world_process_zero():
        prefix = "heads." if cached else "inner.heads."
        state = {name.removeprefix(prefix): tensor for name, tensor in whole.items() if name.startswith(prefix)}
        blocks = set() if options.medusa_num_layers else {"weight", "bias"}  # empty where there are no plain blocks
        if {name for name, tensor in state.items() if tensor.numel() == 0} - blocks:
            raise InputError("the trained heads came back as empty shards; nothing was saved over earlier heads")
        heads.load_state_dict(state)
        heads.save_pretrained(out)
        if judge is not None:
            result["accuracy"] = accuracy(rank_table(heads, judge))
            calibrate(heads, judge, tokenizer, held_out, rows).save(out)
    return result


def load(options: HeadOptions, training: TrainingArguments):
    """The frozen base model on this process's device, quantised if asked, and its tokenizer."""
    device = training.device
    if options.load_in not in ("8bit", "4bit"):
        return load_base_model(options.model_name_or_path, device, options.load_in, options.trust_remote_code)
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    quantised = BitsAndBytesConfig(load_in_8bit=options.load_in == "8bit", load_in_4bit=options.load_in == "4bit")
    source = dict(trust_remote_code=options.trust_remote_code)
    model = AutoModelForCausalLM.from_pretrained(
        options.model_name_or_path,
        quantization_config=quantised,
        use_safetensors=True,
        device_map={"": device},
        **source,
    )
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(options.model_name_or_path, **source)


def choose_cached(options: HeadOptions, folder: Path, gigabytes: float) -> bool:
    """Whether the states are cached on disk: as asked, or if at most half of the free space is needed."""
    if options.states != "auto":
        return options.states == "cached"
    disk = os.statvfs(folder)
    return gigabytes * 1e9 < disk.f_bavail * disk.f_frsize / 2


def main(arguments: list[str] | None = None) -> int:
    """The command line's entry; bad input prints one sentence and returns 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments in (["--help"], ["-h"], []):
        print(__doc__)
        for name, option in HeadOptions.__dataclass_fields__.items():
            print(f"  {name:22} {option.metadata['help']}")
        print("  ... and every option of transformers.TrainingArguments")
        return 0 if arguments else 2
    try:
        result = run(*parse(arguments))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(result, indent=2))
    return 0
