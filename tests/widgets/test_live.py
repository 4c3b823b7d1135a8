"""The live pieces: they show what the decoders did, follow their controls, and leave a picture where nobody watches."""

import asyncio
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from random_heads import randomised

from medusa_nb.chat import prompt_ids
from medusa_nb.decoding import Decoder
from medusa_nb.drafting import GrowingTree
from medusa_nb.path_heads import PathHeads
from medusa_nb.tree import Tree, build_tree, expected_tokens
from medusa_nb.widgets import answers, game, lens, live, monitor, planner, race, stepper

CHAT = [dict(role="user", content="def f(x):"), dict(role="assistant", content="    return x + 1\n    y = 2")]
PROMPT = torch.arange(40, 52)
WORTH = torch.tensor([[0.0] * 5, [0.99] * 5])


# The game


def test_the_game_keeps_what_the_model_would_have_said(tiny_model, tokenizer, shown):
    played = game.Game(tiny_model, tokenizer, PROMPT, [])
    plain = Decoder(tiny_model, max_length=80).generate([PROMPT], 20, [])[0].new_tokens
    assert played.pieces == [tokenizer.decode([plain[0]])] and played.groups == [None]
    played.say(PROMPT)
    draft = tokenizer.decode(plain[1:3])
    typed = tokenizer(draft, add_special_tokens=False).input_ids
    verdict = played.judge(draft + " wrong")
    kept = 0
    while kept < len(typed) and typed[kept] == plain[1 + kept]:
        kept += 1
    assert verdict.startswith(f"{kept} of ") and "the model had" in verdict
    assert played.ids[len(PROMPT) :].tolist() == plain[: kept + 2]
    assert played.groups == [None] + [0] * kept + [None] and played.passes == 2
    assert f"{kept + 2} tokens in 2 passes" in played.score


def test_whatever_is_typed_the_text_is_the_model_s(tiny_model, tokenizer, shown):
    drafts = ("", " ", "nonsense here", "\n\n", "🐍 éé")
    played = game.play(tiny_model, tokenizer, PROMPT, [], drafts)
    plain = Decoder(tiny_model, max_length=80).generate([PROMPT], 30, [])[0].new_tokens
    assert played.ids[len(PROMPT) :].tolist() == plain[: len(played.pieces)] and played.passes == 1 + len(drafts)
    assert len(shown) == 1 and shown[0].startswith("")


def test_the_game_is_played_in_a_field(tiny_model, tokenizer, shown, live):
    played = game.play(tiny_model, tokenizer, PROMPT, [])
    view, field, verdict = shown[0].children
    before = view.value
    field.value = "typed"
    assert played.passes == 2 and view.value != before and "tokens kept" in verdict.value and field.value == ""


def test_the_game_ends_with_the_answer(tiny_model, tokenizer, shown, live):
    first = Decoder(tiny_model, max_length=80).generate([PROMPT], 2, [])[0].new_tokens
    assert game.Game(tiny_model, tokenizer, PROMPT, first[:1]).over
    assert not game.Game(tiny_model, tokenizer, PROMPT, [first[0] + 1]).over


# The race


def test_both_runners_write_the_text_of_plain_decoding(runners, tokenizer, shown):
    lanes = race.race(runners, tokenizer, ["Hi"], 30, [])
    prompt = torch.tensor(prompt_ids(tokenizer, [dict(role="user", content="Hi")]))
    expected = runners["plain"].generate([prompt], 30, [])[0]
    for lane in lanes.values():
        assert lane.pieces == [tokenizer.decode([token]) for token in expected.new_tokens]
        assert len(lane.pieces) == len(lane.times) == len(lane.drafted_by)
        assert lane.times == sorted(lane.times) and lane.seconds >= lane.times[-1]
    assert len(lanes["plain"].passes) == 30 and set(lanes["plain"].drafted_by) == {None}
    assert "plain: 30 tokens in" in shown[1] and "heads: 30 tokens in" in shown[1]


def test_raced_for_is_the_first_answer_that_ends(runners, tokenizer, shown):
    def answer(text: str) -> list[int]:
        prompt = torch.tensor(prompt_ids(tokenizer, [dict(role="user", content=text)]))
        return runners["plain"].generate([prompt], 30, [])[0].new_tokens

    first, second = answer("Hi"), answer("Why?")
    end = next(token for token in second if token not in first)
    lanes = race.race(runners, tokenizer, ["Hi", "Why?"], 30, [end])
    assert {len(lane.pieces) for lane in lanes.values()} == {second.index(end) + 1}
    lanes = race.race(runners, tokenizer, ["Hi", "Why?"], 30, [])
    assert {len(lane.pieces) for lane in lanes.values()} == {30}, "none ends: the first is taken"


