"""Speculative decoding with Medusa heads: guess a tree, check it in one pass, keep the right path.

The whole algorithm is :func:`decode`. What the base model would have said is never changed: a guess
is kept only where it is the base model's own choice (Cai et al., arXiv 2401.10774, section 2).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from medusa_nb.base_model import context_length, refuse_unsuitable
from medusa_nb.errors import InputError
from medusa_nb.heads import MedusaHeads
from medusa_nb.kv_cache import BufferCache
from medusa_nb.tree import ROOT_ONLY, Tree


@dataclass
class Step:
    """What one forward pass did.

    ``tokens`` are the N candidate tokens it read, ``path`` the numbers of the tree nodes it accepted
    (the root first) and ``emitted`` the new tokens of the text: the accepted guesses, then the token
    the base model says after them. The first step reads the prompt: no candidates, one token.
    """

    tokens: list[int]
    path: list[int]
    emitted: list[int]


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


def medusa_generate(
    model,
    heads: MedusaHeads | None,
    input_ids: torch.Tensor,
    *,
    tree: Tree,
    max_new_tokens: int = 256,
    eos_token_id: int | Iterable[int] | None = None,
) -> Generation:
    """Greedy decoding in fewer passes: the same text as :func:`greedy_generate`.

    Args:
        model: a decoder-only transformers model that takes a 4-D attention mask.
        heads: Medusa heads of this model; None only with a tree that is just a root.
        input_ids: ``[1, T]``.
        tree: the candidate tree; at most as deep as there are heads.
        max_new_tokens: an upper limit, lowered to what is left of the model's context.
        eos_token_id: one or several ids that end the text, kept as its last token; by default the
            model's generation config.

    Raises:
        InputError: the prompt is empty, batched or fills the context, or the tree does not fit.
    """
    result = Generation(input_ids, input_ids.shape[-1])
    for step in decode(model, heads, input_ids, tree, max_new_tokens):
        result.steps.append(step)
        step.emitted, stopped = cut_at_end(step.emitted, eos_ids(model, eos_token_id))
        if stopped:
            result.stopped_by = "eos"
            break
    emitted = [token for step in result.steps for token in step.emitted]
    result.sequences = torch.cat([input_ids, input_ids.new_tensor([emitted])], dim=1)
    return result


def greedy_generate(model, input_ids, max_new_tokens: int = 256, eos_token_id=None) -> Generation:
    """Plain greedy decoding: the same loop with nothing guessed, one token per pass."""
    return medusa_generate(
        model, None, input_ids, tree=ROOT_ONLY, max_new_tokens=max_new_tokens, eos_token_id=eos_token_id
    )


@torch.inference_mode()
def decode(
    model, heads: MedusaHeads | None, input_ids: torch.Tensor, tree: Tree, max_new_tokens: int
) -> Iterator[Step]:
    """Yield one :class:`Step` per forward pass until ``max_new_tokens`` are emitted.

    The caller stops earlier if it likes, for instance at an end-of-text token.
    """
    budget = check_request(model, heads, input_ids, tree, max_new_tokens)
    verifier = Verifier(model, tree, capacity=input_ids.shape[1] + budget + len(tree))
    root, hidden = verifier.read_prompt(input_ids)
    yield Step([], [], [root])
    budget -= 1
    while budget > 0:
        candidates = guess(heads, hidden, root, tree)  # [N]
        predictions, states = verifier.check(candidates)  # [N], [N, D]
        tokens, said = torch.stack([candidates, predictions]).tolist()  # the step's one read by the host
        path = longest_right_path(tree, tokens, said)
        verifier.keep(path)
        root, hidden = said[path[-1]], states[path[-1]]
        emitted = [tokens[node] for node in path[1:]] + [root]
        yield Step(tokens, path, emitted[:budget])
        budget -= len(emitted)


def guess(heads: MedusaHeads | None, hidden: torch.Tensor, root: int, tree: Tree) -> torch.Tensor:
    """The tree's N candidate tokens: the root, then each node's guess by its head and rank.

    ``hidden`` ``[D]`` is the state that produced the root, so head 0 guesses the token after it.
    """
    first = torch.tensor([root], device=hidden.device)
    if len(tree) == 1:
        return first
    top = heads(hidden, tree.depth).topk(tree.width, dim=-1).indices  # [depth, width]
    return torch.cat([first, top.flatten()[tree.guess_index.to(hidden.device)]])


def longest_right_path(tree: Tree, tokens: list[int], said: list[int]) -> list[int]:
    """Walk from the root along guesses that are what the base model says at their parent.

    ``tokens[i]`` is node i's token, ``said[i]`` the base model's next token after node i. The guesses
    under one parent are different tokens, so at most one of them is right.
    """
    path = [0]
    while right := [child for child in tree.children[path[-1]] if tokens[child] == said[path[-1]]]:
        path.append(right[0])
    return path


class Verifier:
    """The base model's side of a step: one pass over all candidates, each seeing its own path only.

    Tree attention needs no change to the model: a 4-D mask lets every candidate see the text and its
    ancestors, and its position is that of the root plus its depth.
    """

    def __init__(self, model, tree: Tree, capacity: int):
        self.backbone, self.lm_head = model.base_model, model.get_output_embeddings()
        self.cache = BufferCache(capacity)
        self.length = 0  # tokens whose keys and values are final
        device, dtype = self.lm_head.weight.device, model.dtype
        self.depths = tree.depths().to(device)
        self.last_position = (context_length(model) or capacity) - 1
        self.masks = TreeMasks(model.config.get_text_config(), tree, capacity, device, dtype)

    def read_prompt(self, input_ids: torch.Tensor) -> tuple[int, torch.Tensor]:
        """Read the prompt; return the token the model says next and the state ``[D]`` it said it from."""
        hidden = self.backbone(input_ids=input_ids, past_key_values=self.cache, use_cache=True).last_hidden_state[0, -1]
        self.length = input_ids.shape[1]
        return self.lm_head(hidden).argmax(-1).item(), hidden

    def check(self, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[N]`` candidates -> ``[N]`` what the base model says after each, ``[N, D]`` its states."""
        positions = (self.depths + self.length).clamp(max=self.last_position)
        hidden = self.backbone(
            input_ids=candidates.unsqueeze(0),
            attention_mask=self.masks.at(self.length),
            position_ids=positions.unsqueeze(0),
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[0]
        return self.lm_head(hidden).argmax(-1), hidden

    def keep(self, path: list[int]) -> None:
        """Make the accepted path part of the text and forget all other candidates."""
        self.cache.keep(self.length, path)
        self.length += len(path)


class TreeMasks:
    """Additive 4-D attention masks ``[1, 1, N, past + N]``: 0 where a candidate may look, else -inf.

    The mask of every text length is a slice of one buffer: zeros, and the tree's own mask at its right
    end. Layers with a sliding window see only that many tokens, so they get a mask of their own.
    """

    def __init__(self, config, tree: Tree, capacity: int, device, dtype):
        size = len(tree)
        self.capacity, self.dtype = capacity, dtype
        forbidden = torch.zeros(size, size, dtype=dtype).masked_fill(~tree.mask(), torch.finfo(dtype).min)
        self.buffer = torch.zeros(1, 1, size, capacity + size, dtype=dtype, device=device)
        self.buffer[..., capacity:] = forbidden.to(device)
        self.window = getattr(config, "sliding_window", None)
        self.layer_types = set(getattr(config, "layer_types", None) or [])
        if self.window and self.layer_types == {"full_attention"} or self.window is None:
            self.window = None
        self.depths = tree.depths().to(device)

    def at(self, past: int):
        """What the model's ``attention_mask`` takes when ``past`` tokens are in the cache."""
        full = self.buffer[..., self.capacity - past :]
        if self.window is None:
            return full if full.shape[-2] > 1 else None
        columns = torch.arange(past, device=full.device)
        hidden = columns <= (past + self.depths.unsqueeze(1) - self.window)  # [N, past]
        windowed = full.clone()
        windowed[..., :past].masked_fill_(hidden, torch.finfo(self.dtype).min)
        if self.layer_types:
            return {"full_attention": full, "sliding_attention": windowed}
        return windowed


def check_request(model, heads, input_ids: torch.Tensor, tree: Tree, max_new_tokens: int) -> int:
    """Refuse what cannot be decoded; return how many new tokens fit into the model's context."""
    refuse_unsuitable(model.config, model.config._name_or_path or type(model).__name__, type(model))
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise InputError(f"input_ids has the shape {tuple(input_ids.shape)}; one non-empty prompt [1, T] is expected")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens}; ask for at least one token")
    available = 0 if heads is None else heads.num_heads
    if tree.depth > available:
        raise InputError(
            f"the tree is {tree.depth} guesses deep, but there are {available} heads; prune it to that depth"
        )
    limit = context_length(model)
    if limit is not None and input_ids.shape[1] >= limit:
        raise InputError(
            f"the prompt has {input_ids.shape[1]} tokens, the model's context is {limit}; shorten the prompt"
        )
    return max_new_tokens if limit is None else min(max_new_tokens, limit - input_ids.shape[1])


def eos_ids(model, eos_token_id) -> set[int]:
    """The ids that end a text: those given, or else those of the model's generation config."""
    ids = model.generation_config.eos_token_id if eos_token_id is None else eos_token_id
    if ids is None:
        return set()
    return {ids} if isinstance(ids, int) else set(ids)


def cut_at_end(emitted: list[int], ends: set[int]) -> tuple[list[int], bool]:
    """Drop what an accepted run holds after an end token; say whether there was one."""
    for i, token in enumerate(emitted):
        if token in ends:
            return emitted[: i + 1], True
    return emitted, False
