"""Runs in vLLM's own environment, without this package: one JSON request a line in, one answer a line out.

``python vllm_runner.py MODEL DTYPE eager|compiled [HEADS NUM_HEADS]``; a request is a list of prompts (token ids each),
and how many new tokens they may get; the answer holds their new tokens, the seconds, and what was drafted and accepted.
"""

import json
import os
import sys
import time

os.environ |= dict(VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", VLLM_LOGGING_LEVEL="ERROR")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # vLLM writes to standard output, too
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams, TokensPrompt

    model, dtype, mode, *heads = sys.argv[1:]
    options = dict(model=model, dtype=dtype, enforce_eager=mode == "eager", max_model_len=1024, disable_log_stats=False)
    if heads:
        options["speculative_config"] = dict(method="medusa", model=heads[0], num_speculative_tokens=int(heads[1]))
    llm = LLM(**options, enable_prefix_caching=False)

    def counters() -> dict[str, list]:
        return {m.name: getattr(m, "values", None) or [m.value] for m in llm.get_metrics() if "spec_decode" in m.name}

    print(json.dumps(dict(ready=True)), file=answers, flush=True)
    for line in sys.stdin:
        prompts, limit = json.loads(line)
        before, started = counters(), time.perf_counter()
        sampling = SamplingParams(temperature=0, max_tokens=limit)
        results = llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        used = {name: [b - a for a, b in zip(before.get(name, [0] * 99), values)] for name, values in counters().items()}
        tokens = [list(result.outputs[0].token_ids) for result in results]
        print(json.dumps(dict(tokens=tokens, seconds=seconds, counters=used)), file=answers, flush=True)


if __name__ == "__main__":
    main()
