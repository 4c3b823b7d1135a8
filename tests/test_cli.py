"""The command line: from prompts to a measured speedup, and one sentence for bad input."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from medusa_nb import cli
from medusa_nb.cli import main

PACKAGE = Path(cli.__file__).parent
SOURCE = '''def {name}(path, data):
    """Write {name} as lines to the file at path, and say how many there were."""
    with open(path, "w") as file:
        return file.write(str(data))
'''


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder of source code whose functions become prompts of every split."""
    folder = tmp_path_factory.mktemp("project")
    for i in range(24):
        functions = (SOURCE.format(name=f"save_{i}_{j}") for j in range(2))
        (folder / f"module_{i}.py").write_text("\n\n".join(functions))
    return folder


@pytest.fixture(scope="module")
def answers(project, tiny_folder, tmp_path_factory):
    """A file of answers, made by the command itself."""
    file = tmp_path_factory.mktemp("cli") / "answers.jsonl"
    how = ["--model", str(tiny_folder), "--dtype", "float32", "--max-new-tokens", "12"]
    assert main(["distill", str(file), "--prompts", str(project), *how]) == 0
    return file


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file of answers to train on, every fifth held out."""
    file, source = tmp_path_factory.mktemp("written") / "answers.jsonl", random.Random(0)
    lines = []
    for i in range(20):
        text = " ".join(source.choices("return value self name index None True for in list".split(), k=10))
        messages = [dict(role="user", content=f"def f{i}():"), dict(role="assistant", content=text)]
        row = dict(id=f"p{i}", split="train" if i % 5 else "calibration", messages=messages, finish_reason="stop")
        lines.append(json.dumps(row | dict(prompt_tokens=9, completion_tokens=10, loop=False)))
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="module")
def trained(written, tiny_folder, tmp_path_factory):
    """Plain heads trained by the command."""
    out = tmp_path_factory.mktemp("heads") / "plain"
    config = out.parent / "config.json"
    config.write_text(json.dumps(dict(medusa_num_heads=2, num_train_epochs=1, use_cpu=True, load_in="float32")))
    assert main(["train", str(written), str(out), str(config), "--model_name_or_path", str(tiny_folder)]) == 0
    return out


@pytest.fixture
def how(tiny_folder):
    return ["--model", str(tiny_folder), "--dtype", "float32"]


def one_sentence(capsys, *, starts: str = "error: ") -> str:
    """What was written to stderr: one line."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(starts), lines
    return lines[0]


def test_from_prompts_to_a_measured_speedup(trained, project, how, capsys):
    assert {"config.json", "medusa_lm_head.safetensors", "calibration.json"} <= {f.name for f in trained.iterdir()}
    capsys.readouterr()
    assert main(["generate", str(trained), "def f(x):", "--max-new-tokens", "8", *how]) == 0
    assert "8 tokens in" in capsys.readouterr().err
    few = [
        "--split",
        "train",
        "--limit",
        "2",
        "--repeats",
        "1",
        "--max-new-tokens",
        "12",
        "--tree-size",
        "4",
        "--eager",
    ]
    assert main(["measure", str(trained), "--prompts", str(project), *few, *how]) == 0
    said = capsys.readouterr().out
    assert said.count("x our loop") == 3
    same = json.loads(said[said.index("{") :])["same"]
    assert same["identical"] == same["prompts"] > 0


@pytest.mark.parametrize("to", ["tgi", "vllm", "transformers"])
def test_exports_are_read_back(to, trained, how, tmp_path, capsys):
    assert main(["export", str(trained), str(tmp_path / to), "--to", to, "--check", "--tree-size", "4", *how]) == 0
    assert str(tmp_path / to) in capsys.readouterr().out


def test_a_dry_run_shows_what_would_be_sent(trained, how, tmp_path, capsys):
    where = [str(trained), str(tmp_path / "out"), "--to", "vllm"]
    assert main(["export", *where, "--push", "me/heads", "--dry-run", *how]) == 0
    assert "would send to me/heads" in capsys.readouterr().out


