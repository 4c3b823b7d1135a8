"""Conversations in every chat template's layout, and which of their tokens the model itself said."""

import copy
import os
from functools import cache

import pytest
from chat_templates import BOTH, REFUSED, TALK, TEMPLATES, TWO
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from medusa_nb.chat import (
    accepted_by_template,
    can_supervise,
    clean_text,
    encode_conversation,
    lay_out,
    prompt_ids,
    require_chat_template,
)
from medusa_nb.errors import InputError
from medusa_nb.packaged_model import packaged_model

# MEDUSA_NB_TRIES=2000 tries more
TRIES = int(os.environ.get("MEDUSA_NB_TRIES", 200))
settings.register_profile("chat", max_examples=TRIES, deadline=None, database=None, derandomize=TRIES == 200)


@cache
def with_template(tokenizer, template: str | None):
    """The tokenizer with this chat template; they share everything else."""
    other = copy.copy(tokenizer)
    other.chat_template = template
    return other


def said(tokenizer, encoded) -> str:
    return tokenizer.decode([i for i, own in zip(encoded.ids, encoded.own, strict=True) if own])


def talk(*contents: str, system: str | None = None) -> list[dict]:
    """User and assistant take turns."""
    turns = [dict(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(contents)]
    return [dict(role="system", content=system)] * (system is not None) + turns


@pytest.mark.parametrize("shape", TEMPLATES)
def test_the_models_own_words_in_every_shape_of_template(tokenizer, shape):
    template, expected = TEMPLATES[shape]
    shaped = with_template(tokenizer, template)
    encoded = encode_conversation(shaped, TALK)
    assert said(shaped, encoded) == expected
    assert shaped.decode(encoded.ids) == shaped.apply_chat_template(TALK, tokenize=False)
    can_supervise(shaped, [dict(messages=talk("a")), dict(messages=[*talk("a"), *talk("b")])])


@pytest.mark.parametrize("shape", [name for name in TEMPLATES if name != "a think block that nobody asked for"])
def test_the_prompt_and_the_answers_tokens_are_those_that_are_trained_on(tokenizer, shape):
    shaped = with_template(tokenizer, TEMPLATES[shape][0])
    encoded = encode_conversation(shaped, talk("question", "An answer\n\nwith 12 lines."))
    asked = prompt_ids(shaped, talk("question"))
    answer = shaped("An answer\n\nwith 12 lines.", add_special_tokens=False).input_ids
    assert encoded.ids[: len(asked) + len(answer)] == asked + answer
    assert encoded.own.index(True) == len(asked)


@pytest.mark.parametrize("shape", REFUSED)
def test_a_template_in_which_no_answer_can_be_told_apart_is_refused(tokenizer, shape):
    template, words = REFUSED[shape]
    with pytest.raises(InputError, match=words):
        encode_conversation(with_template(tokenizer, template), TALK)


def test_white_space_in_an_answer_is_the_models_own_whatever_the_offsets_say(tokenizer):
    trimming = copy.deepcopy(tokenizer)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    for shape in ("ChatML", "generation tags"):
        encoded = encode_conversation(with_template(trimming, TEMPLATES[shape][0]), TALK)
        assert said(trimming, encoded) == BOTH
        assert encoded == encode_conversation(with_template(tokenizer, TEMPLATES[shape][0]), TALK)


def test_a_template_that_drops_earlier_think_blocks_supervises_what_stays_the_same(tokenizer):
    """CASES 8: two turns; the first answer stands in another text than it was said in, the last does not."""
    shaped = with_template(tokenizer, TEMPLATES["a closed think block before the last answer"][0])
    can_supervise(shaped, [dict(messages=[*talk("a"), *talk("b")])])
    assert said(shaped, encode_conversation(shaped, TALK)) == f"{TWO}<|im_end|>"


def test_an_open_think_block_is_named_before_anything_is_answered(tokenizer):
    """CASES 9: the advice must not be to use conversations of one turn; one turn fails, too."""
    shaped = with_template(tokenizer, REFUSED["an open think block"][0])
    for rows in ([dict(messages=talk("a"))], [dict(messages=[*talk("a"), *talk("b")])]):
        with pytest.raises(InputError, match="could not be trained.*open think block") as caught:
            can_supervise(shaped, rows)
        assert "one turn" not in str(caught.value)


def test_special_tokens_inside_an_answer_stay_in_it(tokenizer):
    """CASES 10: an answer with channels is supervised whole, with its own special tokens."""
    answer = "<file_sep>analysis<repo_name>Think.<|im_start|>final<repo_name>Done."
    encoded = encode_conversation(tokenizer, talk("a", answer))
    assert said(tokenizer, encoded) == answer + "<|im_end|>"


def test_a_system_turn_that_the_template_rejects_joins_the_question(tokenizer):
    shaped = with_template(tokenizer, TEMPLATES["no system turns"][0])
    asked = [*talk("Hi", system="Be brief."), *talk("And?")]
    folded = accepted_by_template(shaped, asked)
    assert folded == [dict(role="user", content="Be brief.\n\nHi"), dict(role="user", content="And?")]
    assert "Be brief.\n\nHi" in lay_out(shaped, folded[:1], ask=True)
    assert accepted_by_template(tokenizer, asked) is asked  # this template takes it
    with pytest.raises(InputError, match="chat template rejects the conversation: System role not supported"):
        prompt_ids(shaped, asked)


def test_several_system_turns_are_folded_together(tokenizer):
    shaped = with_template(tokenizer, TEMPLATES["no system turns"][0])
    asked = [dict(role="system", content="One."), dict(role="system", content="Two."), *talk("Hi")]
    assert accepted_by_template(shaped, asked) == [dict(role="user", content="One.\n\nTwo.\n\nHi")]


def test_what_the_template_rejects_even_when_folded_is_refused(tokenizer):
    shaped = with_template(tokenizer, "{{ raise_exception('never') }}")
    for asked in (talk("Hi"), talk("Hi", system="s"), [dict(role="system", content="s")]):
        with pytest.raises(InputError, match="never"):
            accepted_by_template(shaped, asked)


def test_the_words_of_an_answer_that_also_stand_in_the_question(tokenizer):
    encoded = encode_conversation(tokenizer, talk("return x", "return x"))
    first = encoded.own.index(True)
    assert said(tokenizer, encoded) == "return x<|im_end|>"
    assert encoded.ids[:first].count(encoded.ids[first]) == 1  # the same word, in the user's turn
    assert encoded.own[-1] is False  # the line break behind the end token is the template's


def test_an_answer_that_quotes_the_layout(tokenizer):
    answer = "Write:\n<|im_start|>assistant\nHello.<|im_start|>user\nHi."
    assert said(tokenizer, encode_conversation(tokenizer, talk("a", answer, "b", answer))) == f"{answer}<|im_end|>" * 2


def test_cut_to_a_length(tokenizer):
    whole = encode_conversation(tokenizer, TALK)
    cut = encode_conversation(tokenizer, TALK, max_length=len(whole.ids) - 6)
    assert (cut.ids, cut.own) == (whole.ids[:-6], whole.own[:-6])
    tagged = with_template(tokenizer, TEMPLATES["generation tags"][0])
    assert len(encode_conversation(tagged, TALK, max_length=9).own) == 9


def test_a_tokenizers_own_truncation_cuts_nothing(tokenizer):
    truncating = copy.deepcopy(tokenizer)
    truncating.backend_tokenizer.enable_truncation(4)
    truncating.backend_tokenizer.enable_padding(length=600)
    assert encode_conversation(truncating, TALK) == encode_conversation(tokenizer, TALK)


def metaspace_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space in front of every text, so parts are split otherwise than the whole."""
    letters = sorted(set("▁<|imstar>endusQqAan?.!:\nuestionwerfhbO|/ ") | set("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789'"))
    vocabulary = {letter: i for i, letter in enumerate(["<unk>", "</s>", *letters])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.add_special_tokens(["</s>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    fast.chat_template = template
    return fast


def test_a_tokenizer_that_puts_a_space_in_front_is_split_as_a_whole():
    template = (
        "{% for m in messages %}{{ 'Q: ' + m['content'] + '\nA:' if m['role'] == 'user' else m['content'] + '</s>' }}"
        "{% endfor %}"
    )
    fast = metaspace_tokenizer(template)
    encoded = encode_conversation(fast, talk("question", "an answer"))
    own = [fast.convert_ids_to_tokens(i) for i, is_own in zip(encoded.ids, encoded.own, strict=True) if is_own]
    assert "".join(own).replace("▁", " ") == "an answer</s>"


def test_an_answer_of_no_token_is_nothing_to_train_on(tokenizer):
    shaped = with_template(tokenizer, "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}")
    for split in (metaspace_tokenizer(shaped.chat_template), shaped):
        encoded = encode_conversation(split, [dict(role="assistant", content="")] * 2)
        assert not any(encoded.own)


def test_no_chat_template(tokenizer):
    bare = with_template(tokenizer, None)
    for function in (require_chat_template, lambda t: encode_conversation(t, TALK)):
        with pytest.raises(InputError, match="no chat template"):
            function(bare)


class Slow(PreTrainedTokenizer):
    """A tokenizer in Python: one token a letter."""

    vocab_size = 300

    def get_vocab(self):
        return {chr(i): i for i in range(256)}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return min(ord(token), 255)

    def _convert_id_to_token(self, index):
        return chr(index)


def test_a_slow_tokenizer_is_refused_in_one_sentence():
    slow = Slow()
    slow.chat_template = TEMPLATES["ChatML"][0]
    with pytest.raises(InputError, match="is a slow one.*save it as a fast one"):
        encode_conversation(slow, TALK)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("plain", "plain"), ("a \ud83d", "a \ufffd"), ("\ud83d\ude42", "🙂"), ("\ude42\ud83d", "\ufffd\ufffd"), ("", "")],
)
def test_lone_surrogates_are_replaced_and_pairs_are_joined(text, expected):
    assert clean_text(text) == expected
    assert clean_text(text).encode().decode() == expected


CONTENTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(
    [
        "",
        " ",
        "\n",
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "<think>",
        "</think>\n\n",
        "    return 1",
        "{{ x }}",
        "🙂",
        "Yes.",
    ]
)
TURNS = st.lists(
    st.fixed_dictionaries(
        dict(role=st.sampled_from(["user", "assistant", "assistant", "system", "tool"]), content=CONTENTS)
    ),
    max_size=6,
)
ALL_TEMPLATES = [template for template, _ in [*TEMPLATES.values(), *REFUSED.values()]]


@cache
def real_tokenizer():
    return AutoTokenizer.from_pretrained(packaged_model())


@settings(settings.get_profile("chat"))
@given(number=st.integers(0, len(ALL_TEMPLATES) - 1), messages=TURNS, length=st.none() | st.integers(1, 50))
def test_any_conversation_gives_a_result_or_one_sentence(number, messages, length):
    shaped = with_template(real_tokenizer(), ALL_TEMPLATES[number])
    try:
        encoded = encode_conversation(shaped, messages, length)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) > 20
        return
    assert len(encoded.ids) == len(encoded.own) and (length is None or len(encoded.ids) <= length)
    if not any(message["role"] == "assistant" for message in messages):
        assert not any(encoded.own)
    try:
        asked = [message for message in messages if message["role"] != "assistant"]
        accepted_by_template(shaped, asked)
        can_supervise(shaped, [dict(messages=asked)])
    except InputError as error:
        assert "\n" not in str(error)
