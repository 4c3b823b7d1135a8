"""``medusa-nb COMMAND``: run, distill, train, generate, measure, export, peers, doctor, leaderboard, site, pack."""

import argparse
import errno
import json
import platform
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from medusa_nb.errors import InputError

TREE = 16  # nodes of the tree, unless said otherwise


def main(arguments: list[str] | None = None) -> int:
    """Run one command; bad input prints one sentence and returns 2."""
    options, rest = parser().parse_known_args(arguments)
    if rest and options.command is not command_train:
        parser().error(f"unknown option: {' '.join(rest)}")
    options.rest = rest
    try:
        options.command(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        print(f"error: {what}{f': {error.filename}' if error.filename else ''}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was finished is kept, the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(prog="medusa-nb", description="Medusa heads for your own model.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help)
        sub.set_defaults(command=command)
        return sub

    run = add("run", command_run, "execute the notebooks headlessly")
    run.add_argument("--smoke", action="store_true", help="a short run of the same code")
    run.add_argument("--all", action="store_true", help="all seven notebooks, not only the walk's four")
    run.add_argument("--only", nargs="+", metavar="NOTEBOOK", help="names or numbers, e.g. 03")
    run.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="notebook parameter")
    run.add_argument("--keep-outputs", action="store_true", help="put outputs into notebooks/, figures into README.md")

    distill = add("distill", command_distill, "let the base model answer prompts")
    distill.add_argument("out", type=Path, help="JSONL file of answers; continued if it exists")
    prompts_options(distill, "stdlib")
    distill.add_argument("--max-new-tokens", type=positive, default=160)
    distill.add_argument("--temperature", type=not_negative, default=0.0)
    distill.add_argument("--batch-size", type=positive, default=64)
    distill.add_argument("--keep-states", type=Path, metavar="FOLDER", help="keep hidden states for training")
    distill.add_argument("--server", action="append", help="base URL of an OpenAI-compatible server; may be repeated")
    distill.add_argument("--concurrency", type=positive, default=64, help="requests in flight at each server")
    distill.add_argument("--timeout", type=positive, default=300, help="seconds a request may take (with --server)")

    train = add("train", command_train, "train heads on answers")
    train.add_argument("answers", type=Path, help="JSONL file from distill")
    train.add_argument("out", type=Path, help="folder for the heads")
    train.epilog = "further options: those of `python -m medusa_nb.training --help`, for instance --kind path"

    generate = add("generate", command_generate, "answer one prompt with the heads")
    generate.add_argument("heads", type=Path, help="folder of trained heads")
    generate.add_argument("prompt", help="the user's turn, or - for standard input")
    generate.add_argument("--max-new-tokens", type=positive, default=256)
    generate.add_argument("--tree-size", type=positive, default=TREE)

    measure = add("measure", command_measure, "speed of heads against the same loop without them")
    measure.add_argument("heads", type=Path, help="folder of trained heads")
    prompts_options(measure, "stdlib", split="test", limit=12)
    measure.add_argument("--repeats", type=positive, default=3)
    measure.add_argument("--max-new-tokens", type=positive, default=160)
    measure.add_argument("--tree-size", type=positive, help="by default what is fastest on this machine")
    measure.add_argument("--eager", action="store_true", help="do not compile")

    export = add("export", command_export, "write heads for other software, check them, publish them")
    export.add_argument("heads", type=Path, help="folder of trained heads")
    export.add_argument("out", type=Path, help="a new folder")
    export.add_argument("--to", required=True, help="tgi, vllm or transformers")
    export.add_argument("--version", type=int, choices=(1, 2), default=2, help="of the original format (tgi)")
    export.add_argument("--no-weights", action="store_true", help="leave the base model out (transformers)")
    export.add_argument("--tree-size", type=positive, default=TREE, help="nodes of the tree (transformers)")
    export.add_argument("--check", action="store_true", help="read it back as its reader does, compare with ours")
    export.add_argument("--push", metavar="REPO_ID", help="publish on the hub")
    export.add_argument("--private", action="store_true")
    export.add_argument("--dry-run", action="store_true", help="show what --push would send, send nothing")
    export.add_argument("--results", type=Path, help="results.json of the run, for the model card")

    peers = add("peers", command_peers, "run the same prompts through vLLM, llama.cpp and transformers")
    peers.add_argument("--vllm-python", type=Path, help="python of an environment with vLLM (make peers builds one)")
    peers.add_argument("--limit", type=positive, default=12, help="at most this many held-out prompts")
    peers.add_argument("--repeats", type=positive, default=3)
    peers.add_argument("--max-new-tokens", type=positive, default=160)
    peers.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    peers.add_argument("--out", type=Path, help="Markdown file for the table, by default in data/benchmarks")

    add("doctor", command_doctor, "check whether this machine is ready for the walk")
    board = add("leaderboard", command_leaderboard, "enter heads into a workshop's leaderboard, or show it")
    board.add_argument("board", type=Path, help="JSONL file that all seats can write to")
    board.add_argument("--heads", type=Path, help="folder of trained heads to enter")
    board.add_argument("--name", default="", help="the seat's name")
    site = add("site", command_site, "write the executed notebooks as self-contained web pages")
    site.add_argument("folder", type=Path)
    pack = add("pack", command_pack, "bundle repository, wheels and model for a room without network")
    pack.add_argument("folder", type=Path)

    for command in (distill, generate, measure, export):
        command.add_argument("--model", help="folder or hub id of the base model; the packaged one by default")
        command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
        command.add_argument("--trust-remote-code", action="store_true")
    return top


