"""Makes ``llama_cpp.json.gz``: how llama.cpp tokenises some 300 texts and begins twenty greedy answers.

It reads the GGUF file itself, so this is what our converted folder must agree with. The tests only read the table.
Needs the extra ``peers``. Run in the repository: ``python tests/heart/make_llama_cpp_table.py``.
"""

import gzip
import importlib.metadata
import inspect
import json
import random
import textwrap
import urllib.request
from pathlib import Path

import xllamacpp

from medusa_nb.chat import prompt_ids
from medusa_nb.packaged_model import GGUF_SHA256, gguf_file, packaged_model

TABLE = Path(__file__).with_name("llama_cpp.json.gz")
ANSWERS = Path(__file__).parents[2] / "data" / "answers"
ANSWER_TOKENS = 24
BY_HAND = [
    *["", " ", "  ", "\n", "\n\n\n", "\t", " \t \n", "\r\n", "a", " a", "a ", "\u00a0", "\u3000 x", "x" * 80, "-" * 70],
    *["0", "7", "42", "1234567890", " 1", "  12", "\n3", "3.14159", "1,000,000", "-17", "0x1F", "1e-9", "2024-02-29"],
    *["a1b2c3", "v2.0.1", "x = 10\ny = 20", "    return 1", "[1, 2, 3]", "12 34  56   78", "\t9\t8", "١٢٣ ४५६ ７８"],
    *["don't", "I'll we've you're she'd it's", "DON'T", "l’été", "naïve café", "Größe, Straße", "Łódź", "ñandú"],
    *[
        "中文字符",
        "日本語のテキスト",
        "한국어 문장",
        "Привет, мир!",
        "Γειά σου",
        "שלום",
        "مرحبا بالعالم",
        "नमस्ते",
        "ไทย",
    ],
    *[
        "🙂",
        "👩‍👩‍👧‍👦 family",
        "🇫🇷🇯🇵",
        "e\u0301 vs é",
        "\u200b\u200d",
        "½ ² ³ ™ ©",
        "∑∫√ ≤ ≠",
        "→ ⇒ ─│┌",
        "\ufeffbom",
        "\ufffd",
    ],
    *[
        "<|im_start|>",
        "<|im_end|>",
        "<|im_start|>user\nHi<|im_end|>\n",
        "<|endoftext|>x",
        "< |im_start| >",
        "<|im_start",
    ],
    *[
        "https://example.org/a?b=1&c=2#d",
        "name@example.org",
        "C:\\Users\\x",
        "/usr/lib/x.so.1",
        "--flag=value",
        "$HOME",
    ],
    *[
        "def f(x):\n    return x + 1\n",
        "for i in range(10):\n\tprint(i)",
        "if a == b and c != d: pass",
        "x **= 2; y //= 3",
    ],
    *[
        "<div class='a'>b</div>",
        "SELECT * FROM t WHERE id = 5;",
        '{"a": [1, 2.5, null], "b": "c"}',
        "#!/bin/sh\necho $1",
    ],
    *[
        "| a | b |\n|---|---|\n| 1 | 2 |",
        "- [ ] to do\n- [x] done",
        "# Title\n\n1. one\n2. two",
        "`code` **bold** _it_",
    ],
]


def texts() -> list[str]:
    """Texts by hand, real questions and answers, source code, and random strings of Unicode."""
    source = random.Random(0)
    rows = [row for name in ("everyday", "stdlib") for row in read_answers(name)[:35]]
    spoken = [message["content"] for row in rows for message in row["messages"]]
    modules = (json, random, textwrap, inspect)
    code = [block for module in modules for block in inspect.getsource(module).split("\n\n\n")[1:16]]
    ranges = ((32, 127), (0xA0, 0x24F), (0x370, 0x52F), (0x5D0, 0x6FF), (0x2000, 0x2BFF), (0x4E00, 0x9FFF))
    ranges += ((0x1F300, 0x1FAFF),)
    letters = [
        [chr(source.randrange(*source.choice(ranges))) for _ in range(source.randrange(1, 40))] for _ in range(20)
    ]
    plain = [[chr(source.randrange(32, 127)) for _ in range(source.randrange(1, 80))] for _ in range(20)]
    return list(dict.fromkeys(BY_HAND + spoken + code + ["".join(text) for text in letters + plain]))


def read_answers(name: str) -> list[dict]:
    with gzip.open(ANSWERS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def main() -> None:
    from transformers import AutoTokenizer

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(gguf_file()), 2048, 1
    server = xllamacpp.Server(params)

    def ask(path: str, **asked) -> list[int]:
        header = {"Content-Type": "application/json"}
        request = urllib.request.Request(server.listening_address + path, json.dumps(asked).encode(), header)
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)["tokens"]

    def tokenise(text: str) -> list[int]:
        return ask("/tokenize", content=text, add_special=False, parse_special=True)

    def answer(ids: list[int]) -> list[int]:
        greedy = dict(n_predict=ANSWER_TOKENS, temperature=0, cache_prompt=False, return_tokens=True)
        return ask("/completion", prompt=ids, **greedy)

    tokenizer = AutoTokenizer.from_pretrained(packaged_model())
    rows = [row for name in ("everyday", "stdlib") for row in read_answers(name)[-10:]]
    prompts = [prompt_ids(tokenizer, row["messages"][:1]) for row in rows]
    table = dict(
        made_by=f"xllamacpp {importlib.metadata.version('xllamacpp')}",
        sha256=GGUF_SHA256,
        tokens=[[text, tokenise(text)] for text in texts()],
        answers=[[ids, answer(ids)] for ids in prompts],
    )
    with gzip.GzipFile(TABLE, "wb", mtime=0) as file:
        file.write(json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode())
    print(f"{len(table['tokens'])} texts, {len(table['answers'])} answers, {TABLE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
