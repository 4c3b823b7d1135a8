"""What held-out answers say about guesses: how often which ranks, n-grams and tokens are right.

Everything that chooses a tree or a draft reads it from ``calibration.json`` beside the heads.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from medusa_nb.errors import InputError
from medusa_nb.features import Features, encode_conversation
from medusa_nb.heads import MedusaHeads
from medusa_nb.ngrams import ngram_worth
from medusa_nb.training import rank_table
from medusa_nb.tree import count_ranks

FILE, SPEEDS = "calibration.json", "tree_shapes.json"


@dataclass
class Calibration:
    """Counts over held-out answers of one domain, for one set of heads.

    Args:
        rank_counts: how often the true tokens had these ranks, see :func:`~medusa_nb.tree.count_ranks`.
        ngram_worth: how often tokens copied from the text are right, see :func:`~medusa_nb.ngrams.ngram_worth`.
        frequent: token ids of the draft vocabulary, most frequent first, see
            :func:`frequent_tokens`; that of the heads themselves if they have one.
        prompts: some prompts' token ids, to count tokens per pass on.
    """

    rank_counts: Counter
    ngram_worth: torch.Tensor
    frequent: torch.Tensor
    prompts: list[list[int]]

    def most_frequent(self, count: int) -> torch.Tensor:
        """The ``count`` most frequent of the draft vocabulary's ids.

        Raises:
            InputError: fewer are known, or the calibration is of a time when they were kept in order of their ids.
        """
        known = len(self.frequent)
        if not 0 < count <= known:
            raise InputError(f"{count} most frequent tokens: the calibration knows {known}; choose 1 to {known}")
        if count < known and bool((self.frequent.diff() > 0).all()):
            raise InputError("the calibration does not say which tokens are most frequent; calibrate the heads again")
        return self.frequent[:count]

    def save(self, folder: str | Path) -> None:
        """Write ``calibration.json`` into the heads' folder."""
        values = dict(
            rank_counts=[[list(path), count] for path, count in self.rank_counts.most_common()],
            ngram_worth=[[round(p, 5) for p in row] for row in self.ngram_worth.tolist()],
            frequent=self.frequent.tolist(),
            prompts=self.prompts,
        )
        (Path(folder) / FILE).write_text(json.dumps(values))
        (Path(folder) / SPEEDS).unlink(missing_ok=True)  # measured with what is now replaced

    @classmethod
    def load(cls, folder: str | Path) -> "Calibration":
        """Read it from the heads' folder.

        Raises:
            InputError: the file is not there or damaged.
        """
        file = Path(folder) / FILE
        if not file.is_file():
            raise InputError(f"there is no '{file}' with the ranks of these heads; train them again, or calibrate them")
        try:
            values = json.loads(file.read_text())
            return cls(
                Counter({tuple(path): count for path, count in values["rank_counts"]}),
                torch.tensor(values["ngram_worth"]),
                torch.tensor(values["frequent"]),
                values["prompts"],
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"'{file}' is damaged ({error}); calibrate the heads again") from error


def own_words(tokenizer, conversations: list[dict]) -> list[list[int]]:
    """The token ids that the model itself said in each conversation."""
    encoded = [encode_conversation(tokenizer, row["messages"]) for row in conversations]
    return [[i for i, own in zip(x.ids, x.own, strict=True) if own] for x in encoded]


def frequent_tokens(answers: list[list[int]], count: int) -> torch.Tensor:
    """The ``count`` ids that occur most often in answers, the most frequent first; equally frequent ones by id."""
    tally = Counter(token for answer in answers for token in answer)
    return torch.tensor(sorted(tally, key=lambda token: (-tally[token], token))[:count])


def draft_vocabulary(tokenizer, conversations: list[dict], count: int | None) -> torch.Tensor | None:
    """The ``count`` ids that the model said most often in these conversations; None for no count: any token."""
    if count is not None and count < 1:
        raise InputError(f"a draft vocabulary of {count} tokens is none; ask for at least one")
    return None if count is None else frequent_tokens(own_words(tokenizer, conversations), count)


def calibrate(
    heads: MedusaHeads,
    features: Features,
    tokenizer,
    held_out: list[dict],
    train: list[dict],
    *,
    ngram_tokens: int = 6,
    vocabulary_share: float = 0.25,
    prompts: int = 48,
) -> Calibration:
    """Count on answers that the heads were not trained on.

    Args:
        features: of ``held_out``, see :func:`~medusa_nb.features.cache_features`.
        held_out, train: conversations; heads without a draft vocabulary get that of ``train``.
        ngram_tokens: how many tokens are copied at most.
        vocabulary_share: of all tokens, how many may be guessed.
        prompts: how many of the held-out prompts are kept.
    """
    said = [encode_conversation(tokenizer, row["messages"]) for row in held_out]
    said = [x for x in said if True in x.own]
    frequent = heads.vocabulary
    if frequent is None:
        frequent = draft_vocabulary(tokenizer, train, max(2, int(len(tokenizer) * vocabulary_share)))
    return Calibration(
        count_ranks(rank_table(heads, features)),
        ngram_worth([x.ids for x in said], [x.own.index(True) for x in said], count=ngram_tokens),
        frequent,
        [x.ids[: x.own.index(True)] for x in said[:prompts]],
    )
