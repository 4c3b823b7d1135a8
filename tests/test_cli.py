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
    how = ["--heads", "2", "--epochs", "1", "--dtype", "float32"]
    kind = ["--layers", "0", "--own-projection", "--see-path", "--draft-vocabulary", "40"]
    assert main(["train", str(answers), str(tmp_path / "few_words"), *how, *kind]) == 0
    assert json.loads((tmp_path / "few_words" / "config.json").read_text())["draft_vocabulary_size"] == 40
    assert main(["generate", str(tmp_path / "few_words"), "def f(x):", "--max-new-tokens", "8", *how[4:]]) == 0
    assert main(["train", str(answers), str(heads), *how]) == 0
    assert {"config.json", "medusa_lm_head.safetensors", "calibration.json"} <= {f.name for f in heads.iterdir()}
    capsys.readouterr()
    assert main(["generate", str(heads), "def f(x):", "--max-new-tokens", "8", "--dtype", "float32"]) == 0
    assert "passes" in capsys.readouterr().err
    arguments = ["--limit", "2", "--repeats", "1", "--max-new-tokens", "12", "--dtype", "float32", "--eager"]
    assert main(["measure", str(heads), *arguments]) == 0
    assert '"identical": 2' in capsys.readouterr().out
    arguments = [str(heads), str(tmp_path / "out"), "--to", "transformers", "--check", "--dtype", "float32"]
    assert main(["export", *arguments, "--push", "me/heads", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "the text of plain greedy decoding" in said and "would send to me/heads" in said
    assert "custom_generate/generate.py" in said and "# heads" in said
    assert main(["export", str(heads), str(tmp_path / "vllm"), "--to", "vllm", "--check", "--dtype", "float32"]) == 0
    assert "read back as vllm does: 2 heads," in capsys.readouterr().out
    arguments = [str(heads), str(tmp_path / "few"), "--to", "vllm", "--check", "--dtype", "float32"]
    assert main(["export", *arguments, "--draft-vocabulary", "100"]) == 0
    assert "2 heads, 100 of 8192 tokens, largest difference" in capsys.readouterr().out


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
        (["distill", "x.jsonl", "--server", "http://127.0.0.1:1/v1"], "name the model that the server serves"),
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


def test_distilling_through_a_server_from_the_command_line(tmp_path, capsys):
    from test_remote import start, url

    server, out = start(), tmp_path / "a.jsonl"
    command = ["distill", str(out), "--server", url(server), "--model", "m", "--limit", "5", "--concurrency", "2"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["answered"] == 5 == len(out.read_text().splitlines())
    assert all(request["max_tokens"] == 256 for request in server.seen)
    server.shutdown()


def test_blank_and_site_write_their_files(tmp_path, capsys):
    assert main(["blank", str(tmp_path / "blank")]) == main(["site", str(tmp_path / "site")]) == 0
    assert (tmp_path / "blank" / "01_environment_setup.ipynb").exists()
    assert (tmp_path / "site" / "index.html").exists()
