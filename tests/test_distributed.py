"""``torchrun -m medusa_nb.training``: the same heads on one process and on two, resumable, nothing ignored."""

import json
import random
import subprocess
import sys

import pytest
import torch
from conftest import small_llama

from medusa_nb.base_model import load_base_model
from medusa_nb.distributed import HeadOptions, collate, estimate, main, parse, run
from medusa_nb.errors import InputError
from medusa_nb.features import cache_features
from medusa_nb.heads import MedusaHeads
from medusa_nb.training import HeadsWithLoss


@pytest.fixture(scope="module")
def setting(tmp_path_factory, tokenizer):
    """A tiny base model on disk and a file of answers."""
    folder = tmp_path_factory.mktemp("distributed")
    small_llama(len(tokenizer), context=256).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    source, words = random.Random(0), "return value self name index None True for in list".split()
    with (folder / "answers.jsonl").open("w") as file:
        for i in range(40):
            text = " ".join(source.choices(words, k=source.randint(4, 12)))
            messages = [dict(role="user", content=f"def f{i}():"), dict(role="assistant", content=text)]
            split = "calibration" if i % 5 == 0 else "train"
            row = dict(id=f"p{i}", split=split, messages=messages, completion_tokens=10, loop=False)
            file.write(json.dumps(row) + "\n")
    return folder


def options(setting, out, **changes) -> dict:
    values = dict(
        model_name_or_path=str(setting / "base"), data_path=str(setting / "answers.jsonl"), output_dir=str(out)
    )
    values |= dict(medusa_num_heads=2, num_train_epochs=2, per_device_train_batch_size=8, learning_rate=1e-2)
    values |= dict(use_cpu=True, load_in="float32", report_to="none", logging_steps=1, seed=1, states="online")
    return values | dict(lr_scheduler_type="cosine", warmup_ratio=0.1, disable_tqdm=True) | changes


def torchrun(processes: int, setting, out, **changes) -> subprocess.CompletedProcess:
    config = out.parent / f"{out.name}.json"
    config.write_text(json.dumps(options(setting, out, **changes)))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    command += ["-m", "medusa_nb.training", str(config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def losses(out) -> list[float]:
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


FEW_WORDS = dict(medusa_num_layers=0, own_projection=True, see_path=True, draft_vocabulary=12)


@pytest.mark.parametrize(("states", "kind"), [("online", {}), ("cached", {}), ("cached", FEW_WORDS)])
def test_two_processes_train_the_heads_of_one(setting, tmp_path, states, kind):
    how = dict(states=states, dataloader_drop_last=True) | kind  # processes cannot share an odd last batch evenly
    run(*parse_file(setting, tmp_path / "one", **how))
    done = torchrun(2, setting, tmp_path / "two", per_device_train_batch_size=4, **how)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-4)
    model, _ = load_base_model(setting / "base", dtype="float32")
    one, two = (MedusaHeads.from_pretrained(tmp_path / name, model) for name in ("one", "two"))
    assert (one.vocabulary is None) == (not kind) and one.bias.numel() == (0 if kind else 2 * 32)
    trained = (one.path_weight[1], two.path_weight[1]) if kind else (one.weight, two.weight)
    assert torch.allclose(*trained, atol=1e-4) and trained[0].abs().sum() > 0
    assert len(json.loads(done.stdout[done.stdout.index("{\n") :])["accuracy"]) == 2
    record = json.loads((tmp_path / "two" / "log.jsonl").read_text().splitlines()[0])
    assert {"head0_loss", "head0_top1", "head1_top5"} <= record.keys()


def parse_file(setting, out, **changes):
    file = out.parent / f"{out.name}.json"
    file.write_text(json.dumps(options(setting, out, **changes)))
    return parse([str(file)])


def test_interrupted_and_resumed_it_ends_at_the_same_weights(setting, tmp_path, monkeypatch):
    run(*parse_file(setting, tmp_path / "whole"))
    arguments = dict(save_strategy="steps", save_steps=3)
    from medusa_nb import distributed

    class Killed(Exception):
        pass

    class Stop(distributed.JsonLines):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(distributed, "JsonLines", Stop)
        with pytest.raises(Killed):
            run(*parse_file(setting, tmp_path / "parts", **arguments))
    run(*parse_file(setting, tmp_path / "parts", **arguments))
    model, _ = load_base_model(setting / "base", dtype="float32")
    whole, parts = (MedusaHeads.from_pretrained(tmp_path / name, model) for name in ("whole", "parts"))
    assert torch.allclose(whole.weight, parts.weight, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("soft_share", [0.0, 0.5])
def test_cached_and_online_give_the_same_loss_on_the_same_batch(setting, tmp_path, soft_share):
    from medusa_nb.distillation import load_answers
    from medusa_nb.distributed import Conversations, OnlineHeads

    model, tokenizer = load_base_model(setting / "base", dtype="float32")
    rows = load_answers(setting / "answers.jsonl")[:6]
    heads = MedusaHeads.for_model(model, 2)
    torch.nn.init.normal_(heads.weight, std=0.1)
    batch = collate([Conversations(tokenizer, rows, 2, 256)[i] for i in range(6)])
    inner = HeadsWithLoss(heads, 0.8, soft_share)
    online = OnlineHeads(model, inner)(**batch)["loss"]
    cached = cache_features(model, tokenizer, rows, tmp_path / "features", 2)
    loss = inner(**cached.__getitems__(list(range(len(cached)))))["loss"]
    assert online.item() == pytest.approx(
        loss.item(), rel=1e-5 if not soft_share else 1e-4
    )  # near-ties among probabilities


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lazy_preprocess=True), "'lazy_preprocess' is not an option here"),
        (dict(no_such_option=3), "unknown option 'no_such_option'"),
        (dict(deepspeed="ds.json"), "deepspeed"),
        (dict(load_in="4bit"), "'bitsandbytes' is asked for and not installed"),
        (dict(report_to="wandb"), "wandb"),
        (dict(states="sometimes"), "choose cached, online or auto"),
        (dict(load_in="int3"), "choose float32, bfloat16"),
        (dict(data_path="nowhere.jsonl"), "no file 'nowhere.jsonl'"),
        (dict(output_dir="/proc/none"), "cannot write to '/proc/none'"),
        (dict(num_train_epochs="many"), "num_train_epochs"),
    ],
)
def test_nothing_is_ignored(setting, tmp_path, changes, message, capsys):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(options(setting, tmp_path / "out", **changes)))
    assert main([str(file)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]


def test_bad_config_files(tmp_path, capsys):
    (tmp_path / "bad.json").write_text('{\n"a": 1,\n}')
    assert main([str(tmp_path / "bad.json")]) == 2
    assert "bad.json, line 3" in capsys.readouterr().err
    assert main(["missing.json"]) == 2
    assert "there is no file 'missing.json'" in capsys.readouterr().err


def test_flags_are_the_same_as_a_file(setting, tmp_path):
    values = options(setting, tmp_path / "out")
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    by_flags, by_file = parse(flags)[0], parse_file(setting, tmp_path / "out")[0]
    assert by_flags == by_file and isinstance(by_flags, HeadOptions)


def test_the_estimate_knows_a_7b_model():
    from transformers import MistralConfig

    sizes = estimate(MistralConfig(), positions=1_000_000)  # the shape of Mistral 7B is the default
    assert sizes["weights"] == pytest.approx(14.5, rel=0.02)
    assert sizes["states"] == pytest.approx(8.19, rel=0.01)
    with pytest.raises(InputError, match="are required: --model_name_or_path"):
        parse(["--nothing", "1"])
