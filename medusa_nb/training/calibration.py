"""What held-out answers say about draft tokens: which ranks, which copied tokens, which vocabulary are right how often.

Whatever chooses a tree or a draft reads it from ``calibration.json`` beside the heads.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from medusa_nb.drafting import GrowingTree, StaticTree
from medusa_nb.errors import InputError
from medusa_nb.heads import Heads
from medusa_nb.ngrams import ngram_worth
from medusa_nb.path_heads import PathHeads
from medusa_nb.storage import read_json, write_json
from medusa_nb.training.features import encode_answer
from medusa_nb.tree import Tree, build_tree, count_ranks

FILE = "calibration.json"
COPIED_TOKENS = 12  # the longest run of tokens that is copied from the text
KEPT_VOCABULARY = 4096  # the most frequent tokens that are remembered


@dataclass
class Calibration:
    """Counts over held-out answers of one domain, for one set of heads.

    Args:
        rank_counts: how often the true tokens had these ranks, see :func:`~medusa_nb.tree.count_ranks`.
        ngram_worth: how often tokens copied from the text are right, see :func:`~medusa_nb.ngrams.ngram_worth`.
        frequent: the most frequent token ids, most frequent first: what a draft vocabulary is made of.
    """

    rank_counts: Counter
    ngram_worth: torch.Tensor
    frequent: torch.Tensor

    def tree(self, size: int) -> Tree:
        """The static tree of ``size`` nodes that is right most often."""
        return build_tree(self.rank_counts, size)

    def growing_tree(self, heads: Heads, size: int, copy: bool = True) -> GrowingTree:
        """A tree of ``size`` nodes that grows at every step, with (``copy``) or without copied tokens."""
        return GrowingTree(heads, size, ngram_worth=self.ngram_worth if copy else None)

    def draft(self, heads: Heads, size: int) -> StaticTree | GrowingTree:
        """What suits these heads: a growing tree for those that see the path, else the static one."""
        if isinstance(heads, PathHeads):
            return self.growing_tree(heads, size)
        return StaticTree(heads, self.tree(size), heads.device)

    def save(self, folder: str | Path) -> None:
        """Write ``calibration.json`` into the heads' folder."""
        values = dict(
            rank_counts=[[list(path), count] for path, count in self.rank_counts.most_common()],
            ngram_worth=[[round(p, 5) for p in row] for row in self.ngram_worth.tolist()],
            frequent=self.frequent.tolist(),
        )
        write_json(Path(folder) / FILE, values, indent=None)

    @classmethod
    def load(cls, folder: str | Path) -> "Calibration":
        """Read it from the heads' folder.

        Raises:
            InputError: the file is not there or damaged.
        """
        file = Path(folder) / FILE
        if not file.is_file():
            raise InputError(f"there is no '{file}' with the ranks of these heads; train them again")
        values = read_json(file)
        try:
            return cls(
                Counter({tuple(path): count for path, count in values["rank_counts"]}),
                torch.tensor(values["ngram_worth"]),
                torch.tensor(values["frequent"]),
            )
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"'{file}' is damaged ({error}); train the heads again") from error


def draft_vocabulary(tokenizer, conversations: list[dict], count: int) -> torch.Tensor:
    """The ``count`` ids that the model said most often in these conversations, the most frequent first.

    Equally frequent ones stand in order of their ids.
    """
    if count < 1:
        raise InputError(f"a draft vocabulary of {count} tokens is none; ask for at least one")
    tally: Counter = Counter()
    for row in conversations:
        encoded = encode_answer(tokenizer, row)
        tally.update(token for token, mine in zip(encoded.ids, encoded.own, strict=True) if mine)
    return torch.tensor(sorted(tally, key=lambda token: (-tally[token], token))[:count])


def calibrate(heads: Heads, ranks: torch.Tensor, tokenizer, held_out: list[dict], train: list[dict]) -> Calibration:
    """Count on answers that the heads were not trained on.

    Args:
        ranks: of the true tokens of ``held_out``, see :func:`~medusa_nb.training.loss.rank_table`.
        held_out, train: answered conversations.
    """
    said = [x for x in (encode_answer(tokenizer, row) for row in held_out) if True in x.own]
    return Calibration(
        count_ranks(ranks),
        ngram_worth([x.ids for x in said], [x.own.index(True) for x in said], count=COPIED_TOKENS),
        heads.vocabulary if heads.vocabulary is not None else draft_vocabulary(tokenizer, train, KEPT_VOCABULARY),
    )