def test_a_run_goes_on_and_refuses_other_settings(answers, project, how, capsys):
    command = ["distill", str(answers), "--prompts", str(project), *how]
    assert main([*command, "--max-new-tokens", "12"]) == 0
    assert json.loads(capsys.readouterr().out)["answered"] == 0
    assert main([*command, "--max-new-tokens", "13"]) == 2
    assert "made with other settings" in one_sentence(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.jsonl", "out"], "nowhere.jsonl"),
        (["generate", "nowhere", "hi"], "nowhere"),
        (["generate", "nowhere", "  \n "], "the prompt is empty"),
        (["distill", "x.jsonl", "--prompts", "missing.json"], "missing.json"),
        (["distill", "x.jsonl", "--split", "exam"], "exam"),
        (["distill", "x.jsonl", "--server", "http://127.0.0.1:1/v1"], "name the model that the server serves"),
        (["run", "--only", "99"], "no notebook '99'"),
        (["run", "--only", "01", "-p", "sed", "1"], "no parameter 'sed'"),
        (["generate", "nowhere", "hi", "--model", "no/such/model"], "no/such/model"),
        (["leaderboard", "board.jsonl", "--heads", "nowhere"], "an entry needs a name"),
        (["export", "nowhere", "out", "--to", "vllm", "--results", "missing.json"], "missing.json"),
        (["export", "nowhere", "out", "--to", "ggml"], "nowhere|ggml"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(arguments, message, capsys, tmp_path, monkeypatch, tiny_folder):
    monkeypatch.chdir(tmp_path)
    if arguments[0] in ("generate", "export") and "--model" not in arguments:
        arguments = [*arguments, "--model", str(tiny_folder)]
    assert main(arguments) == 2
    assert any(part in one_sentence(capsys) for part in message.split("|")) or "error" in message


# C21: zero, negative, and a folder where a file belongs

NUMBERS = {
    "distill": ["--limit", "--batch-size", "--concurrency", "--max-new-tokens", "--timeout"],
    "generate": ["--max-new-tokens", "--tree-size"],
    "measure": ["--limit", "--repeats", "--max-new-tokens", "--tree-size"],
    "export": ["--tree-size"],
    "peers": ["--limit", "--repeats", "--max-new-tokens"],
}
POSITIONAL = {"distill": ["x.jsonl"], "generate": ["h", "hi"], "measure": ["h"], "export": ["h", "o", "--to", "tgi"]}


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5e", ""])
@pytest.mark.parametrize(("command", "option"), [(c, o) for c, options in NUMBERS.items() for o in options])
def test_a_number_that_cannot_be_is_refused_before_anything_is_loaded(command, option, value, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        main([command, *POSITIONAL.get(command, []), f"{option}={value}"])
    assert ended.value.code == 2
    assert option in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("value", ["-0.5", "nan", "hot"])
def test_a_temperature_that_cannot_be_is_refused(value, capsys):
    with pytest.raises(SystemExit):
        main(["distill", "x.jsonl", f"--temperature={value}"])
    assert "--temperature" in capsys.readouterr().err


def test_output_paths_that_are_folders_or_files_are_refused(trained, written, project, how, tmp_path, capsys):
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    file.write_text("mine")
    heads, results = ["--heads", str(trained)], ["--prompts", str(project), "--limit", "2"]
    for command in (
        ["distill", str(folder), *results, *how],
        ["distill", str(tmp_path / "a.jsonl"), "--keep-states", str(file), *results, *how],
        ["train", str(written), str(file), "--model_name_or_path", how[1]],
        ["train", str(folder), str(tmp_path / "out")],
        ["export", str(trained), str(file), "--to", "vllm", *how],
        ["export", str(trained), str(file / "below"), "--to", "vllm", *how],
        ["generate", str(file), "hi", *how],
        ["leaderboard", str(folder)],
        ["leaderboard", str(folder), *heads, "--name", "me"],
        ["site", str(file)],
        ["pack", str(file)],
        ["export", str(trained), str(tmp_path / "x"), "--to", "vllm", "--results", str(folder), *how],
    ):
        assert main(command) == 2, command
        one_sentence(capsys)
    assert file.read_text() == "mine" and not list(folder.iterdir())


# C16: surrogates


def test_a_prompt_with_a_lone_surrogate_is_answered(trained, how, capsys):
    assert main(["generate", str(trained), "a \ud83d b", "--max-new-tokens", "2", *how]) == 0
    assert "2 tokens in" in capsys.readouterr().err


def test_bytes_that_are_no_text_are_read_from_standard_input(trained, how):
    command = [sys.executable, "-m", "medusa_nb", "generate", str(trained), "-", "--max-new-tokens", "2", *how]
    done = subprocess.run(command, input=b"caf\xe9 \xed\xa0\xbd", capture_output=True, env=os.environ | {"LC_ALL": "C"})
    assert done.returncode == 0 and b"2 tokens in" in done.stderr, done.stderr


# F30: heads in a read-only folder


def test_heads_in_a_folder_where_nothing_can_be_written(trained, project, how, tmp_path, monkeypatch, capsys):
    copied = shutil.copytree(trained, tmp_path / "heads")
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    for path in [*copied.rglob("*"), copied]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        few = ["--split", "train", "--limit", "1", "--repeats", "1", "--max-new-tokens", "4", "--eager"]
        assert main(["measure", str(copied), "--prompts", str(project), *few, *how]) == 0
        assert main(["export", str(copied), str(tmp_path / "out"), "--to", "vllm", *how]) == 0
        assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before, "something was written"
    finally:
        copied.chmod(0o755)


# F31: outside a clone


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """The package alone, copied to another folder, as an installation has it."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(PACKAGE, folder / "medusa_nb", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--smoke"],
        ["run", "--all"],
        ["run", "--only", "01"],
        ["site", "pages"],
        ["pack", "bundle"],
        ["peers"],
        ["leaderboard", "board.jsonl", "--heads", "h", "--name", "me"],
    ],
    ids=" ".join,
)
def test_outside_a_clone_a_command_says_that_it_needs_the_repository(arguments, elsewhere, monkeypatch, capsys):
    from medusa_nb import storage

    monkeypatch.setattr(storage, "_HERE", elsewhere)
    monkeypatch.chdir(elsewhere)
    assert main(arguments) == 2
    assert "needs the repository" in one_sentence(capsys)
    assert sorted(path.name for path in elsewhere.iterdir()) == ["medusa_nb"]


def test_outside_a_clone_the_other_commands_work(elsewhere, trained, how):
    """In a process of its own, which imports that copy."""
    code = "import sys, medusa_nb; print(medusa_nb.__file__); from medusa_nb.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "generate", str(trained), "hi", "--max-new-tokens", "2", *how]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0 and str(elsewhere) in done.stdout and "2 tokens in" in done.stderr, done.stderr


# F32: the disk is full


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits the size of files")
def test_a_full_disk_is_one_sentence(trained, written, how, tmp_path):
    """Files may not grow beyond a kilobyte, which fails in the same places as a full disk."""
    for arguments in (
        ["export", str(trained), str(tmp_path / "out"), "--to", "vllm", *how],
        ["train", str(written), str(tmp_path / "heads"), "--model_name_or_path", how[1], "--use_cpu", "true"],
    ):
        code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))\n"
        code += "from medusa_nb.cli import main; sys.exit(main())"
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.strip().splitlines()[-1].startswith("error: ")


def test_a_full_disk_and_an_interrupt_are_told_apart(monkeypatch, capsys):
    def full(options):
        raise OSError(28, "No space left on device", "heads.bin")

    def stopped(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "command_doctor", full)
    assert main(["doctor"]) == 2
    assert one_sentence(capsys) == "error: the disk is full: heads.bin"
    monkeypatch.setattr(cli, "command_doctor", stopped)
    assert main(["doctor"]) == 130
    assert "goes on from there" in one_sentence(capsys, starts="stopped")


def test_an_unknown_option_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "h", "hi", "--tree-sise", "3"])
    assert "--tree-sise" in capsys.readouterr().err
    assert main(["train", "a", "b", "--learning_rat", "1"]) == 2
    assert "learning_rat" in one_sentence(capsys)


def test_every_command_explains_itself(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = "run distill train generate measure export peers doctor leaderboard site pack".split()
    shown = capsys.readouterr().out
    assert all(command in shown for command in commands)
    for command in random.sample(commands, 4):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0 and "usage" in capsys.readouterr().out
