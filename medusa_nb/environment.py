"""Is this machine ready: versions against requirements.txt, and how long the walk will take."""

from importlib.metadata import PackageNotFoundError, version

from medusa_nb.base_model import ROOT
from medusa_nb.walk import WalkSettings


def check_requirements(file=ROOT / "requirements.txt") -> list[str]:
    """A line for each pinned package: OK, or FAIL with what was found instead."""
    lines = []
    for line in file.read_text().splitlines():
        if "==" not in line or line.startswith("#"):
            continue
        name, wanted = line.strip().split("==")
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "not installed"
        matches = found.split("+")[0] == wanted  # a build tag such as +cpu does not matter
        lines.append(f"{'OK  ' if matches else 'FAIL'} {name} {found}" + ("" if matches else f", {wanted} is pinned"))
    return lines


def estimate_minutes(settings: WalkSettings, latency: dict[int, float]) -> dict[str, float]:
    """Minutes of each notebook, from t(n) of this machine; the factors come from a run of the walk.

    Distillation reads 64 rows a pass; training costs about one such row for each position of each epoch, for two
    kinds of heads; measuring decodes with four decoders in two number formats, and a step is compiled for every
    tree shape and for the plain loop, which takes as long as some thousand eager passes.
    """
    tokens = 0.15 * settings.max_new_tokens  # of an average answer
    answers = settings.train_prompts + settings.calibration_prompts + settings.prose_prompts
    row = latency[64] / 64
    positions = settings.train_prompts * tokens * settings.epochs
    compared = 3 * settings.prose_prompts * tokens * settings.epochs
    compiled = 2 * (len(settings.tree_shapes) + 1)
    decoded = settings.test_prompts * tokens * settings.repeats * 2
    seconds = {
        "01": 10 + 30 * sum(latency.values()),
        "02": 15 + 2.8 * answers * tokens * row,
        "03": 40 + 2.2 * positions * row,
        "04": 80 + 1.3 * compared * row + (3 * decoded + 4000 * compiled) * latency[1],
    }
    return {name: value / 60 for name, value in seconds.items()}
