"""Medusa in notebooks: train Medusa heads on a frozen language model and measure what they gain.

The public names are loaded when they are asked for: ``from medusa_nb import load_base_model, MedusaHeads, Decoder``.
"""

import importlib

__version__ = "0.2.0"

_WHERE = {
    "base_model": ("load_base_model", "eos_token_ids"),
    "chat": ("encode_conversation", "prompt_ids"),
    "heads": ("MedusaHeads",),
    "path_heads": ("PathHeads",),
    "heads_file": ("load_heads", "save_heads"),
    "tree": ("Tree", "build_tree", "count_ranks", "expected_tokens"),
    "drafting": ("StaticTree", "GrowingTree"),
    "decoding": ("Decoder", "Generation"),
    "sampling": ("Sampler",),
    "distillation.prompts": ("load_prompts",),
    "distillation.in_process": ("distil", "DistillationSettings"),
    "distillation.servers": ("distil_from_servers", "ServerSettings"),
    "distillation.records": ("load_answers",),
    "training.features": ("cache_features", "head_labels", "Features"),
    "training.options": ("HeadTraining",),
    "training.train": ("train_heads", "fit"),
    "training.loss": ("rank_table", "accuracy"),
    "training.calibration": ("Calibration",),
    "measurement.timing": ("compare", "decode_with", "speedup", "transformers_generate"),
    "measurement.latency": ("measure_latency",),
}
_MODULE = {name: module for module, names in _WHERE.items() for name in names}
__all__ = sorted(_MODULE)


def __getattr__(name: str):
    if name not in _MODULE:
        raise AttributeError(f"module 'medusa_nb' has no attribute '{name}'")
    return getattr(importlib.import_module(f"medusa_nb.{_MODULE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
