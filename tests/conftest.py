"""Tiny random models with the real tokenizer; nothing here or in the tests reads from the network."""

import os
import tempfile

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # processes that share the cores must not fight
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MEDUSA_NB_HEADLESS", "1")
os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="medusa-nb-modules-"))

import random  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig  # noqa: E402

from medusa_nb.packaged_model import packaged_model  # noqa: E402
from medusa_nb.tree import Tree  # noqa: E402

EOS, PAD = 4, 0
REPOSITORY = Path(__file__).parents[1]
LONGEST = "test_notebooks.py"


def pytest_collection_modifyitems(items):
    """The file that takes longest goes first, so that two processes end at about the same time."""
    items.sort(key=lambda item: item.path.name != LONGEST)


def random_model(config, seed: int = 0, std: float = 0.3):
    """A frozen float32 model of this architecture with large random matrices, so that its texts vary."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=std)
    return model.eval().requires_grad_(False)


def small_llama(vocab_size: int = 50, context: int = 96, seed: int = 0, std: float = 0.3, **changes):
    """A two-layer Llama of hidden size 32."""
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, max_position_embeddings=context, eos_token_id=EOS, pad_token_id=PAD)
    return random_model(LlamaConfig(vocab_size=vocab_size, **(sizes | changes)), seed, std)


def random_tree(K: int, n: int, seed: int = 0, width: int = 4) -> Tree:
    """A random candidate tree at most ``K`` deep with at most ``n`` nodes."""
    source = random.Random(seed)
    paths = {()}
    for _ in range(50 * n):
        if len(paths) == n:
            break
        path = source.choice(sorted(paths)) + (source.randrange(width),)
        if len(path) <= K:
            paths.add(path)
    return Tree.from_paths(paths)


@pytest.fixture(scope="session")
def tokenizer():
    """The real tokenizer of the packaged model, chat template included. Shared: tests must not change it."""
    return AutoTokenizer.from_pretrained(packaged_model())


@pytest.fixture(scope="session")
def tiny_model(tokenizer):
    """A random Llama with the vocabulary of the real tokenizer, context 1,024. Shared: tests must not change it."""
    return small_llama(len(tokenizer), context=1024, eos_token_id=tokenizer.eos_token_id)


def save(model, tokenizer, folder: Path) -> Path:
    """A model folder as any other."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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
