"""Head training from answers to calibrated heads on disk, in one place.

Notebook, command, ``torchrun`` and (in parts) axolotl come here. ``transformers.Trainer`` does the work, so
data-parallel training, DeepSpeed ZeRO and FSDP come from there.
"""

import copy
import json
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import BitsAndBytesConfig, PrinterCallback, Trainer, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from medusa_nb.base_model import load_base_model
from medusa_nb.chat import require_chat_template
from medusa_nb.distillation.records import load_answers
from medusa_nb.errors import InputError
from medusa_nb.heads import Heads, MedusaHeads
from medusa_nb.heads_file import save_heads
from medusa_nb.logits import first_line
from medusa_nb.path_heads import PathHeads
from medusa_nb.progress import is_headless
from medusa_nb.storage import append_line, claim, free_disk, read_json, write_json
from medusa_nb.training.calibration import calibrate, draft_vocabulary
from medusa_nb.training.features import (
    Features,
    Supervised,
    cache_features,
    likeliest,
    longest_text,
    refuse_not_finite,
    soft_labels,
    supervise,
)
from medusa_nb.training.loss import HeadsWithLoss, accuracy, label_ranks, rank_table, world_size
from medusa_nb.training.options import QUANTISED, HeadTraining

LAST_WRITTEN = "trainer_state.json"  # of a checkpoint's files; whole if the checkpoint is


def train_heads(
    options: HeadTraining, model=None, tokenizer=None, callbacks: list[TrainerCallback] | None = None
) -> dict:
    """Train heads as ``options`` say, judge them on the answers of the split ``calibration``, and save all of it.

    ``output_dir`` then holds the heads, ``calibration.json``, ``log.jsonl`` and ``report.json``. Interrupted and
    started again with the same options it goes on from the last checkpoint.

    Args:
        model, tokenizer: loaded as ``options`` say if they are not given.

    Returns:
        ``heads``, and a report: ``accuracy`` of each head on held-out answers, ``log``, ``positions``,
        ``conversations``, how many of them were ``cut``, and how many are ``without_answer``.
    """
    out = Path(options.output_dir)
    require_writable(out)
    train_rows, held_out = answers_by_split(options.data_path)
    rehearse(options)
    if model is None:
        model, tokenizer = load_model(options)
    require_chat_template(tokenizer)
    heads = new_heads(options, model, tokenizer, train_rows)
    count, length, kept = heads.num_heads, options.model_max_length, options.kept_states
    features = Path(options.features or out / "features")
    judge = cache_features(model, tokenizer, held_out, features / "calibration", count, length, kept)
    data: Features | Conversations
    if choose_cached(options, model, train_rows):
        data = cache_features(model, tokenizer, train_rows, features / "train", count, length, kept)
    else:
        data = Conversations(*supervise(model, tokenizer, train_rows, count, length))
    counts = {name: data.about[name] for name in ("positions", "cut", "without_answer")}
    if options.process_index == 0 and counts["cut"] + counts["without_answer"]:
        print(
            f"{counts['cut']} of {len(train_rows)} conversations are longer than {longest_text(model, length)} tokens "
            f"and were cut; {counts['without_answer']} have no answer left"
        )
    log = fit(heads, data, options, model, tokenizer, train_rows, callbacks)
    report = dict(log=log[-3:], conversations=len(train_rows)) | counts
    if options.process_index == 0:
        ranks = rank_table(heads, judge)
        report["accuracy"] = accuracy(ranks)
        save_heads(heads, out)
        calibrate(heads, ranks, tokenizer, held_out, train_rows).save(out)
        write_json(out / "report.json", report)
    return report | dict(heads=heads)


def answers_by_split(file: str | Path) -> tuple[list[dict], list[dict]]:
    """Answers to train on and held-out ones of a file from ``distill``, both without loops."""
    rows = load_answers(file, loops=False)
    train_rows, held_out = ([row for row in rows if row["split"] == split] for split in ("train", "calibration"))
    if not train_rows or not held_out:
        raise InputError(
            f"'{file}' has {len(train_rows)} train and {len(held_out)} calibration answers that do not loop; "
            "both are needed"
        )
    return train_rows, held_out


def require_writable(folder: Path) -> None:
    """Raise :class:`InputError` unless files can be written into ``folder``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write to '{folder}': {reason}; choose another output_dir") from error


def rehearse(options: HeadTraining) -> None:
    """Let ``transformers.Trainer`` try the options on one weight, before anything large is loaded.

    Raises:
        InputError: optimizer, schedule, logging or data loading cannot be as the options say.
    """
    try:
        trainer = Trainer(nn.Linear(1, 1), copy.deepcopy(options), _as_it_is, [0, 1])
        trainer.create_optimizer_and_scheduler(100)
        trainer.get_train_dataloader()
    except Exception as error:
        raise InputError(f"the options do not fit: {first_line(error)}") from error


def load_model(options: HeadTraining):
    """The frozen base model on this process's device, quantised if asked, and its tokenizer."""
    name, device = options.model_name_or_path, options.device
    if options.load_in not in QUANTISED:
        return load_base_model(name, device, options.load_in, options.trust_remote_code)
    how = BitsAndBytesConfig(load_in_8bit=options.load_in == "8bit", load_in_4bit=options.load_in == "4bit")
    return load_base_model(
        name, device, None, options.trust_remote_code, quantization_config=how, device_map={"": device}
    )


