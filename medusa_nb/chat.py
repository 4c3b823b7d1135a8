"""Conversations laid out by the model's own chat template, and which of their tokens the model itself said."""

import re
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import Tokenizer, processors
from transformers.utils.chat_template_utils import render_jinja_template

from medusa_nb.errors import InputError

Messages = list[dict]
Span = tuple[int, int]  # where a piece of text starts and ends
STAND_IN = "the answer goes here"


@dataclass
class Encoded:
    """Token ids ``[T]`` of a conversation and, for each, whether the model itself said it ``[T]``."""

    ids: list[int]
    own: list[bool]


def require_chat_template(tokenizer) -> None:
    """Raise :class:`InputError` if the tokenizer cannot lay out a conversation, or not say where its tokens stand."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"the tokenizer of '{tokenizer.name_or_path}' has no chat template; set tokenizer.chat_template "
            "to the layout the model was trained with"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"the tokenizer of '{tokenizer.name_or_path}' is a slow one, which cannot say where in a text its tokens "
            "stand; save it as a fast one (tokenizer.json)"
        )


def clean_text(text: str) -> str:
    """The text with surrogate pairs joined and lone surrogates replaced: what every tokenizer and file can take."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def lay_out(tokenizer, messages: Messages, ask: bool = False) -> str:
    """The conversation as text; with ``ask`` up to where the model is to answer.

    Raises:
        InputError: the template rejects the conversation; with its own words.
    """
    return _render(tokenizer, messages, ask)[0]


def _render(tokenizer, messages: Messages, ask: bool = False) -> tuple[str, list[Span]]:
    """The conversation as text, and the pieces that the template marks as the model's own (``{% generation %}``)."""
    try:
        template = tokenizer.get_chat_template()
        marks = bool(re.search(r"\{%-?\s*generation\s*-?%\}", template))
        options = dict(add_generation_prompt=ask, return_assistant_tokens_mask=marks, **tokenizer.special_tokens_map)
        rendered: tuple = render_jinja_template([messages], chat_template=template, **options)  # type: ignore
        (text,), marked = rendered
    except Exception as error:  # a template is a program: it may fail in any way
        raise InputError(f"the chat template rejects the conversation: {' '.join(str(error).split())}") from error
    return text, [(start, end) for spans in marked for start, end in spans if start < end]


def prompt_ids(tokenizer, messages: Messages) -> list[int]:
    """Token ids of a conversation up to where the model is to answer."""
    return tokenizer(lay_out(tokenizer, messages, ask=True), add_special_tokens=False).input_ids


def accepted_by_template(tokenizer, asked: Messages) -> Messages:
    """System and user turns as the template takes them: where it rejects a system turn, that joins the first question.

    Raises:
        InputError: the template rejects how the conversation begins, either way.
    """
    first_user = next((i for i, message in enumerate(asked) if message["role"] == "user"), len(asked))
    opening = asked[: first_user + 1]
    try:
        lay_out(tokenizer, opening, ask=True)
        return asked
    except InputError:
        if len(opening) < 2:
            raise
    folded = dict(role="user", content="\n\n".join(message["content"] for message in opening))
    lay_out(tokenizer, [folded], ask=True)
    return [folded, *asked[first_user + 1 :]]


def encode_conversation(tokenizer, messages: Messages, max_length: int | None = None) -> Encoded:
    """Lay out a conversation with the chat template and mark the tokens the model itself said.

    They are what the template marks as such (``{% generation %}``); where it marks nothing, each answer's tokens from
    the first to the last, the token that ends the turn included. They are found by where they stand, so an answer that
    also stands in the user's turn is not mistaken for it. Cut to ``max_length`` tokens.

    Raises:
        InputError: no chat template, or one in whose layout no answer can be told apart.
    """
    require_chat_template(tokenizer)
    text, marked = _render(tokenizer, messages)
    spans = marked or _answer_spans(tokenizer, messages, text)
    ids, own = _encode_in_parts(tokenizer, text, spans) or _encode_whole(tokenizer, text, spans)
    return Encoded(ids[:max_length], own[:max_length])


def _encode_in_parts(tokenizer, text: str, spans: list[Span]) -> tuple[list[int], list[bool]] | None:
    """Layout and answers split into tokens one by one, as they are when the model is asked and answers.

    None for a tokenizer that splits a part otherwise than the same words inside a text (one that puts a space in
    front of everything, say).
    """
    backend, place = _without_post_processor(tokenizer.backend_tokenizer), 0
    ids: list[int] = []
    own: list[bool] = []
    for start, end in [*spans, (len(text), len(text))]:
        for part, is_answer in ((text[place:start], False), (text[start:end], True)):
            tokens = backend.encode(part, add_special_tokens=False).ids
            ids, own = ids + tokens, own + [is_answer] * len(tokens)
        place = end
    whole = backend.encode(text, add_special_tokens=False).ids
    same = backend.decode(ids, skip_special_tokens=False) == backend.decode(whole, skip_special_tokens=False)
    return (ids, own) if same else None


