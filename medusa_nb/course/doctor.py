"""Is this machine ready for the walk: versions, memory, disk, compiler, number format, and the model itself."""

import os
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from medusa_nb.base_model import dtype_name, has_native_bf16, load_base_model, suitable_device, suitable_dtype
from medusa_nb.chat import prompt_ids
from medusa_nb.decoding import Decoder
from medusa_nb.storage import build_folder, free_disk

Check = tuple[bool, str, str]


def versions() -> Iterator[Check]:
    """Each package that is pinned, against what is installed."""
    try:
        pinned = requires("medusa-nb") or []
    except PackageNotFoundError:
        pinned = []
        yield False, "the package is installed", "no, so its versions are not known; pip install it"
    for line in pinned:
        needed = Requirement(line)
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(needed.name)
        except PackageNotFoundError:
            found = "not installed"
        fine = found != "not installed" and needed.specifier.contains(found.split("+")[0])
        yield fine, f"{needed.name} {needed.specifier}", found


def machine_checks() -> Iterator[Check]:
    """Memory, disk, cores, compiler, number format."""
    memory, disk = psutil.virtual_memory().available / 1e9, free_disk(build_folder()) / 1e9
    yield memory > 4, "4 GB of free memory", f"{memory:.1f} GB"
    yield disk > 3, "3 GB of free disk", f"{disk:.1f} GB"
    yield (os.cpu_count() or 1) >= 2, "2 cores", str(os.cpu_count())
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++") or shutil.which("cl")
    found = Path(compiler).name if compiler else "none, steps run eagerly"
    yield True, "a C++ compiler (optional: compiled steps)", found
    native = "native" if has_native_bf16() else "not native"
    chosen = dtype_name(suitable_dtype(suitable_device()))
    yield True, "number format of the walk", f"{chosen} on {suitable_device()} (bf16 is {native} on this CPU)"


def model_checks() -> Iterator[Check]:
    """The base model loads and answers."""
    started = time.perf_counter()
    model, tokenizer = load_base_model()
    yield True, "the base model loads", f"{time.perf_counter() - started:.1f} s"
    ids = torch.tensor(prompt_ids(tokenizer, [dict(role="user", content="What is a prime number?")]))
    decoder = Decoder(model, max_length=len(ids) + 32)
    started = time.perf_counter()
    result = decoder.generate([ids], 32, eos_token_id=[])[0]
    rate = len(result.new_tokens) / (time.perf_counter() - started)
    yield rate > 4, "it writes 4 tokens a second or more", f"{rate:.0f}"


def doctor() -> bool:
    """Print all checks line by line; True if all are fine."""
    good = True
    for checks in (versions, machine_checks, model_checks):
        for fine, what, detail in checks():
            print(f"{'OK  ' if fine else 'FAIL'}  {what}: {detail}", flush=True)
            good = good and fine
    print("this machine is ready" if good else "this machine is not ready; see the lines that start with FAIL")
    return good
