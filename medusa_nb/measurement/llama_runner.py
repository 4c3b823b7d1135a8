"""Runs llama.cpp in a process of its own: one JSON request a line in, one answer a line out, as ``vllm_runner`` does.

``python llama_runner.py GGUF THREADS END [ngrams]``. END is the token that ends an answer, which llama.cpp leaves out.
Its threads would slow down whatever else computes in the same process.
"""

import json
import os
import sys
from importlib.metadata import version
from urllib.request import Request, urlopen


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # llama.cpp writes to standard output, too
    os.dup2(2, 1)
    import xllamacpp

    file, threads, end, *ngrams = sys.argv[1:]
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = file, 2048, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    if ngrams:  # its own drafts, as long as those of transformers' prompt lookup
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
        params.speculative.ngram_simple.size_n, params.speculative.ngram_simple.size_m = 2, 10
    server = xllamacpp.Server(params)  # listens on loopback
    address, headers = f"{server.listening_address}/completion", {"Content-Type": "application/json"}
    print(json.dumps(dict(version=version("xllamacpp"))), file=answers, flush=True)
    for line in sys.stdin:
        prompt, limit = json.loads(line)
        asked = dict(prompt=prompt, n_predict=limit, temperature=0, cache_prompt=False, return_tokens=True)
        with urlopen(Request(address, json.dumps(asked).encode(), headers)) as sent:
            reply = json.load(sent)
        tokens = reply["tokens"] + ([int(end)] if reply["stop_type"] == "eos" else [])
        passes = len(tokens) - 1 - reply["timings"].get("draft_n_accepted", 0)
        print(json.dumps(dict(tokens=tokens, passes=passes, counters={})), file=answers, flush=True)


if __name__ == "__main__":
    main()
