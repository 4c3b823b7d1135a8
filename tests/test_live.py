"""The live pieces: they show what the decoders did, follow their controls, and leave a picture where nobody watches."""

import asyncio
from collections import Counter

import pytest
import torch
from conftest import EOS
from test_heads import seeing_heads
from test_training import write_features

from medusa_nb import answers, display, lens, monitor, planner, race, stepper, tree_view
from medusa_nb.decoding import Decoder
from medusa_nb.drafting import DynamicDraft
from medusa_nb.heads import MedusaHeads
from medusa_nb.training import TrainingSettings, train_heads
from medusa_nb.tree import build_tree, expected_tokens, tree_from_paths

CHAT = [dict(role="user", content="def f(x):"), dict(role="assistant", content="    return x + 1\n    y = 2")]


@pytest.fixture
def shown(monkeypatch):
    """What is displayed: widgets and HTML as they are, figures as their description."""
    things = []

    def display_(thing, **options):
        things.append(thing.get("text/plain") if isinstance(thing, dict) else thing)

    for module in (answers, display, lens, monitor, planner, race, stepper):
        monkeypatch.setattr(module, "display", display_)
    return things


@pytest.fixture
def live(monkeypatch):
    """Somebody is watching."""
    for module in (answers, lens, monitor, planner, race, stepper):
        monkeypatch.setattr(module, "is_headless", lambda: False)


@pytest.fixture
def decoders(tiny_model):
    heads = seeing_heads(tiny_model, 3)
    growing = DynamicDraft(heads, 8, "cpu", torch.tensor([[0.0, 0.0], [0.6, 0.4]]))
    return {"plain": Decoder(tiny_model, capacity=80), "Medusa": Decoder(tiny_model, draft=growing, capacity=80)}


def test_both_runners_write_the_text_of_plain_decoding(decoders, tokenizer, shown):
    prompt = torch.arange(5, 15)
    lanes = race.race(decoders, tokenizer, prompt, 30, [EOS])
    expected = decoders["plain"].generate([prompt], 30, [EOS])[0]
    for lane in lanes.values():
        assert lane.pieces == [tokenizer.decode([token]) for token in expected.new_tokens]
        assert len(lane.pieces) == len(lane.times) == len(lane.guessed_by)
        assert lane.times == sorted(lane.times) and lane.seconds >= lane.times[-1]
    assert len(lanes["plain"].passes) == len(expected.new_tokens) and set(lanes["plain"].guessed_by) == {None}
    assert "plain" in shown[0].data and "said by the base model" in shown[0].data
    assert "Medusa: " in shown[1] and " tokens in " in shown[1]


def test_a_lane_at_an_earlier_time_shows_what_was_there():
    lane = race.Lane("x", ["a", "b", "<c>"], [None, 0, None], [1.0, 2.0, 3.0], [1.0, 3.0], 3.0)
    early = lane.html(2.5)
    assert "2 tokens" in early and "&lt;c&gt;" not in early and "per pass" not in early
    assert "&lt;c&gt;" in lane.html() and "2.00 tokens per pass" in lane.html()
    assert "tokens/s" not in lane.html(0.0)


def test_whoever_used_less_time_goes_next_and_the_race_is_watched(monkeypatch, decoders, tokenizer):
    clock, seen = iter(range(10_000)), []
    monkeypatch.setattr(race.time, "perf_counter", lambda: float(next(clock)))
    lanes = race.run_race(decoders, tokenizer, torch.arange(5, 15), 12, [], lambda lanes: seen.append(len(lanes)))
    assert len(lanes["plain"].passes) == 12 and len(seen) > 12
    assert lanes["Medusa"].seconds <= lanes["plain"].seconds


def test_a_live_race_is_replayed_and_run_again(decoders, tokenizer, shown, live):
    race.race(decoders, tokenizer, torch.arange(5, 15), 12, [], ask=lambda text: torch.arange(*map(int, text.split())))
    view, box = shown
    slider = box.children[0].children[1]
    finished = view.value
    slider.value = 0
    assert "0 tokens" in view.value and view.value != finished
    field, again = box.children[1].children
    field.value = "5 25"
    again.click()
    assert view.value not in ("", finished) and not again.disabled
    assert box.children[0].children[1] is not slider
    field.value = "5 100"
    again.click()
    assert 'role="alert"' in view.value and "do not fit" in view.value and not again.disabled


@pytest.mark.parametrize("sees_path", [True, False])
def test_the_stepper_tells_rank_and_probability(tiny_model, tokenizer, sees_path):
    heads = seeing_heads(tiny_model, 3)
    if not sees_path:
        plain = MedusaHeads.for_model(tiny_model, 3)
        plain.load_state_dict({k: v for k, v in heads.state_dict().items() if k in plain.state_dict()})
        heads = plain.requires_grad_(False)
    tree = tree_from_paths([(0,), (1,), (0, 0), (0, 2), (1, 1), (0, 0, 1)])
    decoder = Decoder(tiny_model, heads, tree, capacity=80)
    passes = stepper.Passes(decoder, tokenizer, torch.arange(5, 15), 20)
    for number in range(len(passes)):  # in a static tree the rank is known: it is the node's own
        chances = passes.chances(number)
        assert [rank for _, rank in chances[1:]] == [ranks[-1] for ranks in tree.paths[1:]]
        assert all(0 <= chance <= 1 for chance, _ in chances)
    labels, notes = passes.labels(0)
    assert notes[0].endswith("the base model itself said it") and "rank path (0, 2)" in notes[4]
    assert ("accepted" in notes[1]) == (1 in passes.steps[0].path)
    assert "%" in labels[1]


