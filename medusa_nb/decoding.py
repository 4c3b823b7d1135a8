"""Speculative decoding with Medusa heads: guess a tree, check it in one pass, keep the right path.

The whole algorithm is :meth:`Decoder.step`. What the base model would have said is never changed: a
guess is kept only where it is the base model's own choice (Cai et al., arXiv 2401.10774, section 2).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from medusa_nb.base_model import context_length, refuse_unsuitable
from medusa_nb.compilation import compile_step
from medusa_nb.drafting import Candidates, DynamicDraft, State, TreeDraft, refuse_deep
from medusa_nb.errors import InputError
from medusa_nb.heads import MedusaHeads
from medusa_nb.tree import ROOT_ONLY, Tree
from medusa_nb.verification import Accept, Choose, Verifier, best, same

NGRAM = -1  # in place of a head's number: copied from the text
COLUMNS = 32  # attention reads a multiple of so many: kernels like that better than odd numbers


@dataclass
class Step:
    """What one forward pass did to one text.

    ``tokens`` are the N candidate tokens it read, ``path`` the numbers of the tree nodes it accepted
    (the root first), ``parents`` the number of each node's parent and ``emitted`` the new tokens of the text:
    the accepted guesses, then the token the base model says after them. ``copied`` are the nodes whose tokens
    were copied from the text. The first step reads the prompt: no candidates, one token.
    """

    tokens: list[int]
    path: list[int]
    emitted: list[int]
    parents: list[int] = field(default_factory=list)
    copied: set[int] = field(default_factory=set)

    @property
    def guessed_by(self) -> list[int | None]:
        """For each emitted token the number of the head that guessed it, :data:`NGRAM`, or None: the base model."""
        guesses = [NGRAM if node in self.copied else i for i, node in enumerate(self.path[1:])]
        return (guesses + [None])[: len(self.emitted)]


@dataclass
class Generation:
    """``sequences`` ``[1, T_prompt + T_new]`` like transformers' own, and how it came about."""

    sequences: torch.Tensor
    prompt_length: int
    stopped_by: str = "length"
    steps: list[Step] = field(default_factory=list)

    @property
    def tokens_per_pass(self) -> list[int]:
        """Tokens emitted by each forward pass; the first pass reads the prompt and emits one."""
        return [len(step.emitted) for step in self.steps]

    @property
    def new_tokens(self) -> list[int]:
        return self.sequences[0, self.prompt_length :].tolist()


