"""Tiny random models with the real tokenizer; nothing here or in the tests reads from the network."""

import os
import tempfile

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # processes that share the cores must not fight
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MEDUSA_NB_HEADLESS", "1")
os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="medusa-nb-modules-"))

import pytest  # noqa: E402
import torch  # noqa: E402
from tiny_models import save, small_llama  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from medusa_nb.packaged_model import packaged_model  # noqa: E402

LONGEST = "test_notebooks.py"


def pytest_collection_modifyitems(items):
    """The file that takes longest goes first, so that two processes end at about the same time."""
    items.sort(key=lambda item: item.path.name != LONGEST)


@pytest.fixture(scope="session")
def tokenizer():
    """The real tokenizer of the packaged model, chat template included. Shared: tests must not change it."""
    return AutoTokenizer.from_pretrained(packaged_model())


@pytest.fixture(scope="session")
def tiny_model(tokenizer):
    """A random Llama with the vocabulary of the real tokenizer, context 1,024. Shared: tests must not change it."""
    return small_llama(len(tokenizer), context=1024, eos_token_id=tokenizer.eos_token_id)


@pytest.fixture(scope="session")
def tiny_folder(tiny_model, tokenizer, tmp_path_factory):
    """``tiny_model`` and its tokenizer saved as any model folder is. Shared: tests must not change it."""
    return save(tiny_model, tokenizer, tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def small_model():
    """A random Llama of 50 tokens. Shared: tests must not change it."""
    return small_llama()


@pytest.fixture(scope="session")
def compiler_works():
    """Skip what needs a compiler where even a sum cannot be compiled."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(3))
    except Exception as error:
        pytest.skip(f"no working compiler: {error}")
