"""The README's figures: written from a run's ``results.json`` by this module, never by hand."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat

from medusa_nb.base_model import ROOT
from medusa_nb.errors import InputError
from medusa_nb.walk import DOMAINS
from medusa_nb.walk_map import save_map

README, RESULTS = ROOT / "README.md", ROOT / "data" / "results.json"
FIGURE, MAP = ROOT / "data" / "figures" / "walk.png", ROOT / "data" / "figures" / "map.png"
CARD, RECIPE = ROOT / "data" / "README.md", ROOT / "data" / "base_model_report.json"
FOLDED, WORD = re.compile(r"<details>.*?</details>", re.DOTALL), re.compile(r"[A-Za-z]\w*")
WORDS_A_MINUTE = 150  # a calm voice
START, END = "<!-- written by medusa_nb.report: {name} -->", "<!-- end of {name} -->"
LESSONS = {
    "01": "one forward pass over many tokens costs hardly more than over one: that slack is what speculation spends",
    "02": "heads must learn what *this* model says, in the domain it will be used in",
    "03": "head k reads the hidden state of position t and guesses token t+k+2; the base model never changes",
    "04": "guess a tree, check it in one pass, keep the longest right path",
    "05": "every way of decoding side by side, and where the time of a step goes (`make bench`)",
    "06": "memory and time worked out first; a server answers, `torchrun` trains: the road for a model of your own",
    "07": "heads in the formats of TGI, vLLM and transformers, read back as their readers do; a server of your own",
}


def notebook_minutes(executed: Path) -> dict[str, float]:
    """Minutes each notebook in a folder took, from what papermill noted, by its number."""
    minutes = {}
    for path in sorted(executed.glob("*.ipynb")):
        seconds = nbformat.read(path, 4).metadata.get("papermill", {}).get("duration")
        if seconds is not None:
            minutes[path.name[:2]] = round(seconds / 60, 1)
    return minutes


def reading_minutes(notebook: Path) -> float:
    """Minutes to read a notebook aloud: its prose without folded hints and answers, and its code at half the pace."""
    cells = nbformat.read(notebook, 4).cells
    prose = " ".join(FOLDED.sub("", c.source) for c in cells if c.cell_type == "markdown")
    code = " ".join(c.source for c in cells if c.cell_type == "code")
    return (len(WORD.findall(prose)) + 2 * len(WORD.findall(code))) / WORDS_A_MINUTE


def notebook_table(results: dict) -> str:
    """The notebooks, what they teach and how long they took in the run."""
    lines = ["| notebook | you learn | minutes to read | minutes to run, 2 CPU cores |", "|---|---|---|---|"]
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        number, name = path.stem.split("_", 1)
        minutes = results["minutes"].get(number)
        title = f"{number} {name.replace('_', ' ').capitalize()}"
        shown = "" if minutes is None else f"{minutes:.1f}"
        lines.append(
            f"| [{title}](notebooks/{path.name}) | {LESSONS[number]} | {reading_minutes(path):.0f} | {shown} |"
        )
    return "\n".join(lines)


def result_lines(results: dict) -> str:
    """Tokens per pass, speedups, identity, loops, accuracy, distillation and the data lesson of a run."""
    machine = results["machine"]
    about = f"{machine['cores']} cores ({machine['processor']}, torch {machine['torch']})"
    lines = [f"From one run on {about}:", ""]
    lines += ["| | " + " | ".join(DOMAINS) + " |", "|---" * (len(DOMAINS) + 1) + "|"]
    quantities = {
        "tokens per pass": "tokens_per_pass",
        "speedup over `model.generate`": "speedup_vs_generate",
        "speedup over our own loop without guesses": "speedup_vs_greedy_loop",
    }
    for dtype, part in results["speed"].items():
        for name, key in quantities.items():
            values = (part.get(domain, {}).get(key) for domain in DOMAINS.values())
            cells = " | ".join("" if value is None else f"{value:.2f}" for value in values)
            lines.append(f"| {name}, {dtype} | {cells} |")
    same = []
    for dtype, part in results["speed"].items():
        found = part["identical_to_greedy"]
        gaps = f" (logit gap at each first difference: {found['gaps']})" if found["gaps"] else ""
        same.append(f"{dtype}: {found['identical']} of {found['prompts']} texts identical to plain decoding{gaps}")
    loops = next(iter(results["speed"].values()))["loop_share"]
    scores = {"heads": results["accuracy"], "plain heads": results["accuracy_plain"]}
    accuracy = "; ".join(
        f"{name} " + ", ".join("{top1:.2f} / {top5:.2f}".format(**score) for score in values)
        for name, values in scores.items()
    )
    distillation, lesson = results["distillation"], results["trained_on"]
    lines += ["", ". ".join(same) + f". {loops:.0%} of the answers loop."]
    lines += [f"Held-out top-1 / top-5: {accuracy}."]
    lines += [
        f"Distillation: {distillation['batched']:,} tokens/s in batches, {distillation['one_by_one']:,} one by one.",
        "Tokens per pass of heads trained on "
        + ", ".join(f"{name}: {value:.2f}" for name, value in lesson.items())
        + ".",
    ]
    return "\n".join(lines)


def base_model_facts(report: dict) -> str:
    """What the recipe of the base model reported: data, training, loss, loops."""
    runs, functions = report["runs"], report["functions"]
    minutes, tokens = sum(r["seconds"] for r in runs) / 60, sum(r["tokens"] for r in runs) / 1e6
    supervised, steps = sum(r["supervised"] for r in runs) / 1e6, sum(r["step"] for r in runs)
    lines = ["| | |", "|---|---|", f"| parameters | {report['parameters'] / 1e6:.1f} million |"]
    lines.append(
        f"| functions | {functions['train']:,} for training; {functions['calibration']:,} of the split `calibration` "
        f"and {functions['test']:,} of `test` were never seen |"
    )
    lines.append(
        f"| training | {minutes:.0f} minutes on 2 CPU cores in {len(runs)} runs, {steps:,} steps, {tokens:.1f} million "
        f"tokens, of which {supervised:.1f} million supervised |"
    )
    lines.append(
        f"| loss | **{report['bits_per_byte_test_all_sources']:.3f} bits per byte** on the assistant turns of 2,000 "
        f"random `test` functions of all sources, **{report['bits_per_byte_test_stdlib']:.3f}** on those of the "
        "standard library |"
    )
    share = report["loops_test_stdlib"]
    lines.append(f"| loops | **{share:.1%}** of 200 greedy answers, up to 256 tokens, to stdlib `test` functions |")
    lines.append(f"| valid Python | **{report['valid_test_stdlib']:.1%}** of the same answers |")
    if looked := runs[-1].get("loop_shares"):
        shares = ", then ".join(f"{share:.0%}" for share in looked)
        lines.append(f"| loops during the last run | {shares} of greedy answers to `train` functions |")
    return "\n".join(lines)


def sample_answers(samples: list[dict]) -> str:
    """Answers of the base model to functions that it had never seen, each below its signature."""
    return "\n\n".join(
        f"`{sample['id']}`\n\n```python\n{sample['signature']}\n{sample['answer'].rstrip()}\n```" for sample in samples
    )


def fill(text: str, blocks: dict[str, str]) -> str:
    """A text with its marked blocks written anew."""
    for name, block in blocks.items():
        start, end = START.format(name=name), END.format(name=name)
        if start not in text or end not in text:
            raise InputError(f"there is no block between '{start}' and '{end}'; put the two lines back")
        before, after = text.split(start)[0], text.split(end)[1]
        text = f"{before}{start}\n{block}\n{end}{after}"
    return text


def readme(text: str, results: dict) -> str:
    """The README with the figures of a run."""
    return fill(text, {"notebooks": notebook_table(results), "results": result_lines(results)})


def card(text: str, report: dict) -> str:
    """The base model's card with the figures of its recipe."""
    blocks = {"facts": base_model_facts(report), "samples": sample_answers(report["samples"])}
    read = f"{len(report['picked'])} of {report['answers_read']} answers that were read:"
    return fill(text, blocks | {"picked": f"{read}\n\n{sample_answers(report['picked'])}"})


