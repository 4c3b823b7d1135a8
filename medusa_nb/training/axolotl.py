"""Head training inside axolotl 0.19, the tutorial's other road: ``plugins: [medusa_nb.training.axolotl.MedusaPlugin]``.

axolotl reads the conversations, says which tokens are the model's own (``labels``), and runs its loop; the heads,
their loss and their files are this package's. Needs an environment of its own, which `make axolotl` makes.
"""

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from medusa_nb.errors import InputError
from medusa_nb.heads import MedusaHeads
from medusa_nb.heads_file import save_heads
from medusa_nb.path_heads import PathHeads
from medusa_nb.storage import write_text
from medusa_nb.training.calibration import calibrate
from medusa_nb.training.features import IGNORED, Supervised, cache_features, head_labels
from medusa_nb.training.loss import HeadsWithLoss, accuracy, rank_table
from medusa_nb.training.train import HeadsTrainer, JsonLines, OnlineHeads, answers_by_split, collate, in_float32

try:
    from axolotl.integrations.base import BasePlugin
except ImportError:  # so that loss, labels and refusals are tested, and answers split, without axolotl
    BasePlugin = object

REFUSED = {
    "the base model stays as it is": "adapter lora_model_dir relora unfrozen_parameters fix_untrained_tokens tokens "
    "added_tokens_overrides resize_token_embeddings_to_32x shrink_embeddings reinit_weights qat lisa_n_layers "
    "neftune_noise_alpha",
    "nothing is back-propagated through the base model, and its own loss is not computed": "gradient_checkpointing "
    "activation_offloading layer_offloading chunked_cross_entropy use_eaft orpo_alpha rl "
    "reward_model process_reward_model trainer_cls do_bench_eval do_causal_lm_eval generate_samples",
    "each conversation is a row of its own, padded by the plugin": "sample_packing eval_sample_packing "
    "pad_to_sequence_len pretraining_dataset streaming processor_type",
    "it was never tried with this plugin": "load_in_8bit load_in_4bit gptq model_quantization_config fp8 torch_compile "
    "deepspeed fsdp fsdp_config dp_shard_size tensor_parallel_size context_parallel_size sequence_parallel_degree "
    "expert_parallel_size use_ray",
    "the folder holds heads, not a model; publish with `medusa-nb export --push`": "hub_model_id",
}


class MedusaArgs(BaseModel):
    """The plugin's keys in axolotl's YAML."""

    medusa_num_heads: int = Field(default=4, ge=1)  # K
    medusa_num_layers: int = Field(default=1, ge=1)  # residual blocks per head
    medusa_own_projection: bool = False  # a projection per head (the format's version 1)
    medusa_kind: Literal["medusa", "path"] = "medusa"  # path: heads that see the path, for no server
    medusa_depth_decay: float = Field(default=0.8, gt=0)  # weight of head k in the loss: this to the power k
    medusa_soft_share: float = Field(default=0.5, ge=0, le=1)  # part of the loss on the base model's probabilities
    medusa_answers: str | None = None  # answers from `distill`; the held-out ones calibrate the tree


def refuse(cfg: dict) -> None:
    """Raise :class:`InputError` for an option that this plugin would have to ignore, and for a misspelt one of its own.

    axolotl drops keys that it does not know without a word.
    """
    for reason, names in REFUSED.items():
        for name in names.split():
            if cfg.get(name):
                raise InputError(f"'{name}' is not an option when heads are trained: {reason}; leave it out")
    for name in cfg:
        if name.startswith("medusa_") and name not in MedusaArgs.model_fields:
            raise InputError(f"unknown option '{name}'; choose one of {', '.join(MedusaArgs.model_fields)}")


