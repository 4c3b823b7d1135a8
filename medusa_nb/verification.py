"""The base model's side of a step: one pass over all candidates, each seeing its own path only.

Tree attention needs no change to the model: a 4-D mask lets every candidate see the text and its
ancestors, and its position is that of the root plus its depth.
"""

from collections.abc import Callable
from functools import partial

import torch
from transformers import DynamicCache

from medusa_nb.base_model import attention_window, context_length
from medusa_nb.drafting import Candidates, State
from medusa_nb.kv_cache import SlotCache

Choose = Callable[[torch.Tensor], torch.Tensor]
Accept = Callable[[torch.Tensor, torch.Tensor, Candidates], torch.Tensor]


def same(logits: torch.Tensor, said: torch.Tensor, candidates: Candidates) -> torch.Tensor:
    """The lossless rule: a guess is right where it is what the base model says at its parent. ``[B, N]`` bool."""
    return candidates.tokens == said.gather(1, candidates.parents)


def best(logits: torch.Tensor) -> torch.Tensor:
    """Greedy choice: ``[..., V]`` -> ``[...]``."""
    return logits.argmax(-1)


def read_prompts(model, ids: torch.Tensor, last: torch.Tensor):
    """One pass over prompts ``[B, T]``, padded on the right, where causal attention of real tokens never looks.

    Returns:
        States ``[B, D]`` and logits ``[B, V]`` at each one's ``last`` ``[B]`` token, and per layer the keys and
        values ``[B, heads, T, head_dim]``.
    """
    cache = DynamicCache()
    hidden = model.base_model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
    hidden = hidden[torch.arange(len(ids), device=ids.device), last]
    return hidden, model.get_output_embeddings()(hidden), [(layer.keys, layer.values) for layer in cache.layers]


class Verifier:
    """A model with a buffer for ``slots`` texts of at most ``capacity`` tokens, candidates included.

    ``choose`` says what the base model says: logits ``[..., V]`` -> token ids ``[...]``; ``accept`` which guesses
    are right; ``read`` reads prompts as :func:`read_prompts` does.
    """

    def __init__(self, model, slots: int, capacity: int, choose: Choose = best, accept: Accept = same):
        self.backbone, self.lm_head = model.base_model, model.get_output_embeddings()
        self.read = partial(read_prompts, model)
        self.choose, self.accept = choose, accept
        self.device, self.dtype = self.lm_head.weight.device, model.dtype
        self.slots, self.capacity = torch.arange(slots, device=self.device), capacity
        self.cache = SlotCache(slots, capacity)
        self.last_position = (context_length(model) or capacity) - 1
        self.layer_types = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
        self.window = attention_window(model)

    @torch.no_grad()
    def read_prompts(self, prompts: list[torch.Tensor], slots: list[int] | None = None) -> State:
        """Read prompts (each ``[T]``) into ``slots`` (the first ones) in one pass; each says its first token."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        ids = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True).to(self.device)
        hidden, logits, keys_values = self.read(ids, lengths - 1)
        self.cache.fill(list(range(len(prompts))) if slots is None else slots, keys_values)
        return State(self.choose(logits), hidden, lengths)

    def check(
        self, candidates: Candidates, lengths: torch.Tensor, span: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the base model says after each candidate ``[B, N]``, whether the candidate itself is right at its
        place ``[B, N]``, and the states ``[B, N, D]``.

        ``span``: columns that attention reads, at least the longest text and its candidates.
        """
        texts, count = candidates.tokens.shape
        self.cache.write_at(self.slots[:texts], lengths, count, span)
        hidden = self.backbone(
            input_ids=candidates.tokens,
            attention_mask=self.attention_mask(candidates, lengths, span),
            position_ids=(candidates.depths + lengths.unsqueeze(1)).clamp(max=self.last_position),
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        logits = self.lm_head(hidden)
        said = self.choose(logits)
        return said, self.accept(logits, said, candidates), hidden

    def keep(self, path: torch.Tensor, lengths: torch.Tensor) -> None:
        """Make the accepted path ``[B, P]`` part of each text; all other candidates are forgotten."""
        self.cache.keep(self.slots[: len(path)], lengths, path)

    def attention_mask(self, candidates: Candidates, lengths: torch.Tensor, span: int):
        """Additive 4-D mask ``[B, 1, N, span]``: 0 where a candidate may look, else the lowest number.

        Layers with a sliding window see only that many positions back, so they get a mask of their own.
        """
        count = candidates.tokens.shape[1]
        columns = torch.arange(span, device=self.device)
        number = columns - lengths.unsqueeze(1)  # [B, span]: which candidate stands in a column; below 0: the text
        inside = number.clamp(0, count - 1)
        above = candidates.ancestors.gather(2, inside.unsqueeze(1).expand(-1, count, -1))  # [B, N, span]
        visible = (number < 0).unsqueeze(1) | (above & (number < count).unsqueeze(1))
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