def test_a_race_ends_with_the_end_token(runners, tokenizer, shown):
    new = runners["plain"].generate([PROMPT], 30, [])[0].new_tokens
    lanes = race.run_race(runners, tokenizer, PROMPT, 30, [new[7]])
    assert {len(lane.pieces) for lane in lanes.values()} == {new.index(new[7]) + 1}


def test_a_lane_at_an_earlier_time_shows_what_was_there():
    lane = race.Lane("x", ["a", "b", "<c>"], [None, 0, None], [1.0, 2.0, 3.0], [1.0, 3.0], 3.0)
    cells, facts = lane.until(2.5)
    assert cells == [("a", None), ("b", 0)] and facts == "2.5 s · 2 tokens"
    assert lane.until(0.0) == ([], "0.0 s · 0 tokens")
    assert "3 tokens · 2.00 per pass" in lane.until(None)[1] and lane.until(99) == lane.until(None)
    assert "&lt;c&gt;" in race.picture({"x": lane}) and "&lt;c&gt;" not in race.picture({"x": lane}, 2.5)


def test_whoever_used_less_time_goes_next_and_the_race_is_watched(monkeypatch, runners, tokenizer):
    clock, seen = iter(range(10_000)), []
    monkeypatch.setattr(race.time, "perf_counter", lambda: float(next(clock)))
    lanes = race.run_race(runners, tokenizer, PROMPT, 12, [], lambda lanes: seen.append(len(lanes)))
    assert len(lanes["plain"].passes) == 12 and len(seen) > 12
    assert lanes["heads"].seconds <= lanes["plain"].seconds


def test_a_live_race_is_replayed_and_run_again(runners, tokenizer, shown, live, tmp_path):
    race.race(runners, tokenizer, ["Hi"], 12, [], keep=tmp_path / "race.gif")
    assert (tmp_path / "race.gif").stat().st_size
    view, box = shown
    slider, speed = box.children[0].children[1:]
    finished = view.value
    slider.value = 0
    assert "0 tokens" in view.value and view.value != finished
    speed.value = 30
    field, again = box.children[1].children
    assert field.value == "Hi"
    field.value = "Hello there"
    again.click()
    assert view.value not in ("", finished) and not again.disabled
    assert box.children[0].children[1] is not slider
    field.value = "long " * 200
    again.click()
    assert "do not fit" in view.value and not again.disabled


def test_a_race_becomes_an_animation(runners, tokenizer, tmp_path):
    lanes = race.run_race(runners, tokenizer, PROMPT, 12, [])
    race.animation(lanes, tmp_path / "race.gif", frames=4)
    picture = Image.open(tmp_path / "race.gif")
    assert picture.n_frames >= 3 and picture.width > 400


# The stepper


@pytest.mark.parametrize("kind", ["heads", "seeing_heads"])
def test_the_stepper_tells_what_its_head_thought_of_each_candidate(kind, tiny_model, tokenizer, request):
    some = request.getfixturevalue(kind)
    tree = Tree.from_paths([(0,), (1,), (0, 0), (0, 2), (1, 1), (0, 0, 1)])
    passes = stepper.Passes(Decoder(tiny_model, some, tree, max_length=80), tokenizer, PROMPT, 20)
    for number in range(len(passes)):
        chances = passes.chances(number)
        assert chances[0] is None and all(0 <= chance <= 1 for chance in chances[1:])
        assert chances[1] >= chances[2] and chances[3] >= chances[4]  # head 0's best, its second; head 1's likewise
    labels, notes = passes.labels(0)
    assert notes[0].endswith("the base model itself said it") and "drafted by head 1, probability" in notes[4]
    assert ("accepted" in notes[1]) == (1 in passes.steps[0].path) and "%" in labels[1]


def test_the_first_candidate_s_probability_is_its_head_s(tiny_model, tokenizer, seeing_heads):
    passes = stepper.Passes(Decoder(tiny_model, seeing_heads, Tree.chain(3), max_length=80), tokenizer, PROMPT, 12)
    new = Decoder(tiny_model, max_length=80).generate([PROMPT], 12, [])[0].new_tokens
    with torch.no_grad():
        ids = torch.cat([PROMPT, torch.tensor(new[:0], dtype=torch.long)])
        state = tiny_model.model(ids[None]).last_hidden_state[0, -1]
        chance = seeing_heads(state[None], torch.tensor([[new[0]] * 3]))[0, 0].softmax(-1).max().item()
    assert passes.chances(0)[1] == pytest.approx(chance, abs=1e-4)


@pytest.fixture
def copying(small_model, tokenizer):
    """Passes of a model of 50 tokens, which repeats itself, with heads that can only draft half of them."""
    heads = randomised(PathHeads(small_model, 2, torch.arange(25)))
    decoder = Decoder(small_model, max_length=80, draft=GrowingTree(heads, 8, ngram_worth=WORTH))
    return stepper.Passes(decoder, tokenizer, torch.tensor([7, 8, 9, 10] * 5), 40)


