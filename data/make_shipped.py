"""What ships beside this file, made by one command (``make shipped``): answers, heads, the curve over data.

``--limit 40 --out FOLDER`` is a short run of the same code that leaves what ships alone.
"""

import argparse
import gzip
import json
import shutil
from pathlib import Path

import torch

from medusa_nb.base_model import dtype_name, eos_token_ids, load_base_model
from medusa_nb.chat import prompt_ids
from medusa_nb.decoding import Decoder
from medusa_nb.distillation.in_process import DistillationSettings, distil
from medusa_nb.distillation.prompts import load_prompts
from medusa_nb.distillation.records import load_answers
from medusa_nb.heads_file import CONFIG, WEIGHTS, load_heads
from medusa_nb.measurement.machine import machine
from medusa_nb.measurement.timing import decode_all, tokens_interval
from medusa_nb.storage import build_folder, write_json
from medusa_nb.training.calibration import FILE, Calibration
from medusa_nb.training.options import HeadTraining
from medusa_nb.training.train import train_heads

KINDS = dict(plain="medusa", full="path")
SHARES = (1 / 16, 1 / 4, 1)  # of the training answers, for the curve
EPOCHS = 3


def make(out: Path, limit: int | None) -> dict:
    """Answer the prompts, train both kinds of heads on all of the answers and on parts, and measure them."""
    work = build_folder() / "shipped" if limit is None else out / "work"
    model, tokenizer = load_base_model()
    report: dict = dict(machine=machine(), dtype=dtype_name(model.dtype), answers={}, heads={})
    for source in ("stdlib", "everyday"):
        file, prompts = work / f"{source}.jsonl", load_prompts(source, limit=limit)
        distil(model, tokenizer, prompts, file, DistillationSettings(), states=work / "states")
        report["answers"][source] = describe(load_answers(file))
        target = out / "answers" / f"{source}.jsonl.gz"
        target.parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as plain, gzip.GzipFile(target, "wb", 9, mtime=0) as packed:
            shutil.copyfileobj(plain, packed)
    for name, kind in KINDS.items():
        report["heads"][name] = {}
        for share in SHARES:
            folder = work / f"{name}_{round(1 / share)}"
            trained = train_share(model, tokenizer, work, folder, kind, share)
            figures = {figure: trained[figure] for figure in ("conversations", "positions", "accuracy")}
            report["heads"][name][f"{share:g}"] = figures | measure(model, tokenizer, folder, work / "stdlib.jsonl")
        target = out / "heads" / name
        target.mkdir(parents=True, exist_ok=True)
        for file_name in (CONFIG, WEIGHTS, FILE):
            shutil.copy(folder / file_name, target / file_name)
    write_json(out / "shipped.json", report)
    return report


def describe(rows: list[dict]) -> dict:
    """Counts, median length, and the shares that loop and that the limit cut."""
    lengths = sorted(row["completion_tokens"] for row in rows)
    splits = {split: sum(row["split"] == split for row in rows) for split in ("train", "calibration", "test")}
    loops, cut = sum(row["loop"] for row in rows), sum(row["finish_reason"] == "length" for row in rows)
    shares = dict(loops=round(loops / len(rows), 4), cut=round(cut / len(rows), 4))
    return splits | dict(tokens=sum(lengths), median_tokens=lengths[len(lengths) // 2]) | shares


def train_share(model, tokenizer, work: Path, folder: Path, kind: str, share: float) -> dict:
    """Train heads on a share of the training answers, evenly spread."""
    rows = load_answers(work / "stdlib.jsonl")
    train_rows = [row for row in rows if row["split"] == "train"][:: round(1 / share)]
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "answers.jsonl.gz"
    with gzip.open(data, "wt", encoding="utf-8") as handle:
        for row in train_rows + [row for row in rows if row["split"] == "calibration"]:
            handle.write(json.dumps(row) + "\n")
    options = HeadTraining(output_dir=str(folder), data_path=str(data), kind=kind, num_train_epochs=EPOCHS,
                           features=str(work / f"features_{round(1 / share)}"),
                           kept_states=str(work / "states"), use_cpu=model.device.type == "cpu")  # fmt: skip
    return train_heads(options, model, tokenizer)


def measure(
    model, tokenizer, folder: Path, answers: Path, prompts: int = 100, size: int = 16, tokens: int = 160
) -> dict:
    """Tokens per pass on held-out prompts, without the answers that loop."""
    heads, known = load_heads(folder, model), Calibration.load(folder)
    rows = load_answers(answers, "test")[:prompts]
    ids = [torch.tensor([prompt_ids(tokenizer, row["messages"][:1])]) for row in rows]
    plain = hasattr(heads, "limited_to")
    tree = dict(heads=heads, tree=known.tree(size)) if plain else dict(draft=known.growing_tree(heads, size))
    decoder = Decoder(model, max_length=max(x.shape[1] for x in ids) + tokens, slots=16, **tree)
    timing = decode_all(decoder, ids, tokens, eos_token_ids(model, tokenizer)).without_loops()
    interval = [round(x, 3) for x in tokens_interval(timing)]
    return dict(
        tokens_per_pass=round(timing.tokens_per_pass(), 3),
        tokens_per_pass_interval=interval,
        prompts=len(timing.counted),
    )


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--limit", type=int, help="at most this many prompts of each source; needs --out")
    options.add_argument("--out", type=Path, help="where to put it, by default data/")
    given = options.parse_args()
    if given.limit and not given.out:
        options.error("--limit would replace what ships by a short run; name another folder with --out")
    make(given.out or Path(__file__).parent, given.limit)
