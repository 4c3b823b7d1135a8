"""``generate`` for a transformers folder: decoding with heads behind the interface of ``model.generate``.

An export puts this module, and those it needs, into one file ``custom_generate/generate.py`` that runs with
torch, transformers and safetensors alone (see :mod:`medusa_nb.bundle`).
"""

import hashlib
import json
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import cached_file

from medusa_nb.base_model import context_length
from medusa_nb.compilation import Outside, weights_state
from medusa_nb.decoding import Decoder, eos_ids
from medusa_nb.drafting import DynamicDraft, TreeDraft, growing_draft
from medusa_nb.errors import InputError
from medusa_nb.heads import WEIGHTS, MedusaHeads
from medusa_nb.sampling import Sampler
from medusa_nb.tree import Tree
from medusa_nb.verification import Choose, best

ABOUT = "medusa.json"  # how guesses are made, and which base model the heads belong to
IGNORED = {"use_cache", "token_type_ids"}
HANDLED = {
    *("max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "stop_strings"),
    *("eos_token_id", "pad_token_id", "bos_token_id", "return_dict_in_generate", "use_cache", "num_beams"),
    *("transformers_version", "_from_model_config", "num_return_sequences", "disable_compile", "cache_implementation"),
}


def base_fingerprint(model) -> str:
    """SHA-256 over architecture, sizes and lm_head (in bf16, so that it does not depend on the dtype loaded in)."""
    config = model.config.get_text_config()
    weight = model.get_output_embeddings().weight.detach().to("cpu", torch.bfloat16).contiguous()
    digest = hashlib.sha256(f"{config.model_type} {config.num_hidden_layers} {list(weight.shape)}".encode())
    digest.update(weight.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def load_draft(model, source: str) -> TreeDraft | DynamicDraft:
    """Heads with their way of guessing from a folder or a hub repository, for this base model and no other."""
    files = [cached_file(source, name) for name in (ABOUT, WEIGHTS)]
    about = json.loads(Path(files[0]).read_text())
    if about["base_fingerprint"] != base_fingerprint(model):
        raise InputError(
            f"the heads in '{source}' were trained for another base model ({about['base_model']}, "
            f"fingerprint {about['base_fingerprint'][:12]}); this one has {base_fingerprint(model)[:12]}"
        )
    heads = MedusaHeads.from_files(about, files[1], model)
    if "tree" in about:
        return TreeDraft(heads, Tree(tuple(map(tuple, about["tree"]))), heads.weight.device)
    return growing_draft(
        heads, about["tree_shape"], torch.tensor(about["ngram_worth"]), torch.tensor(about["frequent"])
    )


def find_source(model) -> str:
    """Where the heads lie: the ``custom_generate`` of this call, else where the model was loaded from.

    transformers does not tell a custom function which folder it came from, so we look at who called it.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate" and isinstance(frame.f_locals.get("custom_generate"), str):
            return frame.f_locals["custom_generate"]
        frame = frame.f_back
    return model.config._name_or_path


def generate(
    inputs=None,
    generation_config=None,
    logits_processor=None,
    stopping_criteria=None,
    *,
    model,
    streamer=None,
    tokenizer=None,
    **kwargs,
):
    """What ``model.generate`` does, in fewer passes: greedy decoding or sampling, batches, streaming.

    Greedy texts are those of the plain loop; sampling has the plain distribution. Anything that is not
    supported is refused by name, never ignored.

    As elsewhere in transformers, ``cache_implementation="static"`` asks for fixed shapes and compiled code:
    the first call then takes some ten seconds more, and later ones are faster, as long as they fit into the same
    room and have the same batch size. ``disable_compile=True`` turns it off.

    Returns:
        ``LongTensor [B, T + new]``, padded on the right, or ``GenerateDecoderOnlyOutput`` with ``sequences``
        if ``return_dict_in_generate``.
    """
    source = kwargs.pop("medusa_heads", None) or find_source(model)
    for name in ("synced_gpus", "prefix_allowed_tokens_fn", "assistant_model", "negative_prompt_ids"):
        if kwargs.pop(name, None):
            raise InputError(f"decoding with Medusa heads does not support {name}; leave it out")
    kwargs.pop("negative_prompt_attention_mask", None)
    if logits_processor:
        raise InputError("decoding with Medusa heads does not support logits_processor; leave it out")
    for name in ("trust_remote_code", "custom_generate"):
        kwargs.pop(name, None)
    default_length = kwargs.get("max_length") is None and getattr(generation_config, "max_length", None) is None
    config, rest = model._prepare_generation_config(generation_config, **kwargs)
    refuse_unsupported(config)
    ids = rest.pop("input_ids", None) if inputs is None else inputs
    mask = rest.pop("attention_mask", None)
    rest = {
        name: value for name, value in rest.items() if value is not None and name not in ("use_cache", "token_type_ids")
    }
    if rest:
        raise InputError(f"decoding with Medusa heads does not support {', '.join(sorted(rest))}; leave it out")
    if ids is None or ids.ndim != 2 or not ids.shape[1]:
        raise InputError("pass input_ids [B, T] with at least one token")
    mask = torch.ones_like(ids) if mask is None else mask
    prompts = [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]
    limit = config.max_new_tokens
    if limit is None:
        length = config.max_length if config.max_length is not None else 20
        limit = length if default_length and config.max_length in (None, 20) else length - ids.shape[1]
    draft = cached_draft(model, source)
    sampler = Sampler(config.temperature or 1.0, config.top_k or 0, config.top_p or 1.0) if config.do_sample else best
    capacity = max(map(len, prompts)) + max(1, limit) + draft.size
    stops = [config.stop_strings] if isinstance(config.stop_strings, str) else config.stop_strings
    ends = eos_ids(model, config.eos_token_id)
    compiled = config.cache_implementation == "static" and not config.disable_compile
    with decoder_for(model, draft, len(prompts), capacity, sampler, compiled) as decoder:
        results = decoder.generate(prompts, limit, ends, streamer, stops, tokenizer, stopping_criteria)
    texts = [torch.tensor(result.new_tokens, device=ids.device, dtype=ids.dtype) for result in results]
    padding = config.pad_token_id if config.pad_token_id is not None else min(ends, default=0)
    new = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=padding)
    sequences = torch.cat([ids, new], dim=1)
    return GenerateDecoderOnlyOutput(sequences=sequences) if config.return_dict_in_generate else sequences


def refuse_unsupported(config) -> None:
    """Raise :class:`InputError` for any option that is set and not handled here."""
    if (config.num_beams or 1) > 1 or (config.num_return_sequences or 1) > 1:
        raise InputError("decoding with Medusa heads does not support num_beams or num_return_sequences above 1")
    if config.use_cache is False:
        raise InputError("decoding with Medusa heads does not support use_cache=False; it needs the cache")
    if config.cache_implementation not in (None, "static"):
        name = config.cache_implementation
        raise InputError(f"decoding with Medusa heads does not support cache_implementation={name!r}; 'static' it does")
    defaults = config._get_default_generation_params()
    for name, value in config.to_diff_dict().items():
        if name not in HANDLED and value not in (None, False, [], defaults.get(name)):
            raise InputError(f"decoding with Medusa heads does not support {name}={value!r}; leave it out")


def cached_draft(model, source: str) -> TreeDraft | DynamicDraft:
    """What :func:`load_draft` gives, loaded once per model object."""
    known = model.__dict__.setdefault("_medusa_drafts", {})
    if source not in known:
        known[source] = load_draft(model, source)
    return known[source]


class Shelf:
    """A model's compiled decoders, kept from call to call; whoever uses one holds ``lock``."""

    def __init__(self):
        self.lock, self.decoders = threading.Lock(), {}

    def __reduce__(self):  # a copy of the model starts with an empty shelf
        return Shelf, ()

    def decoder(self, model, draft: TreeDraft | DynamicDraft, slots: int, room: int, choose: Choose) -> Decoder:
        """The decoder kept for this draft and number of texts, or a new one with twice the room of the last or more.

        Weights are constants of compiled code: if they changed, the decoder is made anew.
        """
        key, weights = (id(draft), slots, choose is best), weights_state(model)
        known, decoder = self.decoders.get(key, (None, None))
        if known != weights or decoder.capacity < room:
            self.decoders.pop(key, None)
            capacity = min(largest_room(model, draft) or room * 2, max(512, 1 << (room - 1).bit_length()))
            outside = best if choose is best else Outside(choose)
            decoder = Decoder(model, capacity=capacity, slots=slots, choose=outside, draft=draft)
            if decoder.compile() is None:
                warnings.warn(f"the step did not compile, decoding goes on eagerly: {decoder.why_eager}", stacklevel=5)
            self.decoders[key] = weights, decoder
        if choose is not best:
            decoder.verifier.choose.choose = choose
        return decoder


def largest_room(model, draft: TreeDraft | DynamicDraft) -> int | None:
    """Room for a text that fills the model's context, and its candidates."""
    limit = context_length(model)
    return None if limit is None else limit + draft.size


@contextmanager
def decoder_for(
    model, draft: TreeDraft | DynamicDraft, slots: int, room: int, choose: Choose, compiled: bool
) -> Iterator[Decoder]:
    """A decoder for ``slots`` texts of at most ``room`` tokens, candidates included.

    A compiled one is kept on the model's :class:`Shelf`; while another thread uses it, this call decodes eagerly.
    """
    room = min(room, largest_room(model, draft) or room)
    shelf = model.__dict__.setdefault("_medusa_shelf", Shelf())
    if not compiled or not shelf.lock.acquire(blocking=False):
        yield Decoder(model, capacity=room, slots=slots, choose=choose, draft=draft)
        return
    try:
        yield shelf.decoder(model, draft, slots, room, choose)
    finally:
        shelf.lock.release()