def _encode_whole(tokenizer, text: str, spans: list[Span]) -> tuple[list[int], list[bool]]:
    """The text split as a whole: an answer's tokens are those from its first character to its last."""
    encoded = _without_post_processor(tokenizer.backend_tokenizer).encode(text, add_special_tokens=False)
    own = [False] * len(encoded.ids)
    for start, end in spans:
        inside = [i for i, (a, b) in enumerate(encoded.offsets) if start <= a < b <= end]
        found = text[encoded.offsets[inside[0]][0] : encoded.offsets[inside[-1]][1]] if inside else ""
        if found.strip() != text[start:end].strip():
            raise InputError(
                f"the tokenizer of '{tokenizer.name_or_path}' joins the model's words with the layout around them, "
                "so they cannot be told apart"
            )
        for i in range(inside[0], inside[-1] + 1) if inside else ():  # an empty answer has no token
            own[i] = True
    return encoded.ids, own


@lru_cache(maxsize=4)
def _without_post_processor(backend: Tokenizer) -> Tokenizer:
    """A copy that splits text the same way and leaves the offsets alone: some trim white space out of them."""
    copy = Tokenizer.from_str(backend.to_str())
    copy.post_processor = processors.ByteLevel(trim_offsets=False)
    copy.no_truncation()
    copy.no_padding()
    return copy


def _answer_spans(tokenizer, messages: Messages, text: str) -> list[Span]:
    """Where each answer stands in the laid-out ``text``, its end token included.

    A template may rewrite earlier turns once later ones follow (it drops their reasoning, say): what is not in the
    text as the model said it is left out, and only if nothing remains is that an error.
    """
    spans, before = [], ""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i in answers:
        before, until = lay_out(tokenizer, messages[:i], ask=True), lay_out(tokenizer, messages[: i + 1])
        made_up = lay_out(tokenizer, [*messages[:i], messages[i] | dict(content=STAND_IN)])
        prefix, found, suffix = made_up.rpartition(STAND_IN)
        if not (found and until.startswith(before) and text.startswith(until) and until.endswith(suffix)):
            continue
        end = len(until) - len(suffix)
        if reasoning := (messages[i].get("reasoning_content") or "").strip():
            if reasoning in until[len(before) : end]:  # with the marks around it, which the model said, too
                spans.append((len(before), end + _end_of_turn(tokenizer, suffix)))
            continue
        for start in (len(before), len(prefix)):  # the template may put something in front of an answer
            if until[start:end].strip() == messages[i]["content"].strip():
                spans.append((start, end + _end_of_turn(tokenizer, suffix)))
                break
    if answers and not spans:
        if "<think>" in before[-20:]:
            raise InputError(
                f"the chat template of '{tokenizer.name_or_path}' asks for an answer with an open think block, and "
                "lays out answers without it, so the model's own words would stand in another text than it said them "
                "in; use a template that keeps the block, or closes it before the answer"
            )
        raise InputError(
            f"the chat template of '{tokenizer.name_or_path}' lays out answers otherwise than the model was asked for "
            "them or said them (without its reasoning, say), so its own words cannot be told apart; use a template "
            "that leaves them as they are"
        )
    return spans


def _end_of_turn(tokenizer, suffix: str) -> int:
    """How much of what follows an answer ends it: up to its first special token, if there is one, else all words."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    ends = [suffix.find(token) + len(token) for token in special if token in suffix]
    return min(ends, default=len(suffix.rstrip()))


def with_answers(asked: Messages, answer: str) -> Messages:
    """System and user turns, with this answer after every user turn."""
    turns: Messages = []
    for message in asked:
        turns += [message] if message["role"] != "user" else [message, dict(role="assistant", content=answer)]
    return turns


def can_supervise(tokenizer, rows: list[dict]) -> None:
    """Raise :class:`InputError` where training would refuse the answers to these conversations: before any is made.

    ``rows`` hold system and user turns as the template takes them; a made-up answer is tried for every sequence of
    roles that occurs.
    """
    shapes = {tuple(message["role"] for message in row["messages"]): row["messages"] for row in rows}
    for asked in shapes.values():
        try:
            encode_conversation(tokenizer, with_answers(asked, "Yes."))
        except InputError as error:
            raise InputError(f"heads could not be trained on answers to these prompts: {error}") from error
