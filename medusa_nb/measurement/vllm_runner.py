"""Runs in vLLM's own environment, without this package: one JSON request a line in, one answer a line out.

``python vllm_runner.py MODEL DTYPE eager|compiled [HEADS NUM_HEADS]``. A request is a prompt (token ids) and how many
new tokens it may get. The answer holds the new tokens, and what was drafted and accepted on the way.
"""

import json
import os
import sys

# it may use all cores, as the others do, in place of leaving one to its scheduler
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ |= dict(VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", VLLM_LOGGING_LEVEL="ERROR")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # vLLM writes to standard output, too
    os.dup2(2, 1)
    import vllm

    model, dtype, mode, *heads = sys.argv[1:]
    options = dict(model=model, dtype=dtype, enforce_eager=mode == "eager", max_model_len=2048, disable_log_stats=False)
    if heads:
        options["speculative_config"] = dict(method="medusa", model=heads[0], num_speculative_tokens=int(heads[1]))
    llm = vllm.LLM(**options, enable_prefix_caching=False)

    def counters() -> dict[str, list]:
        return {m.name: getattr(m, "values", None) or [m.value] for m in llm.get_metrics() if "spec_decode" in m.name}

    print(json.dumps(dict(version=vllm.__version__)), file=answers, flush=True)
    for line in sys.stdin:
        prompt, limit = json.loads(line)
        before = counters()
        sampling = vllm.SamplingParams(temperature=0, max_tokens=limit)
        [result] = llm.generate([vllm.TokensPrompt(prompt_token_ids=prompt)], sampling, use_tqdm=False)
        used = {
            name: [b - a for a, b in zip(before.get(name, [0] * len(values)), values, strict=True)]
            for name, values in counters().items()
        }
        print(json.dumps(dict(tokens=list(result.outputs[0].token_ids), counters=used)), file=answers, flush=True)


if __name__ == "__main__":
    main()