class Decoder:
    """A base model, its heads and tree, and buffers for ``slots`` texts of up to ``capacity`` tokens.

    Args:
        model: a decoder-only transformers model that takes a 4-D attention mask.
        heads: Medusa heads of this model; None only with a tree that is just a root (plain decoding).
        tree: the candidate tree; at most as deep as there are heads.
        slots: how many texts are decoded at once.
        capacity: room of a slot: prompt, new tokens and one tree.
        choose: what counts as said by the base model; greedy by default, see :mod:`medusa_nb.sampling`.
        accept: which guesses count as right; the lossless rule by default.
        draft: another source of candidates than ``heads`` in ``tree``, see :mod:`medusa_nb.drafting`.

    Raises:
        InputError: the model is no decoder with attention only, or the tree is deeper than the heads.
    """

    def __init__(
        self,
        model,
        heads: MedusaHeads | None = None,
        tree: Tree = ROOT_ONLY,
        *,
        capacity: int,
        slots: int = 1,
        choose: Choose = best,
        accept: Accept = same,
        draft: TreeDraft | DynamicDraft | None = None,
    ):
        refuse_unsuitable(model.config, model.config._name_or_path or type(model).__name__, type(model))
        refuse_deep(tree, heads)
        self.model, self.slots, self.capacity = model, slots, capacity
        self.verifier = Verifier(model, slots, capacity, choose, accept)
        self.draft = draft or TreeDraft(heads, tree, self.verifier.device)
        self.run, self.compile_seconds, self.why_eager, self.library = self.step, None, "", False

    def step(self, state: State, span: int) -> tuple[State, torch.Tensor]:
        """Guess a tree, check it in one pass, keep the longest right path. Nothing here waits for the host.

        Returns:
            The state after the pass, and for the host a record ``[B, 1 + P + P + N + N + N]``: how many nodes were
            accepted, what was emitted, the accepted path; the candidates' tokens, parents, and which are copied.
        """
        candidates = self.draft(state)
        said, right, hidden = self.verifier.check(candidates, state.lengths, span)
        path, count = longest_right_path(candidates, right, self.draft.depth)
        self.verifier.keep(path, state.lengths)
        last = path.gather(1, count.unsqueeze(1) - 1)
        root = said.gather(1, last)  # what the base model says after the path comes on top of it
        emitted = candidates.tokens.gather(1, path).roll(-1, 1).scatter(1, count.unsqueeze(1) - 1, root)
        root = root[:, 0]
        hidden = hidden.gather(1, last.unsqueeze(2).expand(-1, -1, hidden.shape[2]))[:, 0]
        text = state.text
        if text is not None:
            places = state.lengths.unsqueeze(1) + 1 + torch.arange(emitted.shape[1], device=emitted.device)
            text = text.scatter(1, places, emitted)  # what stands behind the new root is overwritten later
        copied = torch.zeros_like(candidates.tokens) if candidates.copied is None else candidates.copied.long()
        record = torch.cat([count.unsqueeze(1), emitted, path, candidates.tokens, candidates.parents, copied], dim=1)
        return State(root, hidden, state.lengths + count, text), record

    def compile(self, library: bool = False) -> float | None:
        """Compile the step for this machine; return the seconds it took.

        ``library``: leave multiplications and attention to the libraries, also where our own kernels are faster (to
        compare). Where no compiler works: None, ``why_eager`` says what it tripped over, and decoding goes on eagerly.
        """
        self.run, self.compile_seconds, self.why_eager = compile_step(self, library)
        self.library = library
        return self.compile_seconds

    @property
    def compiled(self) -> bool:
        return self.compile_seconds is not None

    def span(self, longest: int) -> int:
        """Columns that attention reads when the longest text has ``longest`` tokens; CUDA graphs always read all."""
        if self.compiled and self.verifier.device.type != "cpu":
            return self.capacity
        return min(self.capacity, -(-(longest + self.draft.size) // COLUMNS) * COLUMNS)

    @torch.inference_mode(False)  # what was compiled is called without looking, so it must find what it was made for
    @torch.no_grad()
    def decode(self, prompts: list[torch.Tensor], max_new_tokens: int) -> Iterator[list[Step | None]]:
        """Yield what each forward pass did to each text, until all have ``max_new_tokens``.

        None stands for a text that has ended. The caller ends one earlier with :meth:`retire`.
        """
        if not 0 < len(prompts) <= self.slots:
            raise InputError(f"there are {len(prompts)} prompts, the decoder has {self.slots} slot(s)")
        budgets = [check_request(self, prompt, max_new_tokens) for prompt in prompts]
        texts, spare = len(prompts), self.slots - len(prompts) if self.compiled else 0
        prompts = prompts + prompts[:1] * spare  # a compiled step is for all slots: the others decode into the void
        self.going = [True] * texts + [False] * spare
        state = self.start(prompts)
        yield [Step([], [], [token]) for token in state.root.tolist()[:texts]]
        read, left = [len(prompt) for prompt in prompts], [budget - 1 for budget in budgets] + [0] * spare
        while any(going := [a and b > 0 for a, b in zip(self.going, left, strict=True)]):
            if not all(going):  # a text that has ended stays in its slot and is decoded into the void
                state = state._replace(lengths=state.lengths * torch.tensor(going, device=state.lengths.device))
            longest = max(length for length, on in zip(read, going, strict=True) if on)
            state, record = self.run(state, self.span(longest))
            steps = [self.read(row) if on else None for row, on in zip(record.tolist(), going, strict=True)]
            for i, step in enumerate(steps):
                if step:
                    read[i] += len(step.emitted)
                    step.emitted = step.emitted[: left[i]]
                    left[i] -= len(step.emitted)
            yield steps[:texts]

    def start(self, prompts: list[torch.Tensor]) -> State:
        """Read the prompts: where the texts stand before the first step."""
        state = self.verifier.read_prompts(prompts)
        if not self.draft.reads_text:
            return state
        text = torch.zeros(len(prompts), self.capacity, dtype=torch.long, device=state.root.device)
        for line, prompt in enumerate(prompts):
            text[line, : len(prompt)] = prompt
        return state._replace(text=text.scatter(1, state.lengths.unsqueeze(1), state.root.unsqueeze(1)))

    def retire(self, text: int) -> None:
        """End a text: its slot does no harm from now on."""
        self.going[text] = False

    def read(self, record: list[int]) -> Step:
        """One row of a step's record, read by the host."""
        count, places, size = record[0], self.draft.depth + 1, self.draft.size
        emitted, path, rest = record[1 : 1 + places], record[1 + places : 1 + 2 * places], record[1 + 2 * places :]
        copied = {node for node, mark in enumerate(rest[2 * size :]) if mark}
        return Step(rest[:size], path[:count], emitted[:count], rest[size : 2 * size], copied)

    def generate(
        self,
        prompts: list[torch.Tensor],
        max_new_tokens: int = 256,
        eos_token_id: int | Iterable[int] | None = None,
        streamer=None,
        stop_strings: list[str] | None = None,
        tokenizer=None,
        stopping_criteria=None,
    ) -> list[Generation]:
        """Decode several prompts (each ``[T]``) at once, each to its own end.

        Args:
            max_new_tokens: an upper limit, lowered to what is left of the model's context.
            eos_token_id: one or several ids that end a text, kept as its last token; by default the
                model's generation config.
            streamer: a transformers streamer (one prompt only), fed with every pass's tokens.
            stop_strings: texts that end an answer, kept up to the token that completes one; needs
                ``tokenizer``.
            stopping_criteria: transformers' own, asked about each text after each of its tokens, without scores.

        Raises:
            InputError: a prompt is empty or fills the context or the decoder's capacity.
        """
        if streamer is not None and len(prompts) != 1:
            raise InputError(f"a streamer shows one text, there are {len(prompts)} prompts; decode them one by one")
        if stop_strings and tokenizer is None:
            raise InputError("stop_strings are compared with text; pass the tokenizer, too")
        ends = eos_ids(self.model, eos_token_id)
        results = [Generation(prompt.unsqueeze(0), len(prompt)) for prompt in prompts]
        texts: list[list[int]] = [[] for _ in prompts]
        if streamer is not None:
            streamer.put(prompts[0].cpu())
        for steps in self.decode(prompts, max_new_tokens):
            for i, step in enumerate(steps):
                if step is None:
                    continue
                step.emitted, stopped = cut_at_end(step.emitted, ends)
                if stop_strings:
                    step.emitted, found = cut_at_string(texts[i], step.emitted, stop_strings, tokenizer)
                    stopped = "stop string" if found else stopped
                if stopping_criteria:
                    before = torch.cat([results[i].sequences[0], results[i].sequences.new_tensor(texts[i])])
                    step.emitted, found = cut_at_criteria(before, step.emitted, stopping_criteria)
                    stopped = "stopping criteria" if found else stopped
                texts[i] += step.emitted
                results[i].steps.append(step)
                if streamer is not None:
                    streamer.put(torch.tensor(step.emitted))
                if stopped:
                    results[i].stopped_by = stopped
                    self.retire(i)
        if streamer is not None:
            streamer.end()
        for result, text in zip(results, texts, strict=True):
            result.sequences = torch.cat([result.sequences, result.sequences.new_tensor([text])], dim=1)
        return results


def longest_right_path(candidates: Candidates, right: torch.Tensor, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The longest path of right guesses: a node is reached if it and all nodes above it are right.

    Args:
        candidates: trees of B texts.
        right: ``[B, N]``, whether each guess is right at its place; what it says of the root is not asked.
        depth: the depth a tree can have.

    Returns:
        The path ``[B, depth + 1]`` as node numbers from the root on, and how many of them count ``[B]``.
    """
    right = right | (candidates.depths == 0)  # the root is certain
    reached = (right.unsqueeze(1) | ~candidates.ancestors).all(2)  # [B, N]
    deepest = torch.where(reached, candidates.depths, -1)
    end = deepest.argmax(1, keepdim=True)  # [B, 1]
    row = candidates.ancestors.gather(1, end.unsqueeze(2).expand(-1, -1, right.shape[1]))  # [B, 1, N]
    levels = torch.arange(depth + 1, device=right.device).view(1, -1, 1)
    path = (row & (candidates.depths.unsqueeze(1) == levels)).int().argmax(2)
    return path, deepest.gather(1, end)[:, 0] + 1


def medusa_generate(
    model,
    heads: MedusaHeads | None,
    input_ids: torch.Tensor,
    *,
    tree: Tree,
    max_new_tokens: int = 256,
    eos_token_id: int | Iterable[int] | None = None,
    **options,
) -> Generation:
    """Greedy decoding of one prompt ``[1, T]`` in fewer passes: the same text as :func:`greedy_generate`.

    Makes a :class:`Decoder` for this one prompt; ``options`` are those of :meth:`Decoder.generate`. To decode
    many prompts, several at once, or compiled, make a :class:`Decoder` and keep it.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise InputError(f"input_ids has the shape {tuple(input_ids.shape)}; one non-empty prompt [1, T] is expected")
    capacity = input_ids.shape[1] + max(0, max_new_tokens) + len(tree)
    decoder = Decoder(model, heads, tree, capacity=capacity)
    return decoder.generate([input_ids[0]], max_new_tokens, eos_token_id, **options)[0]


def greedy_generate(model, input_ids, max_new_tokens: int = 256, eos_token_id=None, **options) -> Generation:
    """Plain greedy decoding: the same loop with nothing guessed, one token per pass."""
    return medusa_generate(
        model, None, input_ids, tree=ROOT_ONLY, max_new_tokens=max_new_tokens, eos_token_id=eos_token_id, **options
    )


def check_request(decoder: Decoder, prompt: torch.Tensor, max_new_tokens: int) -> int:
    """Refuse what cannot be decoded; return how many new tokens fit into the model's context."""
    if prompt.ndim != 1 or len(prompt) == 0:
        raise InputError(f"a prompt has the shape {tuple(prompt.shape)}; a non-empty one [T] is expected")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens}; ask for at least one token")
    limit = context_length(decoder.model)
    if limit is not None and len(prompt) >= limit:
        raise InputError(f"the prompt has {len(prompt)} tokens, the model's context is {limit}; shorten the prompt")
    budget = max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt))
    if len(prompt) + budget + decoder.draft.size > decoder.capacity:
        raise InputError(
            f"{len(prompt)} prompt tokens, {budget} new ones and a tree of {decoder.draft.size} do not fit into the "
            f"decoder's capacity of {decoder.capacity}; make one with more"
        )
    return budget


