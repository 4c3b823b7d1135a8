"""What the notebooks share: how large a run is, where its artefacts lie, what ships, and the results record."""

import json
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch

from medusa_nb.base_model import dtype_name, load_base_model, suitable_device, suitable_dtype
from medusa_nb.chat import prompt_ids
from medusa_nb.distillation.prompts import load_prompts
from medusa_nb.distillation.records import load_answers
from medusa_nb.errors import InputError
from medusa_nb.heads import Heads, MedusaHeads
from medusa_nb.heads_file import CONFIG, load_heads
from medusa_nb.measurement.latency import measure_latency
from medusa_nb.measurement.machine import machine
from medusa_nb.storage import build_folder, read_json, require_repository, write_json
from medusa_nb.training.calibration import FILE, Calibration
from medusa_nb.training.features import cache_features
from medusa_nb.training.options import HeadTraining
from medusa_nb.training.train import fit
from medusa_nb.widgets.style import set_style

SCHEMA = 2  # of results.json; raise it when a name changes its meaning
RESULTS = {  # what results.json holds, and which notebook writes it
    "schema": "set-up", "run_id": "set-up", "started": "set-up", "machine": "set-up",
    "game": "01", "latency_ms": "01", "read_ms": "01", "bounds": "01",
    "distillation": "02", "data": "02", "live_equals_shipped": "02",
    "training": "03", "accuracy": "03",
    "speed": "04", "identity": "04", "domains": "04", "lesson": "04", "race": "04", "speed_other_dtype": "04",
    "ladder": "05", "benchmark": "05",
    "minutes": "the run",
}  # fmt: skip


@dataclass(frozen=True)
class WalkSettings:
    """Sizes of a run. The code that runs is the same for all of them."""

    live_prompts: int  # answered in notebook 02; the rest is shipped
    train_conversations: int  # that heads are trained on, live and shipped ones
    held_out_conversations: int
    lesson_positions: int  # for each of the three sets of heads of the lesson
    test_prompts: int  # that speeds are measured on
    lesson_prompts: int  # that tokens per pass are counted on
    max_new_tokens: int
    epochs: float
    repeats: int
    latency_repeats: int
    widths: tuple[int, ...]
    tree_size: int = 16


RUNS = {
    "learner": WalkSettings(
        live_prompts=160,
        train_conversations=1200,
        held_out_conversations=160,
        lesson_positions=20_000,
        test_prompts=12,
        lesson_prompts=48,
        max_new_tokens=160,
        epochs=2,
        repeats=2,
        latency_repeats=20,
        widths=(1, 2, 4, 8, 12, 16, 24, 32, 48, 64),
    ),
    "smoke": WalkSettings(
        live_prompts=6,
        train_conversations=24,
        held_out_conversations=6,
        lesson_positions=300,
        test_prompts=2,
        lesson_prompts=3,
        max_new_tokens=24,
        epochs=1,
        repeats=1,
        latency_repeats=2,
        widths=(1, 8, 16),
        tree_size=8,
    ),
}