def test_the_stepper_names_copied_tokens(decoders, tokenizer):
    prompt = torch.tensor([7, 8, 9, 10] * 5)
    passes = stepper.Passes(decoders["Medusa"], tokenizer, prompt, 30)
    notes = [note for number in range(len(passes)) for note in passes.labels(number)[1]]
    assert any("copied from the text; head 0 had it as number" in note for note in notes)


def test_what_is_copied_deeper_than_there_are_heads_has_no_rank(tiny_model, tokenizer):
    growing = DynamicDraft(seeing_heads(tiny_model, 2), 8, "cpu", torch.tensor([[0.0] * 5, [0.99] * 5]))
    passes = stepper.Passes(Decoder(tiny_model, draft=growing, capacity=80), tokenizer, torch.tensor([7, 8] * 8), 20)
    labels, notes = zip(*(passes.labels(number) for number in range(len(passes))), strict=True)
    deep = [label for label, note in zip(sum(labels, []), sum(notes, []), strict=True) if "'copied'" in note]
    assert deep and not any("%" in label for label in deep)


def test_a_copied_token_that_the_heads_never_guess_has_no_rank(tiny_model, tokenizer):
    heads = seeing_heads(tiny_model, 2).limited_to(torch.arange(100, 140))
    growing = DynamicDraft(heads, 8, "cpu", torch.tensor([[0.0] * 5, [0.99] * 5]))
    passes = stepper.Passes(Decoder(tiny_model, draft=growing, capacity=80), tokenizer, torch.tensor([7, 8] * 8), 20)
    ranks = {True: [], False: []}  # of copied tokens, and of those that the heads guessed
    for number, step in enumerate(passes.steps):
        for node, (_, rank) in list(enumerate(passes.chances(number)))[1:]:
            assert node in step.copied or 100 <= step.tokens[node] < 140
            ranks[node in step.copied and not 100 <= step.tokens[node] < 140].append(rank)
    assert ranks[True] and set(ranks[True]) == {-1}
    assert ranks[False] and all(0 <= rank < 40 or rank == -1 for rank in ranks[False])


def test_the_stepper_moves_and_leaves_a_picture(decoders, tokenizer, shown, monkeypatch):
    stepper.step_through(decoders["Medusa"], tokenizer, torch.arange(5, 15), 12)
    assert shown[0].startswith("pass 4 of ") and "tree mask" in shown[0]
    monkeypatch.setattr(stepper, "is_headless", lambda: False)
    stepper.step_through(decoders["Medusa"], tokenizer, torch.arange(5, 15), 12)
    slider, view = shown[1].children
    before = view.value
    slider.value = 1
    assert view.value != before and view.value.count("<svg") == 2


def test_the_tree_as_svg_marks_who_is_looked_at():
    tree = tree_from_paths([(0,), (1,), (0, 0)])
    notes = [f"note {n}" for n in range(4)]
    text = tree_view.tree_svg(tree, ["a", "<b>", "c", "d"], notes, [0, 1], "all of it")
    assert text.count('tabindex="0"') == 4 and "&lt;b&gt;" in text and 'aria-label="note 3"' in text
    assert 'class="node n3 u3"' in text and 'class="node n1 u1 u3"' in text  # node 1 lights up for node 3, too
    assert text.count('fill="#4d4d4d"') - 1 == int(tree.mask().sum())  # the dark cells, and the root


def test_colours_can_be_read():
    for fill in (*display.HEAD_COLORS, display.BASE_COLOR, tree_view.REJECTED):
        color = tree_view.REJECTED_INK if fill == tree_view.REJECTED else display.ink(fill)
        lights = []
        for shade in (fill, color):
            parts = [int(shade[i : i + 2], 16) / 255 for i in (1, 3, 5)]
            linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
            lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
        assert (max(lights) + 0.05) / (min(lights) + 0.05) >= 4.5, (fill, color)  # WCAG 2, level AA


def test_the_lens_looks_through_any_token(tiny_model, tokenizer, shown, live):
    heads = seeing_heads(tiny_model, 3)
    glass = lens.Lens(tiny_model, heads, tokenizer, CHAT)
    for place in range(len(glass)):
        guesses = glass.guesses(place)
        assert [g.true for g in guesses] == [
            glass.ids[i] if i < len(glass.ids) else None
            for i in range(glass.start + place + 1, glass.start + place + 4)
        ]
    logits = heads(glass.hidden[glass.start - 1], path=torch.tensor(glass.ids[glass.start : glass.start + 3]))
    assert [g.best[0][0] for g in glass.guesses(0)] == logits.argmax(-1).tolist()
    assert sum(glass.lines(), []) == list(range(len(glass)))
    lens.head_lens(tiny_model, heads, tokenizer, CHAT)
    *rows, view = shown[-1].children
    before = view.value
    rows[0].children[0].click()
    assert view.value != before and view.value.count("<tr>") == 3 and "head 2" in view.value