def eos_ids(model, eos_token_id) -> set[int]:
    """The ids that end a text: those given, or else those of the model's generation config."""
    ids = model.generation_config.eos_token_id if eos_token_id is None else eos_token_id
    if ids is None:
        return set()
    return {ids} if isinstance(ids, int) else set(ids)


def cut_at_end(emitted: list[int], ends: set[int]) -> tuple[list[int], str]:
    """Drop what an accepted run holds after an end token; ``"eos"`` if there was one, else empty."""
    for i, token in enumerate(emitted):
        if token in ends:
            return emitted[: i + 1], "eos"
    return emitted, ""


def cut_at_criteria(before: torch.Tensor, emitted: list[int], criteria) -> tuple[list[int], bool]:
    """Drop what follows the token after which transformers' stopping criteria end the text; say whether they do."""
    for i in range(len(emitted)):
        text = torch.cat([before, before.new_tensor(emitted[: i + 1])]).unsqueeze(0)
        if bool(torch.as_tensor(criteria(text, None)).all()):
            return emitted[: i + 1], True
    return emitted, False


def cut_at_string(text: list[int], emitted: list[int], stops: list[str], tokenizer) -> tuple[list[int], bool]:
    """Drop what follows the token that completes a stop string; say whether there was one."""
    tail = text[-max(map(len, stops)) :]  # a stop string spans at most as many tokens as it has characters
    before = len(tokenizer.decode(tail))
    for i in range(len(emitted)):
        written = tokenizer.decode(tail + emitted[: i + 1])
        if any(written.find(stop, max(0, before - len(stop) + 1)) >= 0 for stop in stops):
            return emitted[: i + 1], True
    return emitted, False
