"""``generate`` for a transformers folder: decoding with heads behind the interface of ``model.generate``.

An export puts this module, and those it needs, into one file ``custom_generate/generate.py`` that runs with
torch, transformers and safetensors alone (see :mod:`medusa_nb.bundle`).
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import cached_file

from medusa_nb.decoding import Decoder, eos_ids
from medusa_nb.drafting import DynamicDraft, TreeDraft, growing_draft
from medusa_nb.errors import InputError
from medusa_nb.heads import WEIGHTS, MedusaHeads
from medusa_nb.sampling import Sampler
from medusa_nb.tree import Tree
from medusa_nb.verification import best

ABOUT = "medusa.json"  # how guesses are made, and which base model the heads belong to
IGNORED = {"use_cache", "token_type_ids"}
HANDLED = {
    *("max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "stop_strings"),
    *("eos_token_id", "pad_token_id", "bos_token_id", "return_dict_in_generate", "use_cache", "num_beams"),
    *("transformers_version", "_from_model_config", "num_return_sequences", "disable_compile"),
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
    decoder = Decoder(model, capacity=capacity, slots=len(prompts), choose=sampler, draft=draft)
    stops = [config.stop_strings] if isinstance(config.stop_strings, str) else config.stop_strings
    ends = eos_ids(model, config.eos_token_id)
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
