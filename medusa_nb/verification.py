"""The base model's side of a step: one pass over all candidates, each seeing only its own path.

Tree attention needs no change to the model: a 4-D mask lets every candidate see the text and its own ancestors, and a
candidate's position is the root's plus its depth, so siblings share a position.
"""

import re
import weakref
from collections.abc import Callable

import torch
from transformers import DynamicCache

from medusa_nb.base_model import context_length
from medusa_nb.drafting import Candidates, State, filled
from medusa_nb.errors import InputError
from medusa_nb.kv_cache import SlotCache
from medusa_nb.logits import deviation, first_line, logits_function, name_of, require_finite, some_tokens, tolerance
from medusa_nb.rope import rope_switches
from medusa_nb.tree import ROOT_ONLY, Tree

Choose = Callable[[torch.Tensor], torch.Tensor]


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The most likely token: ``[..., V] -> [...]``."""
    return logits.max(-1).indices  # as argmax, which is several times slower in bf16 on a CPU


class Verifier:
    """A model and a key-value cache for ``slots`` sequences of at most ``capacity`` tokens, candidates included.

    Args:
        choose: which token the base model says: logits ``[..., V] -> [...]``.
        check: off only for the check itself.

    Raises:
        InputError: the model is not one whose passes can be shared by several candidates, see :func:`check_model`.
    """

    def __init__(self, model, slots: int, capacity: int, choose: Choose = greedy, check: bool = True):
        if check:
            check_model(model, capacity)
        self.model, self.choose, self.capacity = model, choose, capacity
        self.device, self.dtype = model.get_output_embeddings().weight.device, model.dtype
        self.backbone, self.logits = model.base_model, logits_function(model)
        self.cache = SlotCache(slots, capacity)
        self.last_position = (context_length(model) or capacity) - 1
        config = model.config.get_text_config()
        self.layer_types = set(getattr(config, "layer_types", None) or [])
        self.window = attention_window(model)
        self.one_by_one = bool(rope_switches(model))

    @torch.no_grad()
    def read_prompts(self, prompts: list[torch.Tensor], slots: list[int] | None = None) -> State:
        """Read prompts (each ``[T]``) into ``slots`` (default: the first ones) and choose the first token of each.

        They are read in one pass, padded on the right, where causal attention never looks; one by one where the
        model treats a text otherwise because of a longer neighbour.
        """
        slots = list(range(len(prompts))) if slots is None else slots
        groups = [[i] for i in range(len(prompts))] if self.one_by_one else [list(range(len(prompts)))]
        states = []
        for group in groups:
            lengths = torch.tensor([len(prompts[i]) for i in group], device=self.device)
            ids = torch.nn.utils.rnn.pad_sequence([prompts[i] for i in group], batch_first=True).to(self.device)
            hidden, keys_values = self.read(ids)
            self.cache.fill([slots[i] for i in group], keys_values)
            hidden = hidden[torch.arange(len(group), device=self.device), lengths - 1]
            states.append((self.choose(self.logits(hidden.unsqueeze(1))[:, 0]), hidden, lengths))
        return State(*map(torch.cat, zip(*states, strict=True)))

    def read(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """One causal pass over ``[B, T]``: states ``[B, T, D]``, and per layer keys and values ``[B, heads, T, d]``."""
        cache = DynamicCache()
        backbone = self.model.base_model  # a compiled one takes no such cache
        hidden = backbone(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
        layers: list = cache.layers  # those without keys and values are refused by the check
        return hidden, [(layer.keys, layer.values) for layer in layers]

    def verify(self, candidates: Candidates, lengths: torch.Tensor, span: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass over all candidates: what the base model says after each ``[B, N]``, and the states ``[B, N, D]``.

        ``span``: how many cache rows attention reads, at least the longest sequence and its candidates.
        """
        logits, hidden = self.look(candidates, lengths, span)
        return self.choose(logits), hidden

    def look(self, candidates: Candidates, lengths: torch.Tensor, span: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The pass itself: logits ``[B, N, V]`` and states ``[B, N, D]``."""
        self.cache.write_at(lengths, candidates.tokens.shape[1], span)
        hidden = self.backbone(
            input_ids=candidates.tokens,
            attention_mask=self.attention_mask(candidates, lengths, span),
            position_ids=(candidates.depths + lengths.unsqueeze(1)).clamp(max=self.last_position),
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        return self.logits(hidden), hidden

    def keep(self, path: torch.Tensor, lengths: torch.Tensor) -> None:
        """Make the accepted path ``[B, P]`` part of each sequence; all other candidates are forgotten."""
        self.cache.keep(lengths, path)

    def attention_mask(self, candidates: Candidates, lengths: torch.Tensor, span: int):
        """Additive 4-D mask ``[B, 1, N, span]``: 0 where a candidate may look, else the lowest number.

        Layers with a sliding window see only that many positions back, so they get a mask of their own.
        """
        count = candidates.tokens.shape[1]
        columns = torch.arange(span, device=self.device)
        number = columns - lengths.unsqueeze(1)  # [B, span]: which candidate a column holds; below 0: the text
        inside = number.clamp(0, count - 1)
        on_path = candidates.mask.gather(2, inside.unsqueeze(1).expand(-1, count, -1))  # [B, N, span]
        visible = (number < 0).unsqueeze(1) | (on_path & (number < count).unsqueeze(1))
        full = self._additive(visible)
        if self.window is None:
            return full
        position = torch.where(number < 0, columns, lengths.unsqueeze(1) + candidates.depths.gather(1, inside))
        own = (lengths.unsqueeze(1) + candidates.depths).unsqueeze(2)  # [B, N, 1]
        windowed = self._additive(visible & (position.unsqueeze(1) > own - self.window))
        if self.layer_types:
            return {"full_attention": full, "sliding_attention": windowed}
        return windowed

    def _additive(self, visible: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        return torch.where(visible, zero, torch.finfo(self.dtype).min).unsqueeze(1)


def longest_accepted_path(candidates: Candidates, said: torch.Tensor, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The longest path of draft tokens that the base model would have said itself.

    A node is accepted if its token is what the base model says after its parent, and all its ancestors are accepted.

    Args:
        candidates: trees of B sequences.
        said: ``[B, N]``, what the base model says after each node.
        depth: how deep a tree can be.

    Returns:
        The path ``[B, depth + 1]`` as node numbers, the root first, and how many of them count ``[B]``.
    """
    right = candidates.tokens == said.gather(1, candidates.parents)
    right = right | (candidates.depths == 0)  # the root is certain
    accepted = (right.unsqueeze(1) | ~candidates.mask).all(2)  # [B, N]: right, and so are all its ancestors
    deepest = torch.where(accepted, candidates.depths, -1)
    end = deepest.argmax(1, keepdim=True)  # [B, 1]
    row = candidates.mask.gather(1, end.unsqueeze(2).expand(-1, -1, right.shape[1]))  # [B, 1, N]: the path to the end
    levels = torch.arange(depth + 1, device=right.device).view(1, -1, 1)
    path = (row & (candidates.depths.unsqueeze(1) == levels)).int().argmax(2)
    return path, deepest.gather(1, end)[:, 0] + 1


def attention_window(model) -> int | None:
    """How many positions back some of the model's layers look at most; None where all look at the whole text."""
    config = model.config.get_text_config()
    if set(getattr(config, "layer_types", None) or []) == {"full_attention"}:
        return None
    return getattr(config, "sliding_window", None)


def watched_lengths(config) -> set[int]:
    """Numbers in a config that are likely lengths at which some layers look differently: windows, chunks, blocks."""
    found = set()
    for name, value in config.to_dict().items():
        if isinstance(value, int) and not isinstance(value, bool) and re.search("window|chunk|block_size|local", name):
            found.add(value)
    return {value for value in found if value > 1}


_CHECKED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model: lengths at which it was checked


@torch.no_grad()
def check_model(model, capacity: int) -> None:
    """Compare our pass over a small tree, in our cache, with the model reading each branch as plain text.

    It catches models that ignore a mask or positions, keep another state than keys and values, or change their ways
    at some length; texts of each such length that fits into ``capacity`` are tried. Runs once per model and length.

    Raises:
        InputError: the passes differ, are not finite, or the model does not take our mask and cache at all.
    """
    logits_function(model)
    done = _CHECKED.setdefault(model, set())
    limit = min(capacity, context_length(model) or capacity) - 8
    lengths = {min(8, max(1, limit))}
    lengths |= {n + 4 for n in watched_lengths(model.config.get_text_config()) if n + 4 <= limit}
    for length in sorted(lengths - done):
        try:
            gap = _tree_deviation(model, length)
        except InputError:
            raise
        except Exception as error:  # the model's own code, given our mask and cache
            raise InputError(
                f"{name_of(model)} cannot verify a tree of candidates ({first_line(error)}); choose a model whose "
                "layers all use attention with a mask"
            ) from error
        if not gap <= tolerance(model.dtype):
            raise InputError(
                f"{name_of(model)} gives other logits for a candidate tree than for plain text of {length} tokens "
                f"(they differ by {gap:.1%}): it ignores the tree mask or positions, or keeps a state that rejected "
                "tokens cannot be removed from; choose a model whose layers all use attention with a mask"
            )
        done.add(length)


def _tree_deviation(model, length: int) -> float:
    """Largest difference between logits of a small tree, in two slots, and those of its branches as plain texts."""
    verifier = Verifier(model, slots=2, capacity=length + 8, check=False)
    tree = Tree.from_paths([(0,), (1,), (0, 0), (1, 0)])
    branches = torch.tensor([[0, 1, 3], [0, 2, 4]], device=verifier.device)
    ids = some_tokens(model, length + 7)
    prompts, tokens, last = [ids[:length], ids[: length // 2 + 1]], ids[length : length + 5], ids[-1:]
    state = verifier.read_prompts(prompts)
    logits, _ = verifier.look(filled(tree, tokens.expand(2, -1)), state.lengths, length + 5)
    verifier.keep(branches[1].expand(2, -1), state.lengths)
    after, _ = verifier.look(filled(ROOT_ONLY, last.expand(2, -1)), state.lengths + 3, length + 4)
    gaps = []
    for i, prompt in enumerate(prompts):
        for branch in branches:
            wanted = model(input_ids=torch.cat([prompt, tokens[branch]])[None], use_cache=False).logits[0, -3:]
            gaps.append(deviation(logits[i, branch], wanted))
        text = torch.cat([prompt, tokens[branches[1]], last])
        gaps.append(deviation(after[i, 0], model(input_ids=text[None], use_cache=False).logits[0, -1]))
    require_finite(model, wanted)
    return max(gaps, key=lambda gap: gap if gap == gap else float("inf"))