def test_the_stepper_names_copied_tokens(copying):
    notes = [note for number in range(len(copying)) for note in copying.labels(number)[1]]
    assert any("copied from the text" in note for note in notes)
    assert any("drafted by head" in note for note in notes)


def test_only_what_a_head_can_draft_has_a_probability(copying):
    """A copied token may be deeper than there are heads, or one that no head drafts."""
    without = 0
    for number, step in enumerate(copying.steps):
        rows = zip(step.tokens, copying.chances(number), copying.tree(number).paths, strict=True)
        for token, chance, path in list(rows)[1:]:
            assert (chance is not None) == (token < 25 and len(path) <= 2)
            without += chance is None
    assert without, "nothing was copied that the heads cannot draft"


def test_the_stepper_moves_and_leaves_a_picture(runners, tokenizer, shown, monkeypatch, capsys):
    stepper.step_through(runners["heads"], tokenizer, PROMPT, 12)
    assert shown[0].startswith("Candidate tree of 8 nodes") and capsys.readouterr().out.startswith("pass 4 of ")
    monkeypatch.setattr(stepper, "watched", lambda: True)
    stepper.step_through(runners["heads"], tokenizer, PROMPT, 12)
    slider, view = shown[1].children
    before = view.value
    slider.value = 1
    assert view.value != before and view.value.count("<svg") == 2


def test_the_stepper_s_picture_marks_who_is_looked_at(runners, tokenizer):
    passes = stepper.Passes(runners["heads"], tokenizer, PROMPT, 12)
    for number in range(len(passes)):
        html, tree = passes.html(number), passes.tree(number)
        assert html.count('tabindex="0"') == len(tree) and html.count("<path") == len(tree) - 1
        assert html.count('height="14" fill="#4d4d4d"') == int(tree.mask().sum())
        for node in range(len(tree)):
            lit = re.search(rf'class="node n{node}((?: u\d+)+)"', html)[1].split()
            assert lit == [f"u{n}" for n in tree.mask()[:, node].nonzero()[:, 0].tolist()]
        ends = [
            float(x) + float(w)
            for x, w in re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="18"', html)
        ]
        width, height = (float(re.search(rf'<svg {side}="([\d.]+)"', html)[1]) for side in ("width", "width"))
        assert max(ends) <= width and height


# The lens


def test_the_lens_looks_through_any_token(tiny_model, tokenizer, seeing_heads, shown, live):
    glass = lens.Lens(tiny_model, seeing_heads, tokenizer, dict(id="x", messages=CHAT))
    for place in range(len(glass)):
        t = glass.start + place - 1
        true = [glass.ids[i] if i < len(glass.ids) else None for i in range(t + 2, t + 5)]
        assert [p.true for p in glass.predictions(place)] == true
        assert all(sum(chance for _, chance in p.best) <= 1.001 for p in glass.predictions(place))
    hidden, path = glass.hidden[glass.start - 1], torch.tensor(glass.ids[glass.start : glass.start + 3])
    logits = seeing_heads(hidden[None], path[None])[:, 0]
    assert [p.best[0][0] for p in glass.predictions(0)] == logits.argmax(-1).tolist()
    lens.head_lens(tiny_model, seeing_heads, tokenizer, dict(id="x", messages=CHAT))
    slider, view = shown[-1].children
    before = view.value
    slider.value = 2
    assert view.value != before and view.value.count("<tr>") == 3 and "head 2" in view.value
    assert view.value.count("outline:2px") == 1


def test_the_lens_leaves_a_picture(tiny_model, tokenizer, heads, shown, capsys):
    lens.head_lens(tiny_model, heads, tokenizer, dict(id="x", messages=CHAT), shown=2)
    said = capsys.readouterr().out
    assert len(shown) == 1 and said.count("true:") == 3 and "of 3 heads in a row are right" in said


def test_the_lens_shows_a_short_answer_too(tiny_model, tokenizer, heads, shown):
    chat = [dict(role="user", content="x"), dict(role="assistant", content="yes it is")]
    lens.head_lens(tiny_model, heads, tokenizer, dict(id="x", messages=chat), shown=40)
    assert len(shown) == 1


# The monitor


def logged(watch, steps, max_steps=9):
    state = SimpleNamespace(global_step=0, max_steps=max_steps)
    control = SimpleNamespace(should_training_stop=False)
    watch.on_train_begin(None, state, control)
    for step in range(1, steps + 1):
        state.global_step = step
        watch.on_log(None, state, control, {"head0_loss": 9.0 / step, "head0_top1": 0.1 * step})
        watch.on_log(None, state, control, {"learning_rate": 1.0})
        watch.on_step_end(None, state, control)
        if control.should_training_stop:
            break
    watch.on_train_end(None, state, control)
    return state.global_step


