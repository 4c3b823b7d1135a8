"""Answers of a made-up model, and what trains heads on them in a second."""

import json
import random

import pytest

from medusa_nb.training.options import HeadTraining

WORDS = "return value self name index None True for in list".split()


def answered(i: int, source: random.Random, **changes) -> dict:
    """One answered conversation as `distill` writes it; every fifth is held out."""
    text = " ".join(source.choices(WORDS, k=source.randint(4, 12)))
    messages = [dict(role="user", content=f"def f{i}():"), dict(role="assistant", content=text)]
    row = dict(id=f"p{i}", split="calibration" if i % 5 == 0 else "train", messages=messages, finish_reason="stop")
    return row | dict(prompt_tokens=9, completion_tokens=10, loop=False) | changes


def write_answers(file, rows: list[dict]):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    source = random.Random(0)
    return [answered(i, source) for i in range(40)]


@pytest.fixture(scope="session")
def answers(rows, tmp_path_factory):
    """A file of 32 answers to train on and 8 held-out ones."""
    return write_answers(tmp_path_factory.mktemp("answers") / "answers.jsonl", rows)


@pytest.fixture(scope="session")
def few(rows, tmp_path_factory):
    """A file of four answers to train on and two held-out ones."""
    return str(write_answers(tmp_path_factory.mktemp("few") / "answers.jsonl", rows[:6]))


@pytest.fixture
def values(tiny_folder, answers, tmp_path) -> dict:
    """The entries of a config file with which heads are trained quickly."""
    return dict(
        model_name_or_path=str(tiny_folder),
        data_path=str(answers),
        output_dir=str(tmp_path / "heads"),
        medusa_num_heads=2,
        num_train_epochs=2,
        per_device_train_batch_size=64,
        learning_rate=1e-2,
        load_in="float32",
        use_cpu=True,
        logging_steps=1,
    )


@pytest.fixture
def options(values):
    """``options(name=value, ...)``: the options of ``values`` with changes."""
    return lambda **changes: HeadTraining(**(values | changes))