@dataclass
class Walk:
    """One run of the walk: its settings, its folder, its record."""

    settings: WalkSettings
    folder: Path

    @property
    def id(self) -> str:
        """The run's id; all notebooks of one run have the same."""
        return self.results()["run_id"]

    @property
    def answers_file(self) -> Path:
        """The answers that notebook 02 has the model give live."""
        return self.folder / "answers.jsonl"

    def results(self) -> dict:
        """The run's record, ``results.json``."""
        return read_results(self.folder / "results.json")

    def record(self, **values) -> None:
        """Add to the run's record; values replace earlier ones of the same name."""
        if unknown := sorted(values.keys() - RESULTS.keys()):
            raise InputError(f"results.json has no entry '{unknown[0]}'; its schema is medusa_nb.course.walk.RESULTS")
        write_json(self.folder / "results.json", self.results() | json.loads(json.dumps(values)))

    def answers(self, split: str) -> list[dict]:
        """Answers without loops to work with: the learner's own from notebook 02 first, then shipped ones."""
        count = dict(train=self.settings.train_conversations, calibration=self.settings.held_out_conversations)[split]
        own = load_answers(self.answers_file, loops=False) if self.answers_file.is_file() else []
        own = [row for row in own if row["split"] == split]
        known = {row["id"] for row in own}
        rest = [row for row in shipped_answers("stdlib", split) if row["id"] not in known]
        return (own + rest)[:count]

    def lesson_answers(self) -> dict[str, list[dict]]:
        """Three sets to learn from: the model's own answers, human ones to the same prompts, own of another domain."""
        own = shipped_answers("stdlib", "train")
        human = {row["id"]: row for row in load_prompts("stdlib", "train")}
        asked = [row for row in own if row["id"] in human]
        return {
            "own answers": asked,
            "human answers": [row | dict(messages=human[row["id"]]["messages"], finish_reason="stop") for row in asked],
            "own answers, other domain": shipped_answers("everyday", "train"),
        }

    def student(self, model, tokenizer, name: str, rows: list[dict]) -> MedusaHeads:
        """Plain heads trained on ``lesson_positions`` positions of some answers, for the lesson's comparison."""
        folder, positions = self.folder / "lesson" / name.replace(" ", "_"), self.settings.lesson_positions
        rows = rows[:: max(1, len(rows) * 60 // positions)]  # answers have more than 60 tokens on average
        features = cache_features(model, tokenizer, rows, folder)
        if len(features) < positions:
            raise InputError(f"{name} give {len(features):,} positions, {positions:,} are needed for a fair comparison")
        features = features.chosen(torch.arange(positions))
        options = HeadTraining(output_dir=str(folder / "heads"), num_train_epochs=self.settings.epochs,
                               use_cpu=model.device.type == "cpu")  # fmt: skip
        print(f"{name}: {positions:,} positions")
        heads = MedusaHeads(model, 4)
        fit(heads, features, options, model, tokenizer, rows)
        return heads

    def prompts(self, tokenizer, source: str = "stdlib", count: int | None = None, at_least: int = 0) -> list:
        """Held-out prompts as token ids ``[1, T]``; ``at_least`` tokens must the shipped answer have."""
        rows = [row for row in shipped_answers(source, "test") if row["completion_tokens"] >= at_least]
        rows = rows[:: max(1, len(rows) // count)][:count] if count else rows
        return [torch.tensor([prompt_ids(tokenizer, row["messages"][:1])]) for row in rows]

    def heads(self, kind: str, model) -> tuple[Heads, Calibration]:
        """The learner's heads of a kind (``plain``, ``full``) if notebook 03 has made them, else the shipped ones.

        Prints which.
        """
        folder = self.folder / kind
        if (folder / CONFIG).is_file() and (folder / FILE).is_file():
            print(f"{kind} heads: yours, trained in notebook 03")
        else:
            print(f"{kind} heads: ours, shipped in data/heads")
            folder = shipped(f"heads/{kind}")
        return load_heads(folder, model), Calibration.load(folder)

    def latency(self, model) -> dict[int, float]:
        """t(n) in seconds of the eager loop, as notebook 01 measured it in this run, else measured now."""
        known = self.results().get("latency_ms", {}).get("eager")
        if known:
            return {int(n): ms / 1e3 for n, ms in known.items()}
        return measure_latency(model, self.settings.widths, repeats=self.settings.latency_repeats)

    def in_other_dtype(self, model) -> tuple:
        """The base model in fp32 (bf16, if the run uses fp32), and its plain and full heads, each with calibration."""
        other, _ = load_base_model(
            model.config.name_or_path, dtype="bfloat16" if model.dtype == torch.float32 else "float32"
        )
        return other, self.heads("plain", other), self.heads("full", other)


def start(run: str = "learner", work: str = "", base_model: str = "", dtype: str = "") -> tuple:
    """What every notebook begins with: the walk, the frozen base model, its tokenizer.

    The number format is chosen once for a run (by :func:`suitable_dtype`, or ``dtype``), written down, and obeyed by
    all notebooks of the run.

    Args:
        run: ``"learner"`` or ``"smoke"``.
        work: where artefacts go; ``build/walk/<run>`` by default.
        base_model: folder or hub id; the packaged model by default.
    """
    if run not in RUNS:
        raise InputError(f"unknown run '{run}'; choose one of {', '.join(RUNS)}")
    folder = Path(work) if work else build_folder() / "walk" / run
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    if not file.exists():
        about = machine() | dict(dtype=dtype or dtype_name(suitable_dtype(suitable_device())))
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        write_json(file, dict(schema=SCHEMA, run_id=uuid.uuid4().hex[:8], started=moment, machine=about))
    chosen = read_results(file)["machine"]["dtype"]
    if dtype and dtype != chosen:
        raise InputError(f"this run was started in {chosen}; name another folder with `work`, or delete '{folder}'")
    set_style()
    model, tokenizer = load_base_model(base_model or None, dtype=chosen)
    return Walk(RUNS[run], folder), model, tokenizer


def read_results(file: Path) -> dict:
    """A run's record.

    Raises:
        InputError: there is none, or it is of another version of this repository.
    """
    results = read_json(file)
    if results.get("schema") != SCHEMA:
        raise InputError(f"'{file}' is of another version (schema {results.get('schema')}, not {SCHEMA}); delete it")
    return results


def shipped(name: str) -> Path:
    """A file or folder in ``data/``."""
    return require_repository("what ships in data/") / "data" / name


def shipped_answers(source: str, split: str | None = None, loops: bool = False) -> list[dict]:
    """The model's answers to all prompts of a source (``stdlib``, ``everyday``), as they ship."""
    return load_answers(shipped(f"answers/{source}.jsonl.gz"), split, loops)


def shipped_heads(kind: str, model) -> tuple[Heads, Calibration]:
    """The heads of a kind (``plain``, ``full``) that ship, with their calibration."""
    folder = shipped(f"heads/{kind}")
    return load_heads(folder, model), Calibration.load(folder)
