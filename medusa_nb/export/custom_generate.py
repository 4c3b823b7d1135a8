"""``generate`` for a transformers folder: decoding with heads behind the interface of ``model.generate``.

An export puts this module, and those it needs, into one file ``custom_generate/generate.py`` that runs with torch,
transformers and safetensors alone (see :mod:`medusa_nb.export.bundle`).
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import cached_file

from medusa_nb.base_model import as_ids, base_fingerprint, context_length, weights_state
from medusa_nb.decoding import Decoder
from medusa_nb.drafting import Draft, GrowingTree, StaticTree
from medusa_nb.errors import InputError
from medusa_nb.heads_file import WEIGHTS, heads_from
from medusa_nb.private import generation_defaults, prepared_generation_config
from medusa_nb.sampling import Sampler
from medusa_nb.storage import read_json
from medusa_nb.tree import Tree
from medusa_nb.verification import Choose, greedy

ABOUT = "medusa.json"  # how drafts are made, and which base model the heads belong to
REFUSED = ("synced_gpus", "prefix_allowed_tokens_fn", "assistant_model", "negative_prompt_ids", "logits_processor")
SILENT = {"use_cache", "token_type_ids", "negative_prompt_attention_mask", "trust_remote_code", "custom_generate"}
HANDLED = {
    *("max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "stop_strings", "use_cache"),
    *("eos_token_id", "pad_token_id", "bos_token_id", "return_dict_in_generate", "num_beams", "disable_compile"),
    *("transformers_version", "_from_model_config", "num_return_sequences", "cache_implementation"),
}


def generate(inputs=None, generation_config=None, *, model, streamer=None, tokenizer=None, **kwargs):
    """What ``model.generate`` does, in fewer passes: greedy decoding or sampling, batches, streaming.

    Greedy texts are those of the plain loop; sampling has the plain distribution. Anything that is not supported is
    refused by name, never ignored.

    As elsewhere in transformers, ``cache_implementation="static"`` asks for fixed shapes and compiled code: the first
    call then takes some ten seconds more, and later ones are faster, as long as they fit into the same room and have
    the same batch size. ``disable_compile=True`` turns it off.

    Args:
        medusa_heads: folder or hub repository of the heads; by default where the model was loaded from.

    Returns:
        ``LongTensor [B, T + new]``, padded on the right, or ``GenerateDecoderOnlyOutput`` with ``sequences`` if
        ``return_dict_in_generate``.
    """
    source = kwargs.pop("medusa_heads", None) or model.config.name_or_path
    for name in REFUSED:
        if is_set(kwargs.pop(name, None)):
            raise InputError(f"decoding with Medusa heads does not support {name}; leave it out")
    criteria = kwargs.pop("stopping_criteria", None)
    kwargs = {name: value for name, value in kwargs.items() if name not in SILENT - {"use_cache"}}
    default_length = kwargs.get("max_length") is None and getattr(generation_config, "max_length", None) is None
    config, rest = prepared_generation_config(model, generation_config, kwargs)
    refuse_unsupported(config)
    ids = rest.pop("input_ids", None) if inputs is None else inputs
    mask = rest.pop("attention_mask", None)
    if unknown := sorted(name for name, value in rest.items() if value is not None and name not in SILENT):
        raise InputError(f"decoding with Medusa heads does not support {', '.join(unknown)}; leave it out")
    if ids is None or ids.ndim != 2 or not ids.shape[1]:
        raise InputError("pass input_ids [B, T] with at least one token")
    mask = torch.ones_like(ids) if mask is None else mask
    prompts = [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]
    limit = config.max_new_tokens
    if limit is None:
        length = config.max_length if config.max_length is not None else 20
        limit = length if default_length and config.max_length in (None, 20) else length - ids.shape[1]
    choose = greedy
    if config.do_sample:
        choose = Sampler(_or(config.temperature, 1.0), _or(config.top_k, 0), _or(config.top_p, 1.0))
    room = max(map(len, prompts)) + max(1, limit)
    stops = [config.stop_strings] if isinstance(config.stop_strings, str) else config.stop_strings
    ends = sorted(as_ids(config.eos_token_id))
    compiled = config.cache_implementation == "static" and not config.disable_compile
    with decoder_for(model, draft_of(model, source), len(prompts), room, choose, compiled) as decoder:
        results = decoder.generate(prompts, limit, ends, streamer, stops, tokenizer, criteria)
    texts = [torch.tensor(result.new_tokens, device=ids.device, dtype=ids.dtype) for result in results]
    padding = config.pad_token_id if config.pad_token_id is not None else min(ends, default=0)
    new = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=padding)
    sequences = torch.cat([ids, new], dim=1)
    return GenerateDecoderOnlyOutput(sequences=sequences) if config.return_dict_in_generate else sequences


def _or(value, default):
    return default if value is None else value


def is_set(value, *defaults) -> bool:
    """Whether an option asks for something; a tensor always does."""
    return isinstance(value, torch.Tensor) or value not in (None, False, [], *defaults)


def refuse_unsupported(config) -> None:
    """Raise :class:`InputError` for any option of a generation config that is set and not handled here."""
    if (config.num_beams or 1) > 1 or (config.num_return_sequences or 1) > 1:
        raise InputError("decoding with Medusa heads does not support num_beams or num_return_sequences above 1")
    if config.use_cache is False:
        raise InputError("decoding with Medusa heads does not support use_cache=False; it needs the cache")
    if config.cache_implementation not in (None, "static"):
        name = config.cache_implementation
        raise InputError(f"decoding with Medusa heads does not support cache_implementation={name!r}; 'static' it does")
    defaults = generation_defaults(config)
    for name, value in vars(config).items():
        if name not in HANDLED and not name.startswith("_") and is_set(value, defaults.get(name)):
            raise InputError(f"decoding with Medusa heads does not support {name}={value!r}; leave it out")


class Kept:
    """What is kept with a model: its drafts by source, and its compiled decoders, which one call at a time uses.

    It is an attribute of the model, so that it goes when the model goes. A copy of the model begins with nothing.
    """

    def __init__(self):
        self.drafts, self.decoders, self.lock = {}, {}, threading.Lock()

    def __reduce__(self):
        return Kept, ()

    @staticmethod
    def of(model) -> "Kept":
        if not hasattr(model, "_medusa_kept"):
            model._medusa_kept = Kept()
        return model._medusa_kept


def draft_of(model, source: str) -> Draft:
    """The heads of a folder or hub repository with their way of drafting, loaded once per model.

    Raises:
        InputError: there are no heads, or they were trained for another base model.
    """
    known, key = Kept.of(model).drafts, (source, model.device, model.dtype)
    if key not in known:
        try:
            about_file, weights = (Path(str(cached_file(source, name))) for name in (ABOUT, WEIGHTS))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"there are no Medusa heads where '{source}' was loaded from; pass their folder as medusa_heads=..."
            ) from error
        about = read_json(about_file)
        if about["base_fingerprint"] != base_fingerprint(model):
            raise InputError(
                f"the heads in '{source}' were trained for another base model ({about['base_model']}, "
                f"fingerprint {about['base_fingerprint'][:12]}); this one has {base_fingerprint(model)[:12]}"
            )
        heads = heads_from(about, weights, model)
        if "tree" in about:
            known[key] = StaticTree(heads, Tree(tuple(map(tuple, about["tree"]))), heads.device)
        else:
            known[key] = GrowingTree(heads, about["tree_size"], ngram_worth=torch.tensor(about["ngram_worth"]))
    return known[key]


@contextmanager
def decoder_for(model, draft: Draft, slots: int, room: int, choose: Choose, compiled: bool) -> Iterator[Decoder]:
    """A decoder for ``slots`` sequences of at most ``room`` tokens.

    A compiled one is kept; while another thread uses it, this call decodes eagerly.
    """
    room, kept = min(room, context_length(model) or room), Kept.of(model)
    if not compiled or not kept.lock.acquire(blocking=False):
        yield Decoder(model, max_length=room, slots=slots, choose=choose, draft=draft)
        return
    try:
        yield compiled_decoder(kept.decoders, model, draft, slots, room, choose)
    finally:
        kept.lock.release()


def compiled_decoder(known: dict, model, draft: Draft, slots: int, room: int, choose: Choose) -> Decoder:
    """The decoder kept for this draft and number of sequences, or a new one with twice the room of the last.

    Compiled code holds its own layout of the weights: if they changed, the decoder is made again.
    """
    key, weights = (id(draft), slots), weights_state(model)
    made_for, decoder = known.get(key, (None, None))
    if made_for != weights or decoder.max_length < room:
        known.pop(key, None)
        length = max(512, 1 << (room - 1).bit_length())
        decoder = Decoder(model, max_length=min(length, context_length(model) or length), slots=slots, draft=draft)
        if decoder.compile() is None:
            warnings.warn(f"the step did not compile, decoding goes on eagerly: {decoder.why_eager}", stacklevel=5)
        known[key] = weights, decoder
    decoder.verifier.choose = choose
    return decoder
