"""``python -m medusa_nb COMMAND``: run, distill, train, generate, measure, export, doctor, blank, site, pack."""

import argparse
import json
import sys
from pathlib import Path

from medusa_nb.errors import InputError

ROOM_FOR_A_TREE = 32


def main(arguments: list[str] | None = None) -> int:
    """Run one command; bad input prints one sentence and returns 2."""
    options = parser().parse_args(arguments)
    try:
        options.command(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was finished is kept, the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(prog="python -m medusa_nb", description="Medusa heads for your own model.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="execute the notebooks headlessly")
    run.add_argument("--smoke", action="store_true", help="a short run of the same code")
    run.add_argument("--only", nargs="+", metavar="NOTEBOOK", help="names or numbers, e.g. 03")
    run.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="notebook parameter")
    run.add_argument(
        "--keep-outputs",
        action="store_true",
        help="put outputs into notebooks/, and a learner run's figures into README.md",
    )
    run.set_defaults(command=command_run)

    distill = commands.add_parser("distill", help="let the base model answer prompts")
    distill.add_argument("out", type=Path, help="JSONL file of answers; continued if it exists")
    distill.add_argument("--prompts", default="stdlib", help="stdlib, prose, a folder, a file, a hub data set")
    distill.add_argument("--split", help="train, calibration or test")
    distill.add_argument("--limit", type=int, help="at most this many prompts")
    distill.add_argument("--max-new-tokens", type=int, default=256)
    distill.add_argument("--temperature", type=float, default=0.0)
    distill.add_argument("--batch-size", type=int, default=64)
    distill.add_argument("--server", action="append", help="base URL of an OpenAI-compatible server; may be repeated")
    distill.add_argument("--concurrency", type=int, default=64, help="requests in flight (with --server)")
    distill.add_argument("--timeout", type=float, default=300, help="seconds a request may take (with --server)")
    distill.set_defaults(command=command_distill)

    train = commands.add_parser("train", help="train heads on answers")
    train.add_argument("answers", type=Path, help="JSONL file from distill")
    train.add_argument("out", type=Path, help="folder for the heads")
    train.add_argument("--heads", type=int, default=4)
    train.add_argument("--layers", type=int, default=1)
    train.add_argument("--own-projection", action="store_true", help="a projection per head (version 1)")
    train.add_argument("--see-path", action="store_true", help="heads that see the path (not for servers)")
    train.add_argument(
        "--draft-vocabulary", type=int, metavar="N", help="guess the N tokens most frequent in the answers only"
    )
    train.add_argument("--epochs", type=float, default=3)
    train.add_argument("--batch-size", type=int, default=128, help="positions per step")
    train.add_argument("--learning-rate", type=float, default=2e-3)
    train.set_defaults(command=command_train)

    generate = commands.add_parser("generate", help="answer one prompt with the heads")
    generate.add_argument("heads", type=Path, help="folder of trained heads")
    generate.add_argument("prompt", help="the user's turn, or - for standard input")
    generate.add_argument("--max-new-tokens", type=int, default=256)
    generate.set_defaults(command=command_generate)

    measure = commands.add_parser("measure", help="speed of heads against plain decoding")
    measure.add_argument("heads", type=Path, help="folder of trained heads")
    measure.add_argument("--prompts", default="stdlib")
    measure.add_argument("--split", default="test")
    measure.add_argument("--limit", type=int, default=24)
    measure.add_argument("--repeats", type=int, default=3)
    measure.add_argument("--max-new-tokens", type=int, default=160)
    measure.add_argument("--eager", action="store_true", help="do not compile")
    measure.set_defaults(command=command_measure)

    export = commands.add_parser("export", help="write heads for other software, check them, publish them")
    export.add_argument("heads", type=Path, help="folder of trained heads")
    export.add_argument("out", type=Path, help="a new folder")
    export.add_argument("--to", required=True, help="tgi, vllm or transformers")
    export.add_argument("--version", type=int, choices=(1, 2), default=2, help="of the original format (tgi)")
    export.add_argument(
        "--draft-vocabulary", type=int, metavar="N", help="guess the N most frequent tokens only (vllm)"
    )
    export.add_argument("--no-weights", action="store_true", help="leave the base model out (transformers)")
    export.add_argument("--tree-size", type=int, default=8, help="nodes of the tree (transformers)")
    export.add_argument("--tree-depth", type=int, default=3, help="how deep the heads guess (transformers)")
    export.add_argument("--check", action="store_true", help="read it back as its reader does, compare with ours")
    export.add_argument("--push", metavar="REPO_ID", help="publish on the hub")
    export.add_argument("--private", action="store_true")
    export.add_argument("--dry-run", action="store_true", help="show what --push would send, send nothing")
    export.add_argument("--results", type=Path, help="results.json of the run, for the model card")
    export.set_defaults(command=command_export)

    doctor = commands.add_parser("doctor", help="check whether this machine is ready for the walk")
    doctor.set_defaults(command=command_doctor)
    blank = commands.add_parser("blank", help="write the notebooks without the exercises' answers")
    blank.add_argument("folder", type=Path)
    blank.set_defaults(command=command_blank)
    site = commands.add_parser("site", help="write the executed notebooks as self-contained web pages")
    site.add_argument("folder", type=Path)
    site.set_defaults(command=command_site)
    pack = commands.add_parser("pack", help="bundle repository and wheels for a room without network")
    pack.add_argument("folder", type=Path)
    pack.set_defaults(command=command_pack)

    for command in (distill, train, generate, measure, export):
        command.add_argument("--model", help="folder or hub id of the base model; the shipped one by default")
        command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
        command.add_argument("--trust-remote-code", action="store_true")
    return top


def _load(options):
    from medusa_nb.base_model import load_base_model

    return load_base_model(options.model, dtype=options.dtype, trust_remote_code=options.trust_remote_code)


def command_run(options) -> None:
    """Execute the walk and print its result table."""
    from medusa_nb.report import publish
    from medusa_nb.run import keep_outputs, result_table, run_walk

    out = run_walk("smoke" if options.smoke else "learner", options.only, dict(options.p))
    if options.keep_outputs:
        keep_outputs(out, options.only)
        if not options.smoke:
            publish(out)
    if (out / "results.json").exists():
        print(result_table(json.loads((out / "results.json").read_text())))


def command_distill(options) -> None:
    """Answer prompts and print the report."""
    from medusa_nb.distillation import DistillationSettings, distil
    from medusa_nb.prompts import load_prompts

    prompts = load_prompts(options.prompts, options.split, options.limit)
    if options.server:
        from medusa_nb.remote import describe, distil_remotely, settings_from

        if not options.model:
            raise InputError("name the model that the server serves with --model")
        report = distil_remotely(options.server, options.model, prompts, options.out, settings_from(options))
        print(json.dumps(describe(report), indent=2))
        return
    model, tokenizer = _load(options)
    settings = DistillationSettings(options.max_new_tokens, options.temperature, options.batch_size)
    print(json.dumps(distil(model, tokenizer, prompts, options.out, settings), indent=2))


def command_train(options) -> None:
    """Cache hidden states, train heads, calibrate them on held-out answers, save."""
    from medusa_nb.calibration import calibrate, draft_vocabulary
    from medusa_nb.distillation import load_answers
    from medusa_nb.features import cache_features
    from medusa_nb.heads import MedusaHeads
    from medusa_nb.training import TrainingSettings, accuracy, rank_table, train_heads

    rows = load_answers(options.answers, loops=False)
    model, tokenizer = _load(options)
    train = [r for r in rows if r["split"] == "train"]
    held_out = [r for r in rows if r["split"] == "calibration"]
    if not train or not held_out:
        raise InputError(
            f"'{options.answers}' has {len(train)} train and {len(held_out)} calibration answers; both are needed"
        )
    features = cache_features(model, tokenizer, train, options.out / "features" / "train", options.heads)
    judge = cache_features(model, tokenizer, held_out, options.out / "features" / "calibration", options.heads)
    vocabulary = draft_vocabulary(tokenizer, train, options.draft_vocabulary)
    heads = MedusaHeads.for_model(
        model, options.heads, options.layers, options.own_projection, options.see_path, vocabulary
    )
    settings = TrainingSettings(options.epochs, options.batch_size, options.learning_rate)
    train_heads(heads, features, options.out, settings)
    calibrate(heads, judge, tokenizer, held_out, train).save(options.out)
    print(json.dumps(accuracy(rank_table(heads, judge)), indent=2))


def _medusa_decoder(options, model, capacity: int, **how):
    from medusa_nb.calibration import Calibration
    from medusa_nb.heads import MedusaHeads
    from medusa_nb.measurement import fastest_decoder

    heads, known = MedusaHeads.from_pretrained(options.heads, model), Calibration.load(options.heads)
    return fastest_decoder(model, heads, known, capacity=capacity, remember=options.heads, **how)


def _prompt_ids(model, tokenizer, messages):
    batch = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return batch["input_ids"].to(model.device)


def command_generate(options) -> None:
    """Print the answer as it comes, and how many passes it took."""
    from transformers import TextStreamer

    from medusa_nb.base_model import eos_token_ids, require_chat_template

    model, tokenizer = _load(options)
    require_chat_template(tokenizer)
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    ids = _prompt_ids(model, tokenizer, [dict(role="user", content=text)])
    decoder = _medusa_decoder(options, model, ids.shape[1] + options.max_new_tokens + ROOM_FOR_A_TREE, compiled=False)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    eos = eos_token_ids(model, tokenizer)
    [result] = decoder.generate([ids[0]], options.max_new_tokens, eos, streamer)
    about = f"{len(result.new_tokens)} tokens in {len(result.steps)} passes, tree of {decoder.draft.size}"
    print(f"[{about}]", file=sys.stderr)


def command_measure(options) -> None:
    """Print tokens per second, tokens per pass and speedups of the four decoders."""
    from medusa_nb.base_model import eos_token_ids
    from medusa_nb.decoding import Decoder
    from medusa_nb.measurement import compare, identity, machine, speedup, standard_decoders
    from medusa_nb.prompts import first_turn, load_prompts

    prompts = load_prompts(options.prompts, options.split, options.limit)
    model, tokenizer = _load(options)
    ids = [_prompt_ids(model, tokenizer, first_turn(row["messages"])) for row in prompts]
    capacity = max(x.shape[1] for x in ids) + options.max_new_tokens + ROOM_FOR_A_TREE
    plain = Decoder(model, capacity=capacity)
    medusa = _medusa_decoder(options, model, capacity, compiled=not options.eager)
    if not options.eager:
        plain.compile()
    decoders = standard_decoders(medusa, plain, options.max_new_tokens, eos_token_ids(model, tokenizer))
    timings = compare(decoders, ids, options.repeats)
    for name, timing in timings.items():
        ratio = speedup(timing, timings["model.generate"])
        rate, per_pass = timing.tokens_per_second(), timing.tokens_per_pass()
        print(f"{name:22}{rate:9.1f} tokens/s{per_pass:7.2f} per pass{ratio:7.2f} x generate")
    print(
        json.dumps(
            dict(
                machine=machine(model),
                tree=medusa.draft.size,
                compiled=medusa.compiled,
                same=identity(model, timings["Medusa"], timings["our loop, no guesses"]),
            ),
            indent=2,
        )
    )


def command_export(options) -> None:
    """Write an export, read it back if wished, show or send what goes to the hub."""
    from medusa_nb.calibration import FILE, Calibration
    from medusa_nb.export import export
    from medusa_nb.heads import MedusaHeads
    from medusa_nb.publish import model_card, push, read_results
    from medusa_nb.readers import check

    model, tokenizer = _load(options)
    heads = MedusaHeads.from_pretrained(options.heads, model)
    export(
        heads,
        options.out,
        options.to,
        version=options.version,
        draft_vocabulary=options.draft_vocabulary,
        model=model,
        tokenizer=tokenizer,
        calibration=Calibration.load(options.heads) if (options.heads / FILE).exists() else None,
        tree_shape=(options.tree_size, options.tree_depth),
        weights=not options.no_weights,
    )
    if options.check:
        prompt = tokenizer("def add(a, b):\n    ", return_tensors="pt", add_special_tokens=False).input_ids
        print(check(options.out, options.to, heads, model, prompt.to(model.device)))
    if options.push:
        card = model_card(options.push, options.to, heads, read_results(options.results) if options.results else None)
        (options.out / "README.md").write_text(card)
        files = push(options.out, options.push, options.private, options.dry_run)
        print(f"{'would send' if options.dry_run else 'sent'} to {options.push}:", *files, "", card, sep="\n")
    else:
        print(*(path for path in sorted(options.out.rglob("*")) if path.is_file()), sep="\n")


def command_doctor(options) -> None:
    """Print OK and FAIL lines."""
    from medusa_nb.workshop import doctor

    if not doctor():
        raise InputError("this seat is not ready")


def command_blank(options) -> None:
    """Write the exercise versions."""
    from medusa_nb.workshop import blank

    print(*blank(options.folder), sep="\n")


def command_site(options) -> None:
    """Write the pages."""
    from medusa_nb.site import build_site

    print(*build_site(options.folder), sep="\n")


def command_pack(options) -> None:
    """Make the offline bundle."""
    from medusa_nb.workshop import pack

    print(pack(options.folder))


if __name__ == "__main__":
    sys.exit(main())
