"""The one exception type for bad input: a single sentence that says what, where and what to do."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message is meant to be shown without a traceback."""