def new_heads(options: HeadTraining, model, tokenizer, rows: list[dict]) -> Heads:
    """Untrained heads of the kind that ``options`` name."""
    if options.kind == "path":
        vocabulary = draft_vocabulary(tokenizer, rows, options.draft_vocabulary) if options.draft_vocabulary else None
        return PathHeads(model, options.medusa_num_heads, vocabulary)
    return MedusaHeads(model, options.medusa_num_heads, options.medusa_num_layers, options.own_projection)


def choose_cached(options: HeadTraining, model, rows: list[dict]) -> bool:
    """Whether states are cached on disk: as asked, or if at most half of the free space is needed."""
    positions = sum(row["completion_tokens"] for row in rows)
    gigabytes = positions * model.get_output_embeddings().weight.shape[1] * 2 / 1e9
    cached = options.states == "cached"
    if options.states == "auto":
        cached = gigabytes * 1e9 < free_disk(options.output_dir) / 2
    if options.process_index == 0 and not is_headless():
        how = "cached" if cached else "computed at every step"
        print(f"{len(rows):,} conversations, about {positions:,} positions; hidden states {gigabytes:.2f} GB, {how}")
    return cached


def fit(
    heads: Heads,
    data: "Features | Conversations",
    options: HeadTraining,
    model,
    tokenizer=None,
    rows: list[dict] | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> list[dict]:
    """Train ``heads`` in place on :class:`Features` or :class:`Conversations`; returns the log.

    Checkpoints lie in ``output_dir/checkpoints`` until it is done.

    Raises:
        InputError: the features do not fit the heads, or the checkpoints belong to other work.
    """
    out, cached = Path(options.output_dir), isinstance(data, Features)
    step = options.train_batch_size * world_size()
    if options.dataloader_drop_last and len(data) < step:
        raise InputError(
            f"a step takes {step} and there are {len(data)}, which dataloader_drop_last drops; leave it out"
        )
    checkpoints = out / "checkpoints"
    if options.process_index == 0:
        claim(checkpoints, fingerprint_of_work(heads, data, options))
    trained, callbacks = heads, list(callbacks or [])
    watched = bool(callbacks)
    if isinstance(heads, MedusaHeads) and heads.projection is None and options.loss_vocabulary and rows:
        frequent = draft_vocabulary(tokenizer, rows, (options.loss_vocabulary + 1) // 2)
        trained = heads.limited_to(frequent)
        callbacks.append(SampledSoftmax(trained, options.loss_vocabulary, options.seed))
    settings = copy.copy(options)
    settings.output_dir = str(checkpoints)
    with in_float32(heads, trained):
        inner = HeadsWithLoss(trained, options.depth_decay, options.soft_share, model.dtype)
        trainer = HeadsTrainer(
            inner if cached else OnlineHeads(model, inner),
            settings,
            train_dataset=data,
            data_collator=_as_it_is if cached else collate,
            callbacks=[NoLastCheckpoint(), JsonLines(out / "log.jsonl"), *callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        if is_headless() or watched:  # a monitor shows more than a bar, or in notebooks a table, would
            trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)
        trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints))
        whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # gathers what ZeRO or FSDP has split
        if trainer.is_world_process_zero():
            prefix = "heads." if cached else "inner.heads."
            state = {name.removeprefix(prefix): t for name, t in whole.items() if name.startswith(prefix)}
            if any(tensor.numel() == 0 for tensor in state.values()):
                raise InputError("the trained heads came back as empty shards; nothing was saved over earlier heads")
            trained.load_state_dict(state)
    if trainer.is_world_process_zero():
        for state_file in checkpoints.glob(f"*/{LAST_WRITTEN}"):
            state_file.unlink()  # first, so that none looks whole if this is killed halfway
        shutil.rmtree(checkpoints, ignore_errors=True)
        checkpoints.with_name("checkpoints.settings").unlink(missing_ok=True)
    return [record for record in trainer.state.log_history if "loss" in record]


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end, None if there is none.

    Raises:
        InputError: processes on other machines do not see it.
    """
    found = None
    for state in sorted(folder.glob(f"*/{LAST_WRITTEN}"), key=lambda file: int(file.parent.name.split("-")[-1])):
        try:
            read_json(state)
            found = str(state.parent)
        except InputError:
            continue
    everyones = [found] * world_size()
    if world_size() > 1:
        torch.distributed.all_gather_object(everyones, found)
    if len(set(everyones)) > 1:
        raise InputError(
            f"'{folder}' is not the same folder on every machine; name an output_dir that all of them share"
        )
    return found


def fingerprint_of_work(heads: Heads, data, options: HeadTraining) -> dict:
    """What a checkpoint depends on: options, heads and data."""
    names = (
        "num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps learning_rate "
        "lr_scheduler_type warmup_steps weight_decay optim max_grad_norm seed depth_decay soft_share loss_vocabulary"
    )
    work = {name: getattr(options, name) for name in names.split()} | heads.config()
    work |= dict(positions=len(data), draft=None if heads.vocabulary is None else heads.vocabulary.sum().item())
    return json.loads(json.dumps(work, default=str))


@contextmanager
def in_float32(*all_heads: Heads):
    """Train in fp32 whatever the base model's dtype; afterwards the heads have it again."""
    dtype = all_heads[0].dtype
    for heads in all_heads:
        heads.float().requires_grad_(True).train()
    try:
        yield
    finally:
        for heads in all_heads:
            heads.to(dtype).requires_grad_(False).eval()


class HeadsTrainer(Trainer):
    """Logs loss, top-1 and top-5 of every head beside the total loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        if model.training and self.state.global_step % self.state.logging_steps == 0:
            ranks = label_ranks(outputs["logits"][:, :128], outputs["places"][:128])
            self.head_log = {}
            for k, scores in enumerate(accuracy(ranks)):
                self.head_log[f"head{k}_loss"] = round(outputs["head_loss"][k].item(), 4)
                if scores["labels"]:
                    self.head_log |= {f"head{k}_{n}": round(scores[n], 4) for n in ("top1", "top5")}
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs, *args, **kwargs):
        super().log(logs | getattr(self, "head_log", {}) if "loss" in logs else logs, *args, **kwargs)


class NoLastCheckpoint(TrainerCallback):
    """Spare the checkpoint of the very last step: the finished heads are saved instead."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_save = False


class SampledSoftmax(TrainerCallback):
    """Compare with ``count`` tokens only, which is several times as fast: the frequent ones that the heads have so far,
    and others picked at random for every step, so that no token goes unseen (Jean et al., arXiv 1412.2007).
    """

    def __init__(self, heads: MedusaHeads, count: int, seed: int):
        self.heads, self.frequent, self.seed = heads, heads.tokens(torch.arange(heads.num_choices)).cpu(), seed
        rare = torch.ones(len(heads.lm_head.weight), dtype=torch.bool)
        rare[self.frequent] = False
        self.rare, self.count = rare.nonzero()[:, 0], max(0, count - len(self.frequent))
        self.draw(0)

    def draw(self, step: int) -> None:
        generator = torch.Generator().manual_seed(self.seed + step)  # the same in all processes, and after a restart
        drawn = self.rare[torch.randperm(len(self.rare), generator=generator)[: self.count]]
        self.heads.choose_from(torch.cat([self.frequent, drawn]))

    def on_step_begin(self, args, state, control, **kwargs):
        self.draw(state.global_step)


class JsonLines(TrainerCallback):
    """Every log record as a line of ``log.jsonl``; one that goes on from a checkpoint loses what came after it."""

    def __init__(self, file: Path):
        self.file = file

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.file.write_text("")
            for record in state.log_history:
                self._append({"step": record["step"]} | record)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            self._append({"step": state.global_step} | logs)

    def _append(self, record: dict) -> None:
        with self.file.open("a", encoding="utf-8") as handle:
            append_line(handle, record)


class Conversations(Dataset):
    """Whole conversations with an answer, for training that runs the base model at every step."""

    def __init__(self, supervised: list[Supervised], about: dict):
        self.items = [one for one in supervised if one.positions]
        self.about = about

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Supervised:
        return self.items[i]


def collate(items: list[Supervised]) -> dict[str, torch.Tensor]:
    """Right-padded ``input_ids [B, T]``, and for all P supervised positions ``place [P]`` in ``B * T`` and labels."""
    input_ids = pad_sequence([torch.tensor(one.ids) for one in items], batch_first=True)
    width = input_ids.shape[1]
    place = torch.tensor([line * width + t for line, one in enumerate(items) for t in one.positions])
    return dict(input_ids=input_ids, place=place, labels=torch.tensor([row for one in items for row in one.labels]))


def _as_it_is(batch):
    """:class:`Features` already returns whole batches."""
    return batch


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
            refuse_not_finite(hidden, self.base[0])
            soft = {}
            if self.inner.soft_share:
                said = likeliest(self.base[0], hidden)
                soft = soft_labels(torch.arange(len(hidden), device=hidden.device), labels.shape[1] - 1, *said)
        return self.inner(hidden.to(torch.bfloat16), labels, **soft)
