"""What numbers depend on: processor, memory, versions, number format."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from medusa_nb.base_model import dtype_name, suitable_device


def machine(model=None) -> dict:
    """Processor, threads, memory, versions; with ``model`` also its device and dtype."""
    about = dict(
        processor=processor_name(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
        python=platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "datasets")},
    )
    if torch.accelerator.is_available():
        about["accelerator"] = torch.cuda.get_device_name() if torch.cuda.is_available() else str(suitable_device())
    if model is not None:
        about |= dict(device=str(model.device), dtype=dtype_name(model.dtype))
    return about


def processor_name() -> str:
    """The processor's name as the operating system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
