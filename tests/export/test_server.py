"""An exported folder behind ``transformers serve``, over HTTP, on loopback."""

import sys
from urllib.request import urlopen

import pytest
import torch
from tiny_models import small_llama
from transformers import AutoModelForCausalLM

from medusa_nb.errors import InputError
from medusa_nb.export.formats import export
from medusa_nb.export.server import ask, running, serving
from medusa_nb.heads import MedusaHeads
from medusa_nb.tree import Tree

PYTHON = """
import http.server, sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert arguments["--host"] == "127.0.0.1"
address = arguments["--host"], int(arguments["--port"])
http.server.HTTPServer(address, http.server.SimpleHTTPRequestHandler).serve_forever()
"""


@pytest.mark.slow
def test_served_text_is_the_plain_text_streamed_and_whole(tmp_path, tokenizer):
    model, out = (
        small_llama(len(tokenizer), context=512, eos_token_id=tokenizer.eos_token_id),
        tmp_path / "medusa-model",
    )
    heads = MedusaHeads(model, 2)
    torch.nn.init.normal_(heads.weight, std=0.3)
    tree = Tree.from_paths([(0,), (1,), (0, 0)])
    export(heads.requires_grad_(False), out, "transformers", model=model, tokenizer=tokenizer, tree=tree)
    messages = [dict(role="user", content="Area of a circle?")]
    batch = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    plain = AutoModelForCausalLM.from_pretrained(out)
    new = plain.generate(**batch, max_new_tokens=24, do_sample=False)[0, batch["input_ids"].shape[1] :]
    expected = tokenizer.decode(new, skip_special_tokens=True)
    with serving(out, trust_remote_code=True) as url:
        assert url.startswith("http://127.0.0.1:") and url.endswith("/v1")
        assert ask(url, out, messages, 24) == ask(url, out, messages, 24, stream=True) == expected


def test_a_server_listens_on_loopback_and_ends_with_the_block():
    with running([sys.executable, "-c", PYTHON], "/") as url:
        address = url.removesuffix("v1")
        assert urlopen(address).status == 200
    with pytest.raises(OSError):
        urlopen(address, timeout=5)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit('no such model')", "did not come up: no such model"),
        ("pass", "did not come up: it said nothing"),
        ("import sys; sys.exit('Missing dependencies')", "needs further packages"),
    ],
)
def test_a_server_that_does_not_come_up_says_why(code, message):
    with pytest.raises(InputError, match=message), running([sys.executable, "-c", code], "/health", timeout=60):
        pass
