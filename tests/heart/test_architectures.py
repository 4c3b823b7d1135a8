"""Every causal language model of the installed transformers: exactly its own text and distribution, or refused.

Run as a script, it prints the table.
"""

import random
from collections import Counter

import pytest
import torch
import transformers
from architectures import NOT_BUILT, VARIANTS, VOCABULARY, model_types, tiny_model

from medusa_nb.decoding import Decoder
from medusa_nb.drafting import Candidates
from medusa_nb.errors import InputError
from medusa_nb.tree import Tree

NEW = 18  # with prompts of 5 and 19 tokens, texts grow across windows of 8 and long rope from 24 on
TREE = Tree.from_paths([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1)])  # eight nodes, three deep
LEAVES = [node for node, children in enumerate(TREE.children) if not children]


class Oracle:
    """A draft that knows how each text goes on, and puts a random part of it into a random path of the tree."""

    reads_text, size, depth = False, len(TREE), TREE.depth

    def __init__(self, texts: list[list[int]]):
        self.texts, self.chance = texts, random.Random(0)
        parts = (torch.tensor([max(0, parent) for parent in TREE.parents]), TREE.depths(), TREE.mask())
        self.fixed = [part.expand(len(texts), *part.shape) for part in parts]

    def __call__(self, state) -> Candidates:
        rows = zip(self.texts, state.token.tolist(), state.lengths.tolist(), strict=True)
        tokens = torch.tensor([self.guess(*row) for row in rows])
        return Candidates(tokens, *self.fixed, torch.zeros_like(tokens) > 0)

    def guess(self, text: list[int], root: int, length: int) -> list[int]:
        right = self.chance.choice(TREE.paths)
        tokens = [root]
        for path in TREE.paths[1:]:
            known = path == right[: len(path)] and length + len(path) < len(text)
            tokens.append(text[length + len(path)] if known else self.chance.randrange(VOCABULARY))
        return tokens


def prompt(length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length))


def own_text(model, ids: torch.Tensor) -> list[int]:
    """What ``model.generate`` makes of a prompt, greedily."""
    batch = ids.unsqueeze(0)
    options = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return model.generate(batch, attention_mask=torch.ones_like(batch), **options)[0].tolist()


@torch.no_grad()
def comparison(model) -> tuple[str, str]:
    """``("refused", the sentence)``, ``("equal", tokens per pass)`` or ``("different", where)``."""
    prompts = [prompt(5), prompt(19)]
    draft = Oracle([own_text(model, ids) for ids in prompts])
    try:
        decoder = Decoder(model, max_length=40, slots=2, draft=draft)
        results = decoder.generate(prompts, NEW, eos_token_id=[])
    except InputError as error:
        return "refused", str(error)
    for text, result in zip(draft.texts, results, strict=True):
        if result.sequences[0].tolist() != text:
            return "different", f"{result.sequences[0].tolist()} is not {text}"
    state = decoder.start(prompts)
    candidates = draft(state)
    logits, _ = decoder.verifier.look(candidates, state.lengths, decoder.span(19))
    for i, ids in enumerate(prompts):
        for leaf in LEAVES:
            path = TREE.mask()[leaf].nonzero()[:, 0]
            text = torch.cat([ids, candidates.tokens[i, path]])
            wanted = model(input_ids=text[None], use_cache=False).logits[0, -len(path) :]
            gap = (logits[i, path].softmax(-1) - wanted.softmax(-1)).abs().sum(-1).max().item()
            if not gap < 1e-3:
                return "different", f"another distribution on the path to node {leaf} of text {i}, by {gap}"
    steps = [len(step.path) for result in results for step in result.steps[1:]]
    return "equal", f"{sum(steps) / len(steps):.2f} tokens per pass"


@pytest.mark.parametrize("name", [*model_types(), *VARIANTS])
def test_text_and_distribution_are_the_models_own_or_it_is_refused(name):
    model = tiny_model(name)
    outcome, words = comparison(model)
    assert outcome in ("equal", "refused"), words
    if outcome == "equal":
        assert float(words.split()[0]) > 1.5  # many draft tokens were accepted, so the test is about them, too
    else:
        assert type(model).__name__ in words and "\n" not in words and len(words) < 400


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2", "gemma3_text", "phi3", "granite", "gpt_oss"])
def test_well_known_architectures_are_not_refused(name):
    assert comparison(tiny_model(name))[0] == "equal"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    counts: Counter[str] = Counter({"not built": len(NOT_BUILT)})
    for name in (*model_types(), *VARIANTS):
        outcome, words = comparison(tiny_model(name))
        counts[outcome] += 1
        print(f"{name:36} {outcome:10} {words}", flush=True)
    print(dict(counts))