class OwnWords:
    """Collator: rows with ``input_ids [T]`` and ``labels [T]`` become what :class:`OnlineHeads` reads.

    A label other than -100 marks a token as the model's own, whatever made it so (``roles_to_train``,
    ``train_on_inputs``, ...); which head learns which token from that is :func:`head_labels`'s business.

    Args:
        tokenizer, layout: what axolotl hands every collator; rows need no padding to a multiple here.
        num_heads: K.
    """

    def __init__(self, tokenizer, num_heads: int, **layout):
        self.num_heads = num_heads

    def __call__(self, rows: list[dict]) -> dict:
        items = []
        for row in rows:
            ids, own = list(map(int, row["input_ids"])), [label != IGNORED for label in row["labels"]]
            items.append(Supervised(ids, own, *head_labels(ids, own, self.num_heads)))
        if not any(item.positions for item in items):
            raise InputError("no token of this batch is the model's own; are there assistant turns?")
        return collate(items)


class HeadsOverBase:
    """Mixed into a Trainer: takes a base model, freezes it, and lets the Trainer train fresh heads behind it.

    Args:
        model: the base model as axolotl loaded it.
        args: training arguments; the base model goes to their device.
    """

    medusa = MedusaArgs()

    def __init__(self, model, args, **rest):
        base, m = model.to(args.device).eval().requires_grad_(False), self.medusa
        if m.medusa_kind == "path":
            self.heads = PathHeads(base, m.medusa_num_heads)
        else:
            self.heads = MedusaHeads(base, m.medusa_num_heads, m.medusa_num_layers, m.medusa_own_projection)
        self.float32 = ExitStack()
        self.float32.enter_context(in_float32(self.heads))
        # axolotl saves the model it loaded at the end and on Ctrl-C; what there is to save are the heads
        base.save_pretrained = lambda folder, **options: save_heads(self.heads, folder)
        inner = HeadsWithLoss(self.heads, m.medusa_depth_decay, m.medusa_soft_share, base.dtype)
        super().__init__(model=OnlineHeads(base, inner), args=args, **rest)


class MedusaPlugin(BasePlugin):
    """What axolotl calls, in this order; see its ``BasePlugin``."""

    def register(self, cfg):
        refuse(cfg)

    def get_input_args(self):
        return f"{__name__}.{MedusaArgs.__name__}"

    def get_trainer_cls(self, cfg):
        from axolotl.core.trainers import AxolotlTrainer

        options = MedusaArgs(**{name: cfg[name] for name in MedusaArgs.model_fields if cfg[name] is not None})
        return type("MedusaTrainer", (HeadsOverBase, HeadsTrainer, AxolotlTrainer), dict(medusa=options))

    def get_collator_cls_and_kwargs(self, cfg, is_eval=False):
        return OwnWords, dict(num_heads=cfg.medusa_num_heads)

    def post_trainer_create(self, cfg, trainer):
        if not isinstance(trainer, HeadsOverBase):
            raise InputError("another plugin brought a trainer of its own; list only the Medusa plugin")
        self.trainer = trainer

    def add_callbacks_post_trainer(self, cfg, trainer):
        return [JsonLines(Path(cfg.output_dir) / "log.jsonl")]

    def post_train(self, cfg, model):
        self.trainer.float32.close()  # the heads are saved in the base model's dtype

    def post_train_unload(self, cfg):
        """With ``medusa_answers``: accuracy on the held-out ones, and the calibration that our decoder chooses by."""
        if cfg.medusa_answers and self.trainer.is_world_process_zero():
            tokenizer, heads, base = self.trainer.processing_class, self.trainer.heads, self.trainer.model.base[0]
            train, held_out = answers_by_split(cfg.medusa_answers)
            judge = cache_features(base, tokenizer, held_out, Path(cfg.output_dir) / "features", heads.num_heads)
            ranks = rank_table(heads, judge)
            calibrate(heads, ranks, tokenizer, held_out, train).save(cfg.output_dir)
            print(json.dumps(dict(accuracy=accuracy(ranks))))


def write_splits(file: str | Path, folder: str | Path) -> None:
    """Write ``train.jsonl`` and ``held_out.jsonl``: axolotl cannot choose rows of a file by a field."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "held_out"), answers_by_split(file), strict=True):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(Path(folder) / f"{name}.jsonl", text)


if __name__ == "__main__":
    try:
        write_splits(*sys.argv[1:])
    except (InputError, TypeError) as error:
        sys.exit(f"error: {error}\nusage: python -m medusa_nb.training.axolotl ANSWERS.jsonl FOLDER")