def positive(text: str) -> int:
    """A whole number of 1 or more, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is too small; 1 or more is needed")
    return value


def not_negative(text: str) -> float:
    """A number of 0 or more, for argparse."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is no temperature; 0 or more is needed")
    return value


def prompts_options(command: argparse.ArgumentParser, source: str, split: str | None = None, limit: int | None = None):
    """Options that say which prompts are meant."""
    command.add_argument("--prompts", default=source, help="stdlib, everyday, a folder, a file, a hub data set")
    command.add_argument("--split", default=split, help="train, calibration or test")
    command.add_argument("--limit", type=positive, default=limit, help="at most this many prompts")
    command.add_argument(
        "--on-bad", choices=("raise", "drop"), default="raise", help="conversations that cannot be used"
    )


def _prompts(options, dropped: Counter | None = None):
    from medusa_nb.distillation.prompts import load_prompts

    return load_prompts(options.prompts, options.split, options.limit, on_bad=options.on_bad, dropped=dropped)


def _load(options):
    from medusa_nb.base_model import load_base_model

    return load_base_model(options.model, dtype=options.dtype, trust_remote_code=options.trust_remote_code)


def command_run(options) -> None:
    """Execute the walk and print its main figures."""
    from medusa_nb.course.report import publish, summary
    from medusa_nb.course.run import keep_outputs, run_walk
    from medusa_nb.course.walk import read_results

    out = run_walk("smoke" if options.smoke else "learner", options.only, dict(options.p), options.all)
    results = read_results(out / "results.json")
    if options.keep_outputs:
        keep_outputs(out, options.only)
        if not options.smoke and "speed" in results:
            publish(out)
    print(summary(results))


def command_distill(options) -> None:
    """Answer prompts and print the report."""
    from medusa_nb.distillation.in_process import DistillationSettings, distil
    from medusa_nb.distillation.servers import ServerSettings, distil_from_servers

    dropped: Counter = Counter()
    how = dict(max_new_tokens=options.max_new_tokens, temperature=options.temperature)
    if options.server:
        if not options.model:
            raise InputError("name the model that the server serves with --model")
        asked = ServerSettings(concurrency=options.concurrency, timeout=options.timeout, **how)
        prompts = _prompts(options, dropped)
        report = distil_from_servers(options.server, options.model, prompts, options.out, asked, dropped)
        reasons_by_id = report.pop("failed")
        report |= dict(failed=dict(Counter(reasons_by_id.values())), failed_ids=sorted(reasons_by_id)[:20])
    else:
        settings = DistillationSettings(batch_size=options.batch_size, **how)
        prompts = _prompts(options, dropped)
        model, tokenizer = _load(options)
        report = distil(model, tokenizer, prompts, options.out, settings, dropped, options.keep_states)
    print(json.dumps(report, indent=2))
    failed = report.get("failed", {})
    if not report["answered"] and (failed or not report["resumed"]):
        reasons = [reason for reason, _ in Counter(failed or report["dropped"]).most_common(3)]
        raise InputError(f"nothing was answered: {'; '.join(reasons) or 'there was nothing to answer'}")