def test_the_monitor_draws_and_its_button_stops(shown, live):
    watch = monitor.TrainingMonitor(1)

    def press(*arguments):
        watch.stop()

    assert logged(watch, 5) == 5
    [box] = shown
    button, words = box.children[0].children
    assert box.children[1].value[:4] == b"\x89PNG" and words.value == "step 5 of 9" and len(watch.log) == 5
    button.click()
    assert watch.stopped and logged(watch, 5) == 1 and "(stopped)" in watch.words.value


def test_the_monitor_is_silent_where_nobody_watches(shown):
    watch = monitor.TrainingMonitor(1)
    logged(watch, 3)
    assert shown == [] and len(watch.log) == 3 and watch.image is None


def test_training_runs_beside_the_kernel_and_an_interrupt_stops_it():
    watch, steps = monitor.TrainingMonitor(1), []

    def train(options, callbacks):
        [callback] = callbacks
        steps.append(logged(callback, 10**6))
        return dict(options=options)

    assert asyncio.run(stopped_soon(watch, train)) and steps[0] < 10**6


async def stopped_soon(watch, train):
    task = asyncio.create_task(watch.watch(train, "how"))
    while len(watch.log) < 3:
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return watch.stopped


# The planner

COUNTS = Counter({(): 100, (0,): 60, (1,): 10, (0, 0): 30})


def test_what_is_planned_is_tokens_by_time():
    latency = {1: 1.0, 2: 1.1, 4: 1.3}
    curve = planner.planned(COUNTS, latency, draft=0.1)
    assert curve == pytest.approx({1: 1.0, 2: 1.6 / 1.2, 4: expected_tokens(build_tree(COUNTS, 4), COUNTS) / 1.4})
    flat = planner.planned(COUNTS, latency, draft=0.0, flatness=0.0)
    assert flat == pytest.approx({n: expected_tokens(build_tree(COUNTS, n), COUNTS) for n in latency})


def test_the_planner_follows_its_sliders(shown, live):
    planner.planner(COUNTS, {1: 1.0, 2: 1.1, 4: 1.3}, 0.1, size=4)
    nodes, slope, words, image = shown[0].children
    before, said = image.value, words.value
    slope.value = 4
    assert image.value != before and words.value != said and image.value[:4] == b"\x89PNG"
    nodes.value = 2
    assert words.value.startswith("2 nodes: 1.60 tokens per pass")


def test_the_planner_leaves_a_picture(shown):
    curve = planner.planner(COUNTS, {1: 1.0, 2: 1.1}, 0.1)
    assert "2: 1.33" in shown[0] and curve[2] == pytest.approx(1.6 / 1.2)


# The answer browser

ROWS = [
    dict(id=f"r{n}", messages=CHAT, finish_reason=reason, completion_tokens=n, loop=loop)
    for n, reason, loop in ((5, "stop", False), (40, "length", True), (40, "length", False), (9, "stop", False))
]


def test_answers_are_chosen_by_end_length_and_loops():
    assert [r["id"] for r in answers.select(ROWS, finish_reason="length")] == ["r40", "r40"]
    assert answers.select(ROWS, loops="yes") == [ROWS[1]]
    assert answers.select(ROWS, loops="no", tokens=(6, 40)) == ROWS[2:]


def test_the_browser_leafs_and_filters(shown, live):
    answers.browse(ROWS)
    (ended, loops), (length, number, count), view = (getattr(c, "children", c) for c in shown[0].children)
    number.value = 2
    assert "r40" in view.value and "repetition loop" in view.value
    loops.value = "no"
    assert number.value == 1 and "r5" in view.value and count.value == "3 of 4 answers"
    length.value = (6, 10)
    assert "r9" in view.value and number.disabled
    ended.value = "length"
    assert "No answer is like that" in view.value and count.value == "0 of 4 answers"


def test_the_browser_leaves_the_first_answers(shown, capsys):
    answers.browse(ROWS, shown=2)
    said = capsys.readouterr().out
    assert shown == [] and "5 tokens · stop" in said and "40 tokens · length" in said and "r9" not in said
    answers.browse([], shown=2)
    assert capsys.readouterr().out == ""


def test_an_answer_s_html_is_text_not_markup():
    row = dict(ROWS[0], messages=[dict(role="user", content="<script>alert(1)</script>")])
    assert "<script>" not in answers.conversation_html(row) and "&lt;script&gt;" in answers.conversation_html(row)


def test_tokens_are_escaped_and_tinted():
    html = live.tokens_html(["<b>", "x"], [None, 1])
    assert "&lt;b&gt;" in html and "head 1" in html and "base model" in html
