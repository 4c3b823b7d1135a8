"""Chat servers, prompts, and a model whose answers end at different lengths."""

import copy

import pytest
from chat_server import ChatServer, echo, user
from datasets import Dataset
from tiny_models import save

WORDS = "def return class value for in index self name list yield import raise lambda while break".split()


@pytest.fixture
def few_prompts():
    """Twelve prompts, some of two turns."""
    rows = [user(*[" ".join(WORDS[: i + 1])] * (1 + (i % 5 == 3)), name=f"p{i}") for i in range(12)]
    return Dataset.from_list(rows)


@pytest.fixture(scope="session")
def ending_model(tiny_model):
    """``tiny_model`` with thousands of end tokens, so that its answers end at different lengths."""
    model = copy.deepcopy(tiny_model)
    model.generation_config.eos_token_id = list(range(20, model.config.vocab_size, 12))
    return model


@pytest.fixture(scope="session")
def ending_folder(ending_model, tokenizer, tmp_path_factory):
    """``ending_model`` as a model folder."""
    return save(ending_model, tokenizer, tmp_path_factory.mktemp("ending") / "model")


@pytest.fixture
def chat_server():
    """A function that starts a server; all of them stop at the end."""
    started: list[ChatServer] = []

    def start(behave=echo) -> ChatServer:
        started.append(ChatServer(behave))
        return started[-1]

    yield start
    for server in started:
        server.shutdown()
        server.server_close()
