"""What the notebooks share: how large a run is, where its artefacts lie, and the results record."""

import json
from dataclasses import dataclass
from pathlib import Path

from medusa_nb.base_model import ROOT
from medusa_nb.errors import InputError
from medusa_nb.measurement import SHAPES

# what results.json says of the speed in each number format, and on which answers; by the names that tables use
DOMAINS = {
    "in domain, all": "in_domain",
    "without loops": "in_domain_without_loops",
    "out of domain, without loops": "out_of_domain_without_loops",
}


@dataclass(frozen=True)
class WalkSettings:
    """Sizes of a run. The code that runs is the same for all of them."""

    train_prompts: int
    calibration_prompts: int
    prose_prompts: int
    test_prompts: int
    max_new_tokens: int
    epochs: float
    comparison_conversations: int
    repeats: int
    latency_repeats: int
    tree_sizes: tuple[int, ...]
    tree_shapes: tuple[tuple[int, int], ...]
    bench_dtypes: tuple[str, ...]
    race_conversations: int
    server_conversations: int
    learning_rate: float = 2e-3
    ngram_tokens: int = 6


RUNS = {
    "learner": WalkSettings(
        train_prompts=4400,
        calibration_prompts=400,
        prose_prompts=300,
        test_prompts=24,
        max_new_tokens=160,
        epochs=3,
        comparison_conversations=600,
        repeats=3,
        latency_repeats=25,
        tree_sizes=(6, 8, 12, 16),
        tree_shapes=SHAPES,
        bench_dtypes=("float32", "bfloat16"),
        race_conversations=200,
        server_conversations=450,
    ),
    "smoke": WalkSettings(
        train_prompts=48,
        calibration_prompts=12,
        prose_prompts=8,
        test_prompts=3,
        max_new_tokens=48,
        epochs=1,
        comparison_conversations=8,
        repeats=2,
        latency_repeats=3,
        tree_sizes=(6,),
        tree_shapes=((6, 2),),
        bench_dtypes=("float32",),
        race_conversations=8,
        server_conversations=8,
    ),
}


def settings_for(run: str) -> WalkSettings:
    """The sizes of a run by its name."""
    if run not in RUNS:
        raise InputError(f"unknown run '{run}'; choose one of {', '.join(RUNS)}")
    return RUNS[run]


def work_folder(work: str, run: str) -> Path:
    """Where the artefacts of a run lie: ``work`` if given, else ``build/walk/<run>`` in the repository."""
    folder = Path(work) if work else ROOT / "build" / "walk" / run
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def need(path: Path, made_by: str) -> Path:
    """An artefact of an earlier notebook, or a sentence that says which one makes it."""
    if not path.exists():
        raise InputError(f"'{path.name}' is not there yet; run the notebook {made_by} with the same parameters first")
    return path


def record(folder: Path, **results) -> None:
    """Add to the run's ``results.json``; values replace earlier ones of the same name."""
    file = folder / "results.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | results, indent=2, default=str) + "\n")