def command_train(options) -> None:
    """Train heads, calibrate them on held-out answers, save; all options are those of ``medusa_nb.training``."""
    from medusa_nb.training.options import parse
    from medusa_nb.training.train import train_heads

    words = options.rest
    config = words[:1] if words and words[0].endswith(".json") else []
    words = [*config, "--data_path", str(options.answers), "--output_dir", str(options.out), *words[len(config) :]]
    report = train_heads(parse(words))
    print(json.dumps({name: value for name, value in report.items() if name != "heads"}, indent=2))


def _decoder(options, model, max_length: int, size: int):
    from medusa_nb.decoding import Decoder
    from medusa_nb.heads_file import load_heads
    from medusa_nb.training.calibration import Calibration

    draft = Calibration.load(options.heads).draft(load_heads(options.heads, model), size)
    return Decoder(model, max_length=max_length, draft=draft)


def command_generate(options) -> None:
    """Print the answer as it comes, and how many passes it took."""
    import torch
    from transformers import TextStreamer

    from medusa_nb.base_model import eos_token_ids
    from medusa_nb.chat import clean_text, prompt_ids, require_chat_template

    text = sys.stdin.buffer.read().decode("utf-8", "replace") if options.prompt == "-" else options.prompt
    if not clean_text(text).strip():
        raise InputError("the prompt is empty; write what the model is asked")
    model, tokenizer = _load(options)
    require_chat_template(tokenizer)
    ids = torch.tensor(prompt_ids(tokenizer, [dict(role="user", content=clean_text(text))]), device=model.device)
    decoder = _decoder(options, model, len(ids) + options.max_new_tokens, options.tree_size)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    [result] = decoder.generate([ids], options.max_new_tokens, eos_token_ids(model, tokenizer), streamer)
    count, passes = len(result.new_tokens), len(result.steps)
    print(f"[{count} tokens in {passes} passes, a tree of {decoder.draft.size}]", file=sys.stderr)


def command_measure(options) -> None:
    """Print tokens per pass and speedups of the heads, compiled with compiled or eager with eager."""
    import torch

    from medusa_nb.base_model import eos_token_ids
    from medusa_nb.chat import prompt_ids
    from medusa_nb.decoding import Decoder
    from medusa_nb.distillation.prompts import first_turn
    from medusa_nb.measurement.identity import identity
    from medusa_nb.measurement.latency import fastest_size, measure_latency
    from medusa_nb.measurement.machine import machine
    from medusa_nb.measurement.timing import compare, decode_with, speedup, speedup_interval, transformers_generate
    from medusa_nb.training.calibration import Calibration

    rows = _prompts(options)
    model, tokenizer = _load(options)
    ids = [torch.tensor([prompt_ids(tokenizer, first_turn(row["messages"]))], device=model.device) for row in rows]
    longest, eos = max(x.shape[1] for x in ids) + options.max_new_tokens, eos_token_ids(model, tokenizer)
    size = options.tree_size
    if size is None:
        size = max(2, fastest_size(Calibration.load(options.heads), measure_latency(model, (1, 8, 16, 24), repeats=10)))
    plain, medusa = Decoder(model, max_length=longest), _decoder(options, model, longest, size)
    if not options.eager:
        plain.compile(), medusa.compile()
        if not medusa.compiled:
            print(f"the step did not compile, both loops are eager: {medusa.why_eager}", file=sys.stderr)
    timings = compare(
        {
            "model.generate": lambda x: transformers_generate(model, x, options.max_new_tokens, eos),
            "our loop": decode_with(plain, options.max_new_tokens, eos),
            "with heads": decode_with(medusa, options.max_new_tokens, eos),
        },
        ids,
        options.repeats,
    )
    for name, timing in timings.items():
        low, high = speedup_interval(timing, timings["our loop"])
        print(
            f"{name:16}{timing.tokens_per_second():8.1f} tokens/s{timing.tokens_per_pass():7.2f} per pass"
            f"{speedup(timing, timings['our loop']):7.2f} x our loop ({low:.2f} to {high:.2f})"
        )
    same = identity(model, timings["with heads"], timings["our loop"])
    print(json.dumps(dict(machine=machine(model), tree=size, compiled=medusa.compiled, same=same), indent=2))


