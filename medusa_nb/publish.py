"""Heads on the Hugging Face hub: the folder, a model card made from what was measured, and a dry run first."""

import json
import os
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError

from medusa_nb.errors import InputError

LOADING = {
    "tgi": "Text Generation Inference (archived since January 2026): `text-generation-launcher --model-id {repo}`.",
    "vllm": (
        'vLLM up to 0.32 (0.33 removed Medusa): `--speculative-config \'{{"model": "{repo}", '
        '"num_speculative_tokens": {heads}}}\'`.'
    ),
    "transformers": (
        'transformers 5: `AutoModelForCausalLM.from_pretrained("{repo}", trust_remote_code=True)`, then '
        '`.generate(...)` as always, or `model.generate(..., custom_generate="{repo}", trust_remote_code=True)` on '
        "the base model, or `transformers serve {repo} --trust-remote-code`."
    ),
}


def model_card(repo: str, to: str, heads, results: dict | None = None) -> str:
    """The README.md of a published folder; figures only from ``results``, a run's record."""
    about = heads.config()
    base, results = about["base_model_name_or_path"], results or {}
    lines = [
        "---",
        f"base_model: {base}" if "/" in base and not base.startswith("data/") else "",
        "license: apache-2.0",
    ]
    lines += ["tags:", "- medusa", "- speculative-decoding", "---", "", f"# {repo.split('/')[-1]}", ""]
    lines += [
        f"{heads.num_heads} Medusa heads ({heads.num_layers + heads.sees_path} residual block each"
        f"{', which see the path' if heads.sees_path else ''}"
        f"{f', guessing {len(heads.vocabulary):,} tokens' if heads.vocabulary is not None else ''}) for `{base}`. "
        "The base model is unchanged, and greedy text is the base model's own.",
        "",
        "## Load",
        "",
        LOADING[to].format(repo=repo, heads=heads.num_heads),
        "",
    ]
    if data := results.get("data"):
        lines += [
            "## Data",
            "",
            f"Self-distilled: {data['conversations']:,} conversations, {data['tokens']:,} tokens.",
            "",
        ]
    if scores := results.get("accuracy" if heads.sees_path else "accuracy_plain"):
        lines += ["## Held-out accuracy", "", "| head | top-1 | top-5 |", "|---|---|---|"]
        lines += [f"| {k} | {score['top1']:.3f} | {score['top5']:.3f} |" for k, score in enumerate(scores)] + [""]
    for dtype, part in results.get("speed", {}).items() if heads.sees_path else ():
        speed, machine = part["in_domain_without_loops"], results["machine"]
        lines += [
            f"{dtype} on {machine['cores']} cores of {machine['processor']}: {speed['tokens_per_pass']:.2f} tokens per "
            f"pass, {speed['speedup_vs_generate']:.2f} × `model.generate`, tree of {part['tree_size']} nodes "
            "(in domain, without answers that loop).",
            "",
        ]
    return "\n".join(lines)


def push(
    folder: Path, repo: str, private: bool = False, dry_run: bool = False, endpoint: str | None = None
) -> list[str]:
    """Upload a folder to a model repository, created if missing; returns the names of its files.

    The token comes from ``HF_TOKEN`` or the login and is never printed.

    Args:
        dry_run: only return what would go.

    Raises:
        InputError: no token, no permission, or the hub cannot be reached.
    """
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    if dry_run:
        return files
    if os.environ.get("HF_HUB_OFFLINE") == "1" and endpoint is None:
        raise InputError("HF_HUB_OFFLINE is 1; set it to 0 to publish, or use --dry-run")
    api = HfApi(endpoint=endpoint)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Medusa heads")
    except LocalTokenNotFoundError as error:
        raise InputError("there is no hub token; set HF_TOKEN or log in with `hf auth login`") from error
    except (HfHubHTTPError, RepositoryNotFoundError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        raise InputError(
            f"the hub refused '{repo}' ({status or type(error).__name__}); check name and permission"
        ) from error
    return files


def read_results(file: Path) -> dict:
    """A run's record, or nothing if there is none."""
    return json.loads(file.read_text()) if file.is_file() else {}
