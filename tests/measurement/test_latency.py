"""What a pass costs, and which tree size follows from it."""

from collections import Counter

import pytest
import torch
from tiny_models import small_llama

from medusa_nb.measurement.latency import (
    blind_decoder,
    fastest_size,
    measure_latency,
    read_seconds,
    time_steps,
    weight_bytes,
)
from medusa_nb.measurement.machine import machine
from medusa_nb.training.calibration import Calibration


def test_latency_of_each_width(small_model):
    latency = measure_latency(small_model, widths=(1, 3), past=10, repeats=3)
    assert list(latency) == [1, 3]
    assert all(seconds > 0 for seconds in latency.values())


def test_a_past_longer_than_the_context_is_shortened():
    model = small_llama(context=24)
    assert list(measure_latency(model, widths=(1, 16), past=200, repeats=1)) == [1, 16]


def test_every_decoder_takes_its_steps_in_turn(small_model):
    order = []
    decoders = {n: blind_decoder(small_model, n, 20) for n in (1, 4)}
    for n, decoder in decoders.items():
        decoder.run = lambda *state, n=n, step=decoder.step: order.append(n) or step(*state)
    time_steps(decoders, 20, repeats=8)
    assert order == ([1] * 10 + [4] * 10) * 2  # seven of ten count, so two rounds


def test_a_blind_draft_is_a_star_that_costs_no_heads(small_model):
    decoder = blind_decoder(small_model, 5, 20)
    state = decoder.start([torch.arange(6)])
    candidates = decoder.draft(state)
    assert candidates.tokens.shape == (1, 5) and candidates.tokens[0, 0] == state.token
    assert candidates.parents.tolist() == [[0] * 5] and candidates.depths.tolist() == [[0, 1, 1, 1, 1]]


def test_only_weights_that_a_pass_reads_are_counted():
    def bytes_of(model) -> int:
        return sum(p.numel() * p.element_size() for p in model.parameters())

    tied, apart = small_llama(tie_word_embeddings=True), small_llama()
    assert weight_bytes(tied) == bytes_of(tied)
    assert weight_bytes(apart) == bytes_of(apart) - 50 * 32 * 4  # the embedding is only looked up
    assert read_seconds(tied, repeats=3) > 0


@pytest.mark.parametrize(
    ("latency", "draft_seconds", "size"),
    [
        ({1: 1.0, 2: 1.0, 4: 1.0}, 0.0, 4),  # a flat curve: as many as there are
        ({1: 1.0, 2: 1.2, 4: 9.0}, 0.0, 2),
        ({1: 1.0, 2: 1.9, 4: 2.5}, 0.0, 1),  # nothing is worth its cost
        ({1: 1.0, 2: 1.2, 4: 9.0}, 1.0, 1),  # drafting costs, too
    ],
)
def test_the_fastest_size_has_most_tokens_a_second(latency, draft_seconds, size):
    counts = Counter({(): 100, (0,): 60, (0, 0): 30, (1,): 15})  # 1, 1.6 and 2.05 tokens
    known = Calibration(counts, torch.zeros(1, 1), torch.arange(3))
    assert fastest_size(known, latency, draft_seconds) == size


def test_the_machine_says_what_numbers_depend_on(small_model):
    about = machine(small_model)
    assert about["dtype"] == "float32" and about["threads"] == torch.get_num_threads()
    assert about["processor"] and {"torch", "transformers", "python", "memory_gb"} <= about.keys()
    assert "dtype" not in machine()
