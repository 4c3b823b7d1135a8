"""Training the heads on cached hidden states, with ``transformers.Trainer``.

The loss is cross entropy of each head against the token it should have guessed, weighted by depth
(Cai et al., arXiv 2401.10774, section 2.2.1), and in part against what else the base model thought likely there
(soft labels, Hinton et al., arXiv 1503.02531). The base model is not part of what is trained.
"""

import copy
import json
import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import get_last_checkpoint

from medusa_nb.errors import InputError
from medusa_nb.features import IGNORED, Features
from medusa_nb.heads import MedusaHeads
from medusa_nb.progress import is_headless

NEVER = 2**30  # the rank of a token that heads with a draft vocabulary do not guess


@dataclass(frozen=True)
class TrainingSettings:
    """The tutorial's options that matter for heads; ``batch_size`` counts positions.

    ``soft_share`` is the part of the loss that looks at the base model's probabilities of several tokens; 0 is plain
    Medusa: only the token that it said counts.
    """

    epochs: float = 3
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    depth_decay: float = 0.8
    soft_share: float = 0.5
    logging_steps: int = 20
    save_steps: int = 200
    seed: int = 0


class HeadsWithLoss(nn.Module):
    """Heads as ``Trainer`` wants them: ``forward`` returns a loss; statistics are kept beside it.

    ``soft_share``: see :class:`TrainingSettings`. ``bf16``: multiply in bf16, as a base model of that dtype does;
    weights and losses stay in fp32.
    """

    def __init__(self, heads: MedusaHeads, depth_decay: float, soft_share: float = 0.0, bf16: bool = False):
        super().__init__()
        if not 0 <= soft_share <= 1:
            raise InputError(f"soft_share={soft_share}; choose a number from 0 (labels only) to 1 (soft labels only)")
        self.heads, self.depth_decay, self.soft_share, self.bf16 = heads, depth_decay, soft_share, bf16

    def forward(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        likely: torch.Tensor | None = None,
        probabilities: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """``hidden [B, D]``, ``labels [B, K + 1]`` (column 0 is the base model's own next token), and for each head
        what :func:`~medusa_nb.features.soft_labels` found likely, ``[B, K, M]``."""
        hidden = hidden.to(self.heads.weight.dtype)
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.heads(hidden, path=labels[:, :-1].clamp(min=0))  # [K, B, V]
        soft, count = None, len(logits)
        if self.soft_share:
            places = self.heads.places(likely[:, :count])
            soft = places.clamp(min=0), self.soft_share * probabilities[:, :count].masked_fill(places < 0, 0)
        places = self.heads.places(labels[:, 1 : count + 1])
        losses, _ = head_losses(logits, places.masked_fill(places < 0, IGNORED), soft)
        decay = self.depth_decay ** torch.arange(len(losses), device=losses.device)
        return dict(loss=(losses * decay).sum(), head_loss=losses.detach(), logits=logits.detach(), places=places)


def head_losses(
    logits: torch.Tensor, labels: torch.Tensor, soft: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross entropy of each head over its supervised positions.

    Args:
        logits: ``[K, B, V]``.
        labels: ``[B, K]``, places among the V logits; :data:`IGNORED` where there is nothing to guess.
        soft: places and weights ``[B, K, M]`` of further tokens to guess; the label has the rest of the weight 1.

    Returns:
        Losses ``[K]`` (0 for a head without a label in this batch) and the number of labels ``[K]``.

    Raises:
        InputError: no head has any label: the mean would be NaN.
    """
    used = (labels != IGNORED).sum(0)
    divisor = mean_over_processes(used)
    if not divisor.any():
        raise InputError(
            "every label of this batch is ignored; the conversations have no answers long enough to guess in"
        )
    log_probs = logits.float().log_softmax(-1)
    gold = labels.clamp(min=0).unsqueeze(-1)  # [B, K, 1]
    if soft is None:
        losses = -log_probs.gather(-1, gold.transpose(0, 1))[..., 0]
    else:
        ids, weights = soft
        ids = torch.cat([gold, ids], -1).transpose(0, 1)
        weights = torch.cat([1 - weights.float().sum(-1, keepdim=True), weights], -1).transpose(0, 1)
        losses = -(weights * log_probs.gather(-1, ids)).sum(-1)
    losses = losses.masked_fill(labels.T == IGNORED, 0.0)
    return losses.sum(1) / divisor.clamp(min=1 / world_size()), used


def mean_over_processes(used: torch.Tensor) -> torch.Tensor:
    """Labels per process on average: what a sum is divided by, so that averaging over processes gives the mean."""
    if world_size() == 1:
        return used
    total = used.clone()
    torch.distributed.all_reduce(total)
    return total / world_size()


def world_size() -> int:
    """How many processes train together."""
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if started else 1


def label_ranks(logits: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Rank of each true token among a head's guesses: ``[K, B, V]``, ``[B, K]`` -> ``[B, K]``.

    ``places`` says where the true tokens' logits stand, see :meth:`MedusaHeads.places`. 0 is the head's best guess; -1
    where there is no label; :data:`NEVER` for a token that it never guesses. Ties count as in ``topk``: earlier places
    first.
    """
    gold = places.T.clamp(min=0).unsqueeze(-1)  # [K, B, 1]
    score = logits.gather(-1, gold)
    earlier = torch.arange(logits.shape[-1], device=logits.device) < gold
    ranks = (logits > score).sum(-1) + ((logits == score) & earlier).sum(-1)
    return torch.where(places == IGNORED, -1, torch.where(places < 0, NEVER, ranks.T))


@torch.inference_mode()
def rank_table(heads: MedusaHeads, features: Features, batch: int = 1024) -> torch.Tensor:
    """``[P, K]``: the rank every head gives the true token at every position, -1 without a label."""
    device, dtype = heads.weight.device, heads.weight.dtype
    table = []
    for start in range(0, len(features), batch):
        rows = features.hidden[start : start + batch].to(device, dtype)
        labels = features.labels[start : start + batch, : heads.num_heads + 1].to(device)
        logits = heads(rows, path=labels[:, :-1].clamp(min=0))
        table.append(label_ranks(logits, heads.places(labels[:, 1:])).cpu())
    return torch.cat(table)


def accuracy(ranks: torch.Tensor, top: tuple[int, ...] = (1, 5)) -> list[dict[str, float]]:
    """Per head: the share of its labels that are among its ``top`` guesses, from :func:`rank_table`."""
    result = []
    for column in ranks.T:
        known = column[column >= 0]
        result.append({f"top{n}": (known < n).float().mean().item() for n in top} | {"labels": len(known)})
    return result


class HeadsTrainer(Trainer):
    """Logs loss, top-1 and top-5 of every head beside the total loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        if model.training and self.state.global_step % self.args.logging_steps == 0:
            ranks = label_ranks(outputs["logits"][:, :128], outputs["places"][:128])
            self.head_log = {}
            for k, scores in enumerate(accuracy(ranks)):
                self.head_log[f"head{k}_loss"] = round(outputs["head_loss"][k].item(), 4)
                self.head_log |= {f"head{k}_{n}": round(scores[n], 4) for n in ("top1", "top5")}
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs, *args, **kwargs):
        super().log(logs | getattr(self, "head_log", {}) if "loss" in logs else logs, *args, **kwargs)


class Bar(ProgressCallback):
    """A progress bar for notebooks, in place of transformers' table with a row for every log step."""

    def on_log(self, args, state, control, **kwargs):
        pass


class NoLastCheckpoint(TrainerCallback):
    """Spare the checkpoint of the very last step: the finished heads are saved instead.

    Coming right behind a periodic one it would also make transformers doubt the file system's clock.
    """

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_save = False


def train_heads(
    heads: MedusaHeads,
    features: Features,
    folder: str | Path,
    settings: TrainingSettings | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> list[dict]:
    """Train ``heads`` in place and save them in ``folder``; returns the log, a record per log step.

    Interrupted and called again it resumes from the last checkpoint in ``folder/checkpoints``, which
    is removed at the end.

    Raises:
        InputError: the features were made for fewer heads or another width, or the checkpoints in
            ``folder`` belong to other settings.
    """
    settings = settings or TrainingSettings()
    folder = Path(folder)
    _refuse_misfit(heads, features)
    _claim(folder, settings, heads, features)
    checkpoints = folder / "checkpoints"
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_ratio,
        weight_decay=settings.weight_decay,
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        save_steps=settings.save_steps,
        save_total_limit=1,
        seed=settings.seed,
        report_to="none",
        remove_unused_columns=False,
        use_cpu=heads.weight.device.type == "cpu",
        dataloader_pin_memory=False,
        disable_tqdm=is_headless(),
    )
    dtype = heads.weight.dtype
    with in_float32(heads):
        trainer = HeadsTrainer(
            HeadsWithLoss(heads, settings.depth_decay, settings.soft_share, bf16=dtype == torch.bfloat16),
            arguments,
            train_dataset=features,
            data_collator=lambda batch: batch,  # Features already returns batches
            callbacks=[NoLastCheckpoint(), *(callbacks or [])],
        )
        trainer.remove_callback(PrinterCallback)
        if DEFAULT_PROGRESS_CALLBACK is not ProgressCallback and not is_headless():  # someone watches a notebook
            trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)
            trainer.add_callback(Bar)
        trainer.train(resume_from_checkpoint=get_last_checkpoint(checkpoints) if checkpoints.is_dir() else None)
    if trainer.is_world_process_zero():
        heads.save_pretrained(folder)
        shutil.rmtree(checkpoints, ignore_errors=True)
    return [record for record in trainer.state.log_history if "loss" in record]


@contextmanager
def in_float32(heads: MedusaHeads):
    """Train in fp32 whatever the base model's dtype: a copy of lm_head, and the heads, are cast and put back."""
    dtype, shared = heads.weight.dtype, heads.shared
    heads.shared = (copy.deepcopy(shared[0]).float().requires_grad_(False), shared[1])
    heads.float().requires_grad_(True).train()
    try:
        yield
    finally:
        heads.to(dtype).requires_grad_(False).eval()
        heads.shared = shared


def _refuse_misfit(heads: MedusaHeads, features: Features) -> None:
    if features.about["hidden_size"] != heads.weight.shape[-1]:
        raise InputError(
            f"the features have hidden size {features.about['hidden_size']}, the heads {heads.weight.shape[-1]}; "
            "compute the features with the heads' own base model"
        )
    if features.about["num_heads"] < heads.num_heads:
        raise InputError(
            f"the features hold labels for {features.about['num_heads']} heads, there are {heads.num_heads}; "
            "compute them with a larger num_heads"
        )


def _claim(folder: Path, settings: TrainingSettings, heads: MedusaHeads, features: Features) -> None:
    """Note the settings of unfinished work; refuse to resume it with others."""
    note = folder / "checkpoints" / "settings.json"
    own = heads.projection is not None
    claim = asdict(settings) | dict(
        heads=heads.num_heads, layers=heads.num_layers, own_projection=own, see_path=heads.sees_path
    )
    claim |= dict(vocabulary=None if heads.vocabulary is None else heads.vocabulary.tolist())
    claim |= dict(features=features.about.get("key"), positions=len(features))
    if note.exists() and json.loads(note.read_text()) != claim:
        raise InputError(
            f"'{note.parent}' holds unfinished training with other settings, heads or features; "
            "finish it with those or delete it"
        )
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(claim))
    except OSError as error:
        raise InputError(f"cannot write to '{folder}': {error.strerror}; choose another folder") from error


if __name__ == "__main__":
    import sys

    from medusa_nb.distributed import main

    sys.exit(main())
