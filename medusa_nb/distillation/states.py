"""Hidden states kept while the model answers, so that training need not read every conversation a second time."""

from pathlib import Path

import numpy as np
import torch

from medusa_nb.base_model import base_fingerprint
from medusa_nb.storage import append_line, claim, is_claimed, read_lines


class KeptStates:
    """States ``[n, D]`` of a model's answers by the conversation's id: those that each of its n tokens came from.

    ``states.bf16`` holds them one after the other, ``states.jsonl`` says whose they are: id, token ids, first row.
    What a killed process left half-written is cut off.

    Raises:
        InputError: the folder holds another model's states.
    """

    def __init__(self, folder: str | Path, model):
        self.width = model.get_output_embeddings().weight.shape[1]
        self.index_file, self.file = Path(folder) / "states.jsonl", Path(folder) / "states.bf16"
        if not is_claimed(self.file):  # of an earlier version, which did not count end tokens
            self.index_file.unlink(missing_ok=True)
        claim(self.file, dict(model=base_fingerprint(model), hidden_size=self.width))
        self.index = {row["id"]: row for row in read_lines(self.index_file, repair=True)}
        self.rows = max((row["start"] + len(row["ids"]) for row in self.index.values()), default=0)
        self.file.touch()
        with self.file.open("r+b") as handle:
            handle.truncate(self.rows * self.width * 2)

    def add(self, identity: str, ids: list[int], states: list[torch.Tensor]) -> None:
        """Keep the states ``[D]`` of one answer, as many as it has tokens."""
        rows = torch.stack(states).to(torch.bfloat16).contiguous().view(torch.int16).numpy()
        with self.file.open("ab") as handle:
            handle.write(rows.tobytes())
        record = dict(id=identity, ids=ids, start=self.rows)
        with self.index_file.open("a", encoding="utf-8") as handle:
            append_line(handle, record)
        self.index[identity], self.rows = record, self.rows + len(ids)

    def get(self, identity: str, ids: list[int]) -> torch.Tensor | None:
        """The states ``[n, D]`` of an answer of exactly these token ids, None if they are not here."""
        row = self.index.get(identity)
        if row is None or row["ids"] != ids:
            return None
        shape = (self.rows, self.width)
        rows = np.memmap(self.file, np.int16, "r", shape=shape)[row["start"] : row["start"] + len(ids)]
        return torch.from_numpy(np.array(rows)).view(torch.bfloat16)