def draw(results: dict, file: Path) -> None:
    """One picture of the run: what wide passes cost, how fast the decoders are, what leaving the domain costs."""
    from medusa_nb.display import BASE_COLOR, BASELINE, HEAD_COLORS, set_style

    set_style()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 2.6), width_ratios=(1, 1, 1))
    latency = {int(n): t for n, t in results["latency_ms"].items()}
    left.plot(latency.keys(), latency.values(), "o-", color=HEAD_COLORS[0], label="one pass over n tokens")
    left.plot(latency.keys(), [latency[1] * n for n in latency], "--", color=BASELINE, label="n passes of one token")
    left.set(xlabel="n", ylabel="milliseconds", ylim=(0, max(latency.values()) * 1.1))
    left.set_title("a wide pass costs little more …")
    left.legend(loc="lower right")
    dtype, part = next(iter(results["speed"].items()))
    speeds = part.get("tokens_per_second_without_loops", part["tokens_per_second"])
    bars = {name: value / speeds["model.generate"] for name, value in speeds.items()}
    domains = {
        "code, as in training": part["in_domain_without_loops"]["tokens_per_pass"],
        "prose": part["out_of_domain_without_loops"]["tokens_per_pass"],
    }
    for axes, values, unit, title in (
        (middle, bars, f"speed, model.generate = 1 ({dtype}, without loops)", "… so right guesses are speed …"),
        (right, domains, "Medusa's tokens per pass, without loops", "… in the domain that was trained for"),
    ):
        names = list(values)[::-1]
        colors = [HEAD_COLORS[0] if name in ("Medusa", "code, as in training") else BASELINE for name in names]
        axes.bar_label(axes.barh(names, [values[name] for name in names], color=colors), fmt=" %.2f")
        axes.axvline(1, color=BASE_COLOR, lw=1)
        axes.set(xlabel=unit, title=title, xlim=(0, max(values.values()) * 1.2))
        axes.grid(axis="y", visible=False)
    figure.tight_layout(w_pad=2)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=125)
    plt.close(figure)


def publish(out: Path) -> None:
    """Take a learner run's results into ``data/results.json`` and write README and figure from them."""
    results = json.loads((out / "results.json").read_text())
    known = json.loads(RESULTS.read_text()).get("minutes", {}) if RESULTS.exists() else {}
    results["minutes"] = known | notebook_minutes(out)  # a notebook this run left out keeps its minutes
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    README.write_text(readme(README.read_text(), results))
    CARD.write_text(card(CARD.read_text(), json.loads(RECIPE.read_text())))
    draw(results, FIGURE)
    save_map(MAP)
