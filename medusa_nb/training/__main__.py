"""``torchrun --nproc_per_node=N -m medusa_nb.training CONFIG.json [--option value ...]``: head training.

Several machines: the same command on each, with ``--nnodes``, ``--rdzv_backend=c10d`` and ``--rdzv_endpoint``.
"""

import json
import os
import sys

import torch

from medusa_nb.chat import clean_text
from medusa_nb.errors import InputError
from medusa_nb.training.options import HeadTraining, parse
from medusa_nb.training.train import train_heads


def main(arguments: list[str] | None = None) -> int:
    """Train as asked; bad input prints one sentence and returns 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        for name in HeadTraining.__annotations__:
            if help := HeadTraining.__dataclass_fields__[name].metadata.get("help"):
                print(f"  {name:28} {help}")
        print("  ... and every option of transformers.TrainingArguments that makes sense here")
        return 0 if arguments else 2
    try:
        report = train_heads(parse(arguments))
    except InputError as error:
        print(f"error: {clean_text(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {clean_text(f'{error.strerror or error}: {error.filename or str()}')}", file=sys.stderr)
        return 2
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if int(os.environ.get("RANK", 0)) == 0:
        report.pop("heads")
        print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
