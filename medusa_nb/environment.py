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
    """Minutes of each notebook, from t(n) of this machine.

    Distillation and hidden states read 64 rows a pass; training costs about as much as four such rows
    for each position of each epoch, for two kinds of heads; measuring decodes with four decoders in two number
    formats and compiles a step for every tree size, a dozen seconds each.
    """
    tokens = 0.4 * settings.max_new_tokens  # of an average answer
    answers = settings.train_prompts + settings.calibration_prompts + settings.prose_prompts
    row = latency[64] / 64
    positions = 0.3 * settings.train_prompts * tokens * settings.epochs  # without the answers that loop
    compared = 3 * 0.3 * settings.comparison_conversations * tokens * settings.epochs
    decoded = settings.test_prompts * tokens * settings.repeats * 4 * 2
    seconds = {
        "01": 10 + 30 * sum(latency.values()),
        "02": 15 + 2 * answers * tokens * row,
        "03": 15 + 2 * 4 * positions * row,
        "04": 20 + 4 * compared * row + decoded * latency[1] + 2 * 12 * (len(settings.tree_shapes) + 1),
    }
    return {name: value / 60 for name, value in seconds.items()}
