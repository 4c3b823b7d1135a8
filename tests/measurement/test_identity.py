"""The proof that texts are the same, or part where the model itself finds two tokens equally good."""

import pytest
import torch
from tiny_models import EOS

from medusa_nb.decoding import Decoder, Generation
from medusa_nb.measurement.identity import compare_answers, first_difference_gap, identity, near_tie
from medusa_nb.measurement.timing import Timing

PROMPT = torch.tensor([5, 6, 7, 8, 9])


def text(new: list[int]) -> Generation:
    return Generation(torch.cat([PROMPT, torch.tensor(new, dtype=torch.long)]).unsqueeze(0), len(PROMPT))


@pytest.fixture
def said(small_model) -> list[int]:
    [result] = Decoder(small_model, max_length=64).generate([PROMPT], 12, [EOS])
    return result.new_tokens


def test_equal_texts_have_no_gap(small_model, said):
    assert first_difference_gap(small_model, text(said), text(said)) is None


def test_the_gap_is_how_far_the_two_logits_are_from_the_best(small_model, said):
    other = said[:4] + [(said[4] + 1) % 50] + said[5:]
    logits = small_model(text(said[:4]).sequences).logits[0, -1]
    expected = (logits.max() - logits[other[4]]).item()
    assert expected > 0.1
    assert first_difference_gap(small_model, text(said), text(other)) == pytest.approx(expected, abs=1e-3)
    assert first_difference_gap(small_model, text(other), text(said)) == pytest.approx(expected, abs=1e-3)


def test_two_tokens_that_are_equally_bad_are_no_tie(small_model, said):
    logits = small_model(text(said[:3]).sequences).logits[0, -1]
    worst = logits.argsort()[:2].tolist()
    gap = first_difference_gap(small_model, text(said[:3] + worst[:1]), text(said[:3] + worst[1:]))
    assert gap == pytest.approx((logits.max() - logits.min()).item(), abs=1e-3) and gap > near_tie(torch.float32)


def test_a_beginning_is_never_a_tie(small_model, said):
    assert first_difference_gap(small_model, text(said[:5]), text(said)) == float("inf")


def test_a_tie_is_a_few_units_in_the_last_place():
    assert near_tie(torch.float32) < 1e-4 < near_tie(torch.float16) < near_tie(torch.bfloat16) < 1


def test_two_tokens_of_the_same_weight_part_at_a_tie_and_others_do_not(small_model, said):
    import copy

    model = copy.deepcopy(small_model)
    other = (said[4] + 1) % 50
    with torch.no_grad():  # the two are equally likely now
        model.lm_head.weight[other] = model.lm_head.weight[said[4]]
    one, two, wrong = (text(said[:4] + [token]) for token in (said[4], other, (said[4] + 2) % 50))
    result = identity(model, Timing("a", [], [one, two, wrong]), Timing("b", [], [one, one, one]))
    assert (result["prompts"], result["identical"], result["ties"]) == (3, 1, 1)
    assert result["gaps"][0] <= result["tie"] == near_tie(torch.float32) < result["gaps"][1]


@pytest.mark.parametrize("goes_on", [True, False])
def test_words_that_were_split_otherwise_than_they_were_said(small_model, said, goes_on):
    """What is split as "ab" may have been said as "a", "b": if the model says "b" after "a"."""
    joined, last = 40, said[5] if goes_on else (said[5] + 1) % 40
    words = {said[4]: "a", last: "b", joined: "ab"}
    assert len(words) == 3 and joined not in said

    class Split:
        def decode(self, tokens):
            return "".join(words.get(token, "?") for token in tokens)

    one, two = text(said[:6]), text(said[:4] + [joined])
    assert first_difference_gap(small_model, one, two) > 0.1
    gap = first_difference_gap(small_model, one, two, Split())
    assert gap == 0 if goes_on else gap > 0


def test_answers_are_compared_by_id_token_for_token(tiny_model, tokenizer):
    def answer(number: int, said: str) -> dict:
        messages = [dict(role="user", content="Hello"), dict(role="assistant", content=said)]
        start = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
        return dict(id=str(number), messages=messages, prompt_tokens=len(tokenizer(start).input_ids))

    mine = [answer(0, "one two"), answer(1, "one two"), answer(2, "never asked")]
    theirs = {"0": answer(0, "one two"), "1": answer(1, "one three"), "9": answer(9, "another")}
    assert compare_answers(tiny_model, tokenizer, mine, theirs) == dict(answers=2, equal=1, near_ties=0)
