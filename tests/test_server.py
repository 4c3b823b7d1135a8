"""An exported folder behind ``transformers serve``, over HTTP."""

import pytest
import torch
from conftest import DEFAULT
from openai import OpenAI
from test_heads import seeing_heads
from transformers import AutoModelForCausalLM

from medusa_nb.errors import InputError
from medusa_nb.export import export
from medusa_nb.server import ask, serving
from medusa_nb.tree import tree_from_paths

PROMPT = 'def area(radius):\n    """Area of a circle."""'


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(DEFAULT, dtype=torch.float32).requires_grad_(False)
    out = tmp_path_factory.mktemp("serve") / "medusa-model"
    tree = tree_from_paths([(0,), (1,), (0, 0)])
    export(seeing_heads(model, 2), out, "transformers", model=model, tokenizer=tokenizer, tree=tree)
    return out


@pytest.mark.parametrize("compiled", [False, True])
def test_served_text_is_the_plain_text_streamed_and_whole(folder, tokenizer, compiled):
    messages = [dict(role="user", content=PROMPT)]
    batch = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    new = plain.generate(**batch, max_new_tokens=24, do_sample=False)[0, batch["input_ids"].shape[1] :]
    expected = tokenizer.decode(new, skip_special_tokens=True)
    with serving(folder, trust_remote_code=True, compiled=compiled) as url:
        client = OpenAI(base_url=url, api_key="none", max_retries=0, timeout=180)
        arguments = dict(model=str(folder), messages=messages, max_tokens=24, temperature=0)
        whole = client.chat.completions.create(**arguments)
        assert whole.choices[0].message.content == expected
        assert ask(url, folder, messages, 24) == ask(url, folder, messages, 24, stream=True) == expected
        chunks = client.chat.completions.create(**arguments, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == expected
    assert sum(map(bool, pieces)) > 1  # it came in pieces


def test_a_server_that_does_not_come_up_says_why(tmp_path):
    with pytest.raises(InputError, match="the server did not come up"), serving(tmp_path / "nothing", timeout=60):
        pass
