"""The command line: from prompts to a measured speedup, and one sentence for bad input."""

import json

import pytest

from medusa_nb.__main__ import main


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """A small file of answers, made by the command itself."""
    file = tmp_path_factory.mktemp("cli") / "answers.jsonl"
    assert main(["distill", str(file), "--limit", "40", "--max-new-tokens", "24", "--dtype", "float32"]) == 0
    return file


def test_distill_train_generate_measure(answers, tmp_path, capsys):
    heads = tmp_path / "heads"
    assert main(["train", str(answers), str(heads), "--heads", "2", "--epochs", "1", "--dtype", "float32"]) == 0
    assert {"config.json", "medusa_lm_head.safetensors", "rank_counts.json"} <= {f.name for f in heads.iterdir()}
    capsys.readouterr()
    assert main(["generate", str(heads), "def f(x):", "--max-new-tokens", "8", "--dtype", "float32"]) == 0
    assert "passes" in capsys.readouterr().err
    arguments = ["--limit", "2", "--repeats", "1", "--max-new-tokens", "12", "--dtype", "float32", "--eager"]
    assert main(["measure", str(heads), *arguments]) == 0
    assert '"identical": 2' in capsys.readouterr().out


def test_continuing_is_possible_and_other_settings_are_refused(answers, capsys):
    arguments = ["distill", str(answers), "--limit", "40", "--dtype", "float32"]
    assert main([*arguments, "--max-new-tokens", "24"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["answered"] == 0
    assert main([*arguments, "--max-new-tokens", "25"]) == 2
    assert "made with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.jsonl", "out"], "no file 'nowhere.jsonl'"),
        (["generate", "nowhere", "hi"], "no config.json in 'nowhere'"),
        (["distill", "x.jsonl", "--prompts", "missing.json"], "no file 'missing.json'"),
        (["distill", "x.jsonl", "--split", "exam"], "unknown split 'exam'"),
        (["run", "--only", "99"], "no notebook '99'"),
        (["run", "--only", "01", "-p", "sed", "1"], "parameter 'sed'"),
        (["generate", "nowhere", "hi", "--model", "no/such/model"], "cannot load a base model"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]
