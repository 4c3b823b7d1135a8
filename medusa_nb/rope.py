"""Models whose angles of positions change with a text's length (long and dynamic rope)."""

from medusa_nb.errors import InputError
from medusa_nb.logits import name_of


def rope_switches(model) -> dict[int, str]:
    """Lengths from which on the model turns positions into angles otherwise (long and dynamic rope), and the kind."""
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    switches = {}
    for kind in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        if kind.get("rope_type") in ("longrope", "dynamic"):
            stated = kind.get("original_max_position_embeddings")
            stated = stated or getattr(config, "original_max_position_embeddings", None)
            switches[stated or config.max_position_embeddings] = kind["rope_type"]
    return switches


def refuse_rope_switch(model, prompt: int, longest: int) -> None:
    """Raise :class:`InputError` where a text would grow across a length at which the model's rope changes.

    Keys in the cache would still be turned the old way, and candidates beyond the length would change the pass for
    those before it.

    Args:
        prompt, longest: tokens of the prompt, and of the longest text that may be read.
    """
    for length, kind in rope_switches(model).items():
        if longest > length and (prompt <= length or kind == "dynamic"):
            raise InputError(
                f"{name_of(model)} changes its rope ({kind}) at {length} tokens, and this text of {prompt} tokens "
                f"could grow to {longest}; ask for fewer new tokens"
            )


def refuse_mixed_rope(model, prompts: list) -> None:
    """Raise :class:`InputError` where texts on both sides of a switch would be decoded in one pass: one changes all."""
    for length, kind in rope_switches(model).items():
        if len({len(prompt) > length for prompt in prompts}) > 1:
            raise InputError(
                f"{name_of(model)} changes its rope ({kind}) at {length} tokens, and only some of these prompts are "
                "longer; decode them one by one"
            )
