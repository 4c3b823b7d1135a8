"""Publishing, against a local stand-in of the hub's HTTP interface."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from huggingface_hub import ModelCard

from medusa_nb.errors import InputError
from medusa_nb.export.formats import export
from medusa_nb.export.publish import model_card, push
from medusa_nb.heads import MedusaHeads
from medusa_nb.path_heads import PathHeads


class Hub(BaseHTTPRequestHandler):
    """Accepts a repository, says that every file goes as it is, and keeps what is committed."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, self.headers.get("Authorization"), body))
        if self.headers.get("Authorization") != "Bearer hf_secret":
            return self.answer(401, dict(error="who are you"))
        if self.path.endswith("/preupload/main"):
            files = [dict(path=f["path"], uploadMode="regular", shouldIgnore=False) for f in json.loads(body)["files"]]
            return self.answer(200, dict(files=files))
        url = f"http://127.0.0.1:{self.server.server_port}/me/heads"
        commit = dict(commitUrl=f"{url}/commit/abc", commitOid="abc", pullRequestUrl=None, url=url)
        return self.answer(200, commit | dict(warnings=[], errors=[]))

    def answer(self, status: int, content: dict):
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.requests = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()


@pytest.fixture
def folder(tmp_path, small_model):
    heads = MedusaHeads(small_model, 2)
    export(heads, tmp_path / "out", "tgi")
    (tmp_path / "out" / "README.md").write_text(model_card("me/heads", "tgi", heads))
    return tmp_path / "out"


def test_dry_run_names_the_files_and_sends_nothing(folder, hub):
    files = push(folder, "me/heads", dry_run=True, endpoint=f"http://127.0.0.1:{hub.server_port}")
    assert files == ["README.md", "config.json", "medusa_lm_head.safetensors"]
    assert hub.requests == []


def test_files_arrive_in_one_commit(folder, hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    push(folder, "me/heads", private=True, endpoint=f"http://127.0.0.1:{hub.server_port}")
    paths = [path for path, _, _ in hub.requests]
    assert paths[0] == "/api/repos/create" and "private" in hub.requests[0][2].decode()
    [commit] = [body for path, _, body in hub.requests if "/commit/" in path]
    sent = [json.loads(line) for line in commit.splitlines()]
    names = {line["value"]["path"] for line in sent if line["key"] == "file"}
    assert names == {"README.md", "config.json", "medusa_lm_head.safetensors"}
    output = capsys.readouterr()
    assert "hf_secret" not in output.out + output.err


def test_refusals_are_one_sentence_without_the_token(folder, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(InputError, match="the hub refused 'me/heads'") as caught:
        push(folder, "me/heads", endpoint=f"http://127.0.0.1:{hub.server_port}")
    assert "hf_wrong" not in str(caught.value)


def test_offline_is_said(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="set it to 0 to publish, or use --dry-run"):
        push(folder, "me/heads")


RESULTS = dict(
    data=dict(conversations=1234, tokens=56789),
    accuracy=dict(full=[dict(top1=0.5612, top5=0.77), dict(top1=0.47, top5=0.7)], plain=[dict(top1=0.41, top5=0.6)]),
    speed=dict(eager=dict(full=dict(tokens_per_pass=3.31, vs_loop=2.4))),
    machine=dict(dtype="bfloat16", cores=2, processor="a processor"),
)


def test_the_card_says_what_was_measured_and_for_which_heads(small_model):
    card = model_card("me/heads", "transformers", PathHeads(small_model, 2), RESULTS)
    for words in ("1,234 conversations, 56,789 tokens", "| 0 | 0.561 | 0.770 |", "3.31 tokens per pass", "a processor"):
        assert words in card
    assert "trust_remote_code=True" in card and "that see the path" in card and "0.410" not in card


def test_a_card_without_a_record_invents_no_figures(small_model):
    bare = model_card("me/heads", "vllm", MedusaHeads(small_model, 3))
    assert "0.33 removed Medusa" in bare and '"num_speculative_tokens": 3' in bare
    assert "top-1" not in bare and "tokens per pass" not in bare
    few = model_card("me/heads", "transformers", PathHeads(small_model, 3, torch.arange(5)))
    assert "3 Medusa heads that see the path, drafting 5 tokens" in few


@pytest.mark.parametrize(("name", "known"), [("HuggingFaceTB/SmolLM2", "HuggingFaceTB/SmolLM2"), ("/home/me/x", None)])
def test_the_hub_reads_the_cards_head(small_model, name, known):
    heads = MedusaHeads(small_model, 1)
    heads.base_name = name
    card = ModelCard(model_card("me/heads", "tgi", heads))
    assert card.data.base_model == known and card.data.tags == ["medusa", "speculative-decoding"]
    assert "/home/me" not in str(card)
