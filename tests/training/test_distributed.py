"""``torchrun -m medusa_nb.training``: the same heads from one process, two, two machines, and after a crash."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from medusa_nb.base_model import load_base_model
from medusa_nb.heads_file import load_heads
from medusa_nb.training.options import parse
from medusa_nb.training.train import train_heads

pytest_plugins = ["training_setting"]
PATH = dict(kind="path", draft_vocabulary=12)


def config(values: dict, tmp_path, name: str, **changes) -> str:
    """A config file whose heads come to ``tmp_path / name``."""
    file = tmp_path / f"{name}.json"
    # processes cannot share an odd last batch evenly
    every = dict(output_dir=str(tmp_path / name), dataloader_drop_last=True, per_device_train_batch_size=16)
    file.write_text(json.dumps(values | every | changes))
    return str(file)


def torchrun(file: str, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *flags, "-m", "medusa_nb.training", file]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(*processes: subprocess.Popen) -> list[str]:
    """What they print, when all of them have ended well."""
    try:
        outputs = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    for process, (_, error) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, error[-3000:]
    return [output for output, _ in outputs]


def losses(out) -> list[float]:
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def same_heads(tmp_path, one: str, other: str, values: dict) -> None:
    model, _ = load_base_model(values["model_name_or_path"], dtype="float32")
    first, second = (load_heads(tmp_path / name, model).tensors() for name in (one, other))
    assert any(tensor.float().abs().sum() > 0 for name, tensor in first.items() if "bias" in name)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-4, rtol=1e-4)
    assert losses(tmp_path / other) == pytest.approx(losses(tmp_path / one), abs=2e-4)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [dict(states="online"), dict(states="cached"), PATH], ids=str)
def test_two_processes_train_the_heads_of_one(kind, values, tmp_path):
    train_heads(parse([config(values, tmp_path, "one", **kind)]))
    file = config(values, tmp_path, "two", **kind, per_device_train_batch_size=8)
    [output] = finish(torchrun(file, "--nproc_per_node=2", "--standalone"))
    same_heads(tmp_path, "one", "two", values)
    report = json.loads(output[output.index("{\n") :])
    assert len(report["accuracy"]) == 2 and output.count('"accuracy"') == 1


@pytest.mark.slow
def test_two_machines_of_two_processes_train_the_heads_of_one(values, tmp_path):
    train_heads(parse([config(values, tmp_path, "one")]))
    file, port = config(values, tmp_path, "four", per_device_train_batch_size=4), free_port()
    flags = ["--nnodes=2", "--nproc_per_node=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"]
    finish(*(torchrun(file, *flags, "--rdzv_id=heads", "--local_addr=127.0.0.1") for _ in range(2)))
    same_heads(tmp_path, "one", "four", values)


def workers_of(pid: int) -> list[int]:
    """Process ids of the training processes that an agent started."""
    import psutil

    children = psutil.Process(pid).children(recursive=True)
    return [child.pid for child in children if "medusa_nb.training" in child.cmdline()]


@pytest.mark.slow
@pytest.mark.skipif("MEDUSA_NB_RESTARTS" not in os.environ, reason="on a busy machine gloo may not connect again")
def test_a_worker_that_is_killed_is_started_again_and_ends_at_the_same_weights(values, tmp_path):
    more = dict(num_train_epochs=30, save_steps=5, ddp_timeout=40)
    train_heads(parse([config(values, tmp_path, "one", **more)]))
    file = config(values, tmp_path, "two", **more, per_device_train_batch_size=8)
    agent = torchrun(file, "--nproc_per_node=2", "--standalone", "--max-restarts=3")
    end, killed = time.monotonic() + 300, False
    while agent.poll() is None and not killed and time.monotonic() < end:
        if list((tmp_path / "two").glob("checkpoints/*/trainer_state.json")):
            os.kill(workers_of(agent.pid)[-1], signal.SIGKILL)
            killed = True
        time.sleep(0.02)
    finish(agent)
    assert killed
    same_heads(tmp_path, "one", "two", values)


@pytest.mark.slow
def test_bad_input_ends_every_process_with_one_sentence(values, tmp_path):
    agent = torchrun(config(values, tmp_path, "two", evaluation_strategy="epoch"), "--nproc_per_node=2", "--standalone")
    _, error = agent.communicate(timeout=200)
    assert agent.returncode != 0 and "'evaluation_strategy' is not an option here" in error
