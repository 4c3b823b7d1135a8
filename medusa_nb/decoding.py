"""Speculative decoding with Medusa heads: draft a tree, verify it in one pass, keep the accepted path.

The whole algorithm is :meth:`Decoder.step`. What the base model would have said is never changed: a draft token is
kept only where it is the base model's own choice (Cai et al., arXiv 2401.10774, section 2).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from medusa_nb.base_model import as_ids, context_length
from medusa_nb.compilation import compile_decoder
from medusa_nb.drafting import Draft, State, StaticTree
from medusa_nb.errors import InputError
from medusa_nb.heads import Heads
from medusa_nb.logits import refuse_unsuitable
from medusa_nb.rope import refuse_mixed_rope, refuse_rope_switch
from medusa_nb.stopping import Stops
from medusa_nb.tree import ROOT_ONLY, Tree
from medusa_nb.verification import Choose, Verifier, greedy, longest_accepted_path

COPIED = -1  # in place of a head's number: the token was copied from the text
COLUMNS = 32  # attention reads a multiple of so many rows of the cache: odd numbers are slower


class Record(NamedTuple):
    """What one step did, for the host: see :class:`Step`. Each field is ``[B, ...]``."""

    accepted: torch.Tensor
    emitted: torch.Tensor
    path: torch.Tensor
    tokens: torch.Tensor
    parents: torch.Tensor
    copied: torch.Tensor

    def steps(self) -> list["Step"]:
        """A :class:`Step` for each sequence, fetched from the device in one piece."""
        widths = [field.shape[1] for field in self]
        rows = torch.cat([field.long() for field in self], dim=1).tolist()
        steps = []
        for row in rows:
            values = iter(row)
            accepted, emitted, path, tokens, parents, copied = ([next(values) for _ in range(n)] for n in widths)
            marked = {node for node, mark in enumerate(copied) if mark}
            steps.append(Step(tokens, path[: accepted[0]], emitted[: accepted[0]], parents, marked))
        return steps


@dataclass
class Step:
    """What one forward pass did to one sequence.

    ``tokens`` are the N candidates it read, ``parents`` the number of each one's parent, ``path`` the numbers of the
    accepted nodes (the root first), ``emitted`` the new tokens of the text: the accepted draft tokens, then the one
    the base model says after them. ``copied``: nodes whose tokens were copied from the text. The first step reads the
    prompt: no candidates, one token.
    """

    tokens: list[int]
    path: list[int]
    emitted: list[int]
    parents: list[int] = field(default_factory=list)
    copied: set[int] = field(default_factory=set)

    @property
    def drafted_by(self) -> list[int | None]:
        """For each emitted token the number of the head that drafted it, :data:`COPIED`, or None: the base model."""
        drafted = [COPIED if node in self.copied else i for i, node in enumerate(self.path[1:])]
        return [*drafted, None][: len(self.emitted)]


@dataclass
class Generation:
    """One decoded sequence, and how it came about.

    ``sequences`` ``[1, T_prompt + T_new]`` is what transformers' ``generate`` returns.
    """

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


@dataclass
class Slot:
    """A sequence on its way: how many new tokens it may still get. Set ``open`` to False to end it."""

    prompt: torch.Tensor
    budget: int
    open: bool = True

    def take(self, step: Step) -> Step:
        """The step, cut to what the budget allows."""
        step.emitted = step.emitted[: self.budget]
        self.budget -= len(step.emitted)
        self.open = self.open and self.budget > 0
        return step


class Decoder:
    """A base model, a draft, and a cache for ``slots`` sequences of up to ``max_length`` tokens.

    Args:
        model: a decoder-only transformers model.
        heads: heads of this model; None decodes plainly, one token per pass.
        tree: the candidate tree, at most as deep as there are heads.
        max_length: the longest text it must hold, prompt and new tokens; room for a tree is added.
        slots: how many sequences are decoded at once.
        choose: which token the base model says; greedy by default, else see :mod:`medusa_nb.sampling`.
        draft: another source of candidates than ``heads`` in ``tree``, see :mod:`medusa_nb.drafting`.

    Raises:
        InputError: the tree is deeper than there are heads, or the model cannot verify a tree of candidates.
    """

    def __init__(
        self,
        model,
        heads: Heads | None = None,
        tree: Tree = ROOT_ONLY,
        *,
        max_length: int,
        slots: int = 1,
        choose: Choose = greedy,
        draft: Draft | None = None,
    ):
        refuse_unsuitable(model)
        device = model.get_output_embeddings().weight.device
        self.draft = draft or StaticTree(heads, tree, device)
        self.model, self.slots, self.max_length = model, slots, max_length
        self.verifier = Verifier(model, slots, max_length + self.draft.size, choose)
        self.compile_seconds: float | None = None
        self.run, self.why_eager = self.step, "nobody asked for compiling"

    def step(self, state: State, span: int) -> tuple[State, Record]:
        """Draft a tree, verify it in one pass, keep the accepted path. Nothing here waits for the host."""
        candidates = self.draft(state)
        said, hidden = self.verifier.verify(candidates, state.lengths, span)
        path, accepted = longest_accepted_path(candidates, said, self.draft.depth)
        self.verifier.keep(path, state.lengths)
        return advance(state, candidates, said, hidden, path, accepted)

    def compile(self) -> float | None:
        """Compile the step for this machine; return the seconds it took.

        Where no compiler works: None. ``why_eager`` then says what stood in the way, and decoding goes on eagerly.
        """
        self.run, self.compile_seconds, self.why_eager = compile_decoder(self)
        return self.compile_seconds

    @property
    def compiled(self) -> bool:
        return self.compile_seconds is not None

    def span(self, longest: int) -> int:
        """Cache rows that attention reads when the longest sequence has ``longest`` tokens; a CUDA graph reads all."""
        capacity = self.verifier.capacity
        if self.compiled and self.verifier.device.type != "cpu":
            return capacity
        needed = longest + self.draft.size
        return min(capacity, (needed + COLUMNS - 1) // COLUMNS * COLUMNS)

    def slots_for(self, prompts: list[torch.Tensor], max_new_tokens: int) -> list[Slot]:
        """Slots for prompts, each ``[T]``; refuses too many, and what does not fit, see :meth:`budget`."""
        if not 0 < len(prompts) <= self.slots:
            raise InputError(f"there are {len(prompts)} prompts, the decoder has {self.slots} slot(s)")
        refuse_mixed_rope(self.model, prompts)
        return [Slot(prompt, self.budget(prompt, max_new_tokens)) for prompt in prompts]

    def budget(self, prompt: torch.Tensor, max_new_tokens: int) -> int:
        """How many new tokens the context leaves a prompt; refuses one that is empty or does not fit."""
        if not isinstance(prompt, torch.Tensor) or prompt.ndim != 1 or len(prompt) == 0:
            shape = tuple(getattr(prompt, "shape", ()))
            raise InputError(f"a prompt has the shape {shape}; a non-empty tensor of token ids [T] is expected")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens={max_new_tokens}; ask for at least one token")
        limit, length = context_length(self.model), len(prompt)
        if limit is not None and length >= limit:
            raise InputError(f"the prompt has {length} tokens, the model's context is {limit}; shorten the prompt")
        budget = max_new_tokens if limit is None else min(max_new_tokens, limit - length)
        if length + budget > self.max_length:
            raise InputError(
                f"{length} prompt tokens and {budget} new ones do not fit into the decoder's max_length of "
                f"{self.max_length}; make one with more"
            )
        refuse_rope_switch(self.model, length, length + budget + self.draft.depth)
        return budget

    @torch.inference_mode(False)  # compiled code expects the kind of tensors it was made for
    @torch.no_grad()
    def decode(self, slots: list[Slot]) -> Iterator[list[Step | None]]:
        """Yield what each forward pass did to each slot, until all have ended; None stands for one that has.

        A sequence that has ended stays in its slot and is decoded into the void.
        """
        spare = self.slots - len(slots) if self.compiled else 0  # a compiled step is for all slots
        prompts = [slot.prompt for slot in slots] + [slots[0].prompt] * spare
        state = self.start(prompts)
        lengths = [len(prompt) for prompt in prompts]
        yield [slot.take(Step([], [], [token])) for slot, token in zip(slots, state.token.tolist(), strict=False)]
        while going := [slot.open for slot in slots]:
            if not any(going):
                return
            if not all(going) or spare:  # those that have ended start again at row 0, where they do no harm
                kept = torch.tensor(going + [False] * spare, device=state.lengths.device)
                state = state._replace(lengths=state.lengths * kept)
            longest = max(length for length, on in zip(lengths, going, strict=False) if on)
            state, record = self.run(state, self.span(longest))
            steps = record.steps()[: len(slots)]
            lengths = [length + len(step.emitted) for length, step in zip(lengths, steps, strict=False)]
            yield [slot.take(step) if on else None for slot, step, on in zip(slots, steps, going, strict=True)]

    def start(self, prompts: list[torch.Tensor]) -> State:
        """Read the prompts: where the sequences stand before the first step."""
        state = self.verifier.read_prompts(prompts)
        if not self.draft.reads_text:
            return state
        text = torch.zeros(len(prompts), self.verifier.capacity, dtype=torch.long, device=state.token.device)
        for line, prompt in enumerate(prompts):
            text[line, : len(prompt)] = prompt
        return state._replace(text=text.scatter(1, state.lengths.unsqueeze(1), state.token.unsqueeze(1)))

    def generate(
        self,
        prompts: list[torch.Tensor],
        max_new_tokens: int = 256,
        eos_token_id: int | Iterable[int] | torch.Tensor | None = None,
        streamer=None,
        stop_strings: list[str] | None = None,
        tokenizer=None,
        stopping_criteria=None,
    ) -> list[Generation]:
        """Decode several prompts (each ``[T]``) at once, each to its own end.

        Args:
            max_new_tokens: an upper limit, lowered to what is left of the model's context.
            eos_token_id: one or several ids that end a text, kept as its last token; by default those of the
                model's generation config.
            streamer: a transformers streamer (one prompt only), fed with every pass's tokens.
            stop_strings: texts that end an answer, kept up to the token that completes one; needs ``tokenizer``.
            stopping_criteria: transformers' own, asked about each sequence after each of its tokens, without scores.

        Raises:
            InputError: see :meth:`slots_for`.
        """
        if streamer is not None and len(prompts) != 1:
            raise InputError(f"a streamer shows one text, there are {len(prompts)} prompts; decode them one by one")
        if stop_strings and tokenizer is None:
            raise InputError("stop_strings are compared with text; pass the tokenizer, too")
        ends = self.model.generation_config.eos_token_id if eos_token_id is None else eos_token_id
        stops = Stops(as_ids(ends), stop_strings, tokenizer, stopping_criteria)
        slots = self.slots_for(prompts, max_new_tokens)
        results = [Generation(prompt.unsqueeze(0), len(prompt)) for prompt in prompts]
        texts: list[list[int]] = [[] for _ in prompts]
        if streamer is not None:
            streamer.put(prompts[0].cpu())
        for steps in self.decode(slots):
            for slot, step, result, text in zip(slots, steps, results, texts, strict=True):
                if step is None:
                    continue
                step.emitted, stopped = stops.cut(slot.prompt, text, step.emitted)
                text += step.emitted
                result.steps.append(step)
                if streamer is not None:
                    streamer.put(torch.tensor(step.emitted))
                if stopped:
                    result.stopped_by, slot.open = stopped, False
        if streamer is not None:
            streamer.end()
        for result, text in zip(results, texts, strict=True):
            result.sequences = torch.cat([result.sequences, result.sequences.new_tensor([text])], dim=1)
        return results


def advance(state: State, candidates, said, hidden, path, accepted) -> tuple[State, Record]:
    """The state after a pass, and its record: the accepted draft tokens, then what the base model says after them."""
    last = path.gather(1, accepted.unsqueeze(1) - 1)  # [B, 1]: the node the accepted path ends with
    bonus = said.gather(1, last)
    emitted = candidates.tokens.gather(1, path).roll(-1, 1).scatter(1, accepted.unsqueeze(1) - 1, bonus)
    hidden = hidden.gather(1, last.unsqueeze(2).expand(-1, -1, hidden.shape[2]))[:, 0]
    text = state.text
    if text is not None:  # what stands after the new last token is overwritten later
        places = state.lengths.unsqueeze(1) + 1 + torch.arange(emitted.shape[1], device=emitted.device)
        text = text.scatter(1, places, emitted)
    record = Record(accepted.unsqueeze(1), emitted, path, candidates.tokens, candidates.parents, candidates.copied)
    return State(bonus[:, 0], hidden, state.lengths + accepted, text), record