def test_the_lens_leaves_a_picture(tiny_model, tokenizer, shown):
    lens.head_lens(tiny_model, seeing_heads(tiny_model, 3), tokenizer, CHAT, shown=2)
    assert shown[0].data.count("true:") == 3 and "From this state the next" in shown[0].data


class PressStop(monitor.TrainingMonitor):
    """Presses the button at a step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.stop()


def test_the_monitor_stops_and_what_was_learned_is_kept(tiny_model, tmp_path, shown, live):
    features = write_features(tmp_path / "features", heads=3)
    heads = MedusaHeads.for_model(tiny_model, 3)
    watch = PressStop(3)
    how = TrainingSettings(epochs=50, batch_size=8, logging_steps=1)
    log = asyncio.run(watch.watch(train_heads, heads, features, tmp_path / "heads", how))
    assert log[-1]["step"] == 4 and watch.log[-1]["step"] == 4
    assert watch.image.value[:4] == b"\x89PNG" and "(stopped)" in watch.words.value
    kept = MedusaHeads.from_pretrained(tmp_path / "heads", tiny_model)
    assert kept.weight.abs().sum() > 0 and torch.equal(kept.weight, heads.weight)
    assert not (tmp_path / "heads" / "checkpoints").exists()


def test_an_interrupted_cell_stops_the_training(tiny_model, tmp_path):
    features = write_features(tmp_path / "features", heads=3)
    watch, ended = monitor.TrainingMonitor(3), []

    def train(*arguments):
        ended.append(train_heads(*arguments))

    async def cell():
        how = TrainingSettings(epochs=100_000, batch_size=8, logging_steps=1)
        heads = MedusaHeads.for_model(tiny_model, 3)
        task = asyncio.create_task(watch.watch(train, heads, features, tmp_path / "heads", how))
        while not watch.log:
            await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(cell())  # waits for the thread, which would go on for hours
    assert ended and (tmp_path / "heads" / "medusa_lm_head.safetensors").is_file()


def test_the_monitor_is_silent_where_nobody_watches(tiny_model, tmp_path, shown):
    features = write_features(tmp_path / "features", heads=3)
    how = TrainingSettings(epochs=1, batch_size=8, logging_steps=1)
    train_heads(MedusaHeads.for_model(tiny_model, 3), features, tmp_path / "heads", how, [monitor.TrainingMonitor(3)])
    assert shown == []


def test_planned_tokens_are_those_of_the_best_tree():
    """Against the tree builder, on counts that follow the planner's own model exactly."""
    accuracy, decay, total = 0.6, 0.8, 10**9
    chances = [[a * (1 - a) ** r for r in range(10)] for a in (accuracy, accuracy * decay)]
    counts = Counter({(): total})
    for first, p in enumerate(chances[0]):
        counts[(first,)] = round(total * p)
        for second, q in enumerate(chances[1]):
            counts[(first, second)] = round(total * p * q)
    for size in (1, 2, 5, 9, 20):
        expected = expected_tokens(build_tree(counts, size), counts)
        assert planner.planned_tokens(accuracy, decay, size, heads=2) == pytest.approx(expected, abs=1e-6)
    assert planner.break_even_cost(0.5, 1.0, 2) == pytest.approx(0.5)


def test_the_planner_follows_its_sliders(shown, monkeypatch):
    counts = Counter({(): 100, (0,): 60, (1,): 10, (0, 0): 30})
    latency = {1: 1.0, 2: 1.1, 4: 1.3}
    planner.planner(counts, latency)
    assert "Above the line 1 guessing pays" in shown[0]
    monkeypatch.setattr(planner, "is_headless", lambda: False)
    planner.planner(counts, latency)
    accuracy, decay, size, cost, words, image = shown[1].children
    assert (accuracy.value, decay.value, cost.value) == (0.6, 0.83, 0.1)
    before, said = image.value, words.value
    accuracy.value = 0.9
    assert image.value != before and words.value != said


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


def test_the_browser_leaves_the_first_answers(shown):
    answers.browse(ROWS, shown=2)
    assert len(shown) == 2 and "5 tokens" in shown[0].data and "ended by length" in shown[1].data
    answers.browse([], shown=2)
    assert len(shown) == 2


def test_bars_write_large_numbers_without_decimals(monkeypatch):
    described = []
    monkeypatch.setattr(display, "show", described.append)
    display.plot_bars({"one by one": 2.5, "in batches": 2925.4}, "tokens per second")
    labels = [text.get_text().strip() for text in display.plt.gca().texts]
    display.plt.close()
    assert labels == ["2,925", "2.50"] and described == ["Bars, tokens per second: one by one 2.50, in batches 2,925"]