def command_export(options) -> None:
    """Write an export, read it back if wished, show or send what goes to the hub."""
    import torch

    from medusa_nb.chat import prompt_ids
    from medusa_nb.export.formats import export
    from medusa_nb.export.publish import model_card, push
    from medusa_nb.export.readers import check
    from medusa_nb.heads_file import load_heads
    from medusa_nb.storage import read_json, write_text
    from medusa_nb.training.calibration import FILE, Calibration

    results = read_json(options.results) if options.results else None
    model, tokenizer = _load(options)
    heads = load_heads(options.heads, model)
    known = Calibration.load(options.heads) if (options.heads / FILE).exists() else None
    weights, size = not options.no_weights, options.tree_size
    how = dict(
        version=options.version, model=model, tokenizer=tokenizer, calibration=known, tree_size=size, weights=weights
    )
    export(heads, options.out, options.to, **how)
    if options.check:
        prompt = torch.tensor(
            [prompt_ids(tokenizer, [dict(role="user", content="What is a tree?")])], device=model.device
        )
        print(check(options.out, options.to, heads, model, prompt))
    files = sorted(str(path) for path in options.out.rglob("*") if path.is_file())
    if options.push:
        card = model_card(options.push, options.to, heads, results)
        write_text(options.out / "README.md", card)
        sent = push(options.out, options.push, options.private, options.dry_run)
        files = [f"{'would send' if options.dry_run else 'sent'} to {options.push}:", *sent, "", card]
    print(*files, sep="\n")


def command_peers(options) -> None:
    """Measure engines side by side, write and print the table."""
    import torch

    from medusa_nb.base_model import eos_token_ids, load_base_model
    from medusa_nb.chat import prompt_ids
    from medusa_nb.course.walk import shipped, shipped_answers, shipped_heads
    from medusa_nb.export.formats import export
    from medusa_nb.measurement.peers import report, run_peers
    from medusa_nb.storage import write_text

    rows = [row for row in shipped_answers("stdlib", "test") if row["completion_tokens"] >= 100][: options.limit]
    model, tokenizer = load_base_model(dtype=options.dtype)
    prompts = [torch.tensor([prompt_ids(tokenizer, row["messages"][:1])]) for row in rows]
    plain, full = shipped_heads("plain", model), shipped_heads("full", model)
    how = dict(eos=eos_token_ids(model, tokenizer), max_new_tokens=options.max_new_tokens, repeats=options.repeats)
    with tempfile.TemporaryDirectory() as folder:
        export(plain[0], folder, "vllm")
        vllm = (options.vllm_python, Path(folder)) if options.vllm_python else None
        found = run_peers(model, prompts, plain, full, vllm=vllm, **how)
    day = time.strftime("%Y-%m-%d", time.gmtime())
    file = options.out or shipped("benchmarks") / f"peers-{day}-{platform.machine()}.md"
    table = report(model, found, options.repeats)
    write_text(file, table)
    print(table)
    if wrong := [name for name, row in found.items() if row.differs]:
        raise InputError(f"{', '.join(wrong)} wrote a text that is not the base model's; the table is in '{file}'")


def command_doctor(options) -> None:
    """Print OK and FAIL lines."""
    from medusa_nb.course.doctor import doctor

    if not doctor():
        raise InputError("this machine is not ready")


def command_leaderboard(options) -> None:
    """Enter heads, then print the standings."""
    from medusa_nb.course.workshop import enter, standings

    if options.heads:
        print(json.dumps(enter(options.heads, options.board, options.name)))
    print(standings(options.board))


def command_site(options) -> None:
    """Write the pages."""
    from medusa_nb.course.site import build_site

    print(*build_site(options.folder), sep="\n")


def command_pack(options) -> None:
    """Make the offline bundle."""
    from medusa_nb.course.workshop import pack

    print(pack(options.folder))
