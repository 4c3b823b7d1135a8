"""Heads on the Hugging Face hub: the folder, a model card made from what was measured, and a dry run first."""

import os
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError

from medusa_nb.errors import InputError
from medusa_nb.heads import Heads, MedusaHeads
from medusa_nb.storage import portable_name

CARD = Path(__file__).parent / "model_card.md.jinja"


def model_card(repo: str, to: str, heads: Heads, results: dict | None = None) -> str:
    """The README.md of a published folder; figures only from ``results``, a run's record (``results.json``)."""
    base, plain, results = portable_name(heads.base_name), isinstance(heads, MedusaHeads), results or {}
    data = ModelCardData(
        base_model=base if base.count("/") == 1 and not base.startswith("build/") else None,
        license="apache-2.0",
        tags=["medusa", "speculative-decoding"],
    )
    kind = "plain" if plain else "full"
    card = ModelCard.from_template(
        data,
        template_str=CARD.read_text(encoding="utf-8"),
        name=repo.split("/")[-1],
        repo=repo,
        to=to,
        base=base,
        heads=heads,
        plain=plain,
        data=results.get("data"),
        scores=results.get("accuracy", {}).get(kind),
        speed=results.get("speed", {}).get("eager", {}).get(kind),
        machine=results.get("machine"),
    )
    return str(card)


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
