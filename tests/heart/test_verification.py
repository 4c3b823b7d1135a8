"""The pass over a tree says what the model says of each branch; what cannot is refused at construction."""

import pytest
import torch
from drafts import own_text, prompt, random_heads
from tiny_models import random_model, random_tree, small_llama
from transformers import (
    GPTNeoConfig,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    Phi3Config,
    T5Config,
    T5ForConditionalGeneration,
)

from medusa_nb.decoding import Decoder
from medusa_nb.drafting import filled
from medusa_nb.errors import InputError
from medusa_nb.sampling import Sampler
from medusa_nb.tree import Tree
from medusa_nb.verification import Verifier, longest_accepted_path

SIZES = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SIZES |= dict(intermediate_size=64, pad_token_id=0, eos_token_id=None)
GRANITE = GraniteConfig(**SIZES, logits_scaling=8.0)
LONG_ROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4)
PHI3 = Phi3Config(
    **SIZES,
    max_position_embeddings=96,
    original_max_position_embeddings=24,
    rope_parameters=LONG_ROPE | dict(original_max_position_embeddings=24),
)


def walked_path(tree: Tree, tokens: list[int], said: list[int]) -> list[int]:
    """The obvious way: from the root go to the child that is right, as long as there is one."""
    path = [0]
    while right := [child for child in tree.children[path[-1]] if tokens[child] == said[path[-1]]]:
        path.append(right[0])
    return path


def accepted_path(tree: Tree, tokens: list[int], said: list[int]) -> list[int]:
    candidates = filled(tree, torch.tensor([tokens]))
    path, count = longest_accepted_path(candidates, torch.tensor([said]), tree.depth)
    return path[0, : count[0]].tolist()


def test_the_longest_accepted_path_by_hand():
    tree = Tree.from_paths([(0,), (1,), (0, 0), (1, 0), (1, 0, 0)])  # nodes 1 to 5 in this order
    assert accepted_path(tree, [7, 8, 9, 1, 2, 3], [9, 0, 2, 0, 3, 5]) == [0, 2, 4, 5]
    assert accepted_path(tree, [7, 8, 9, 1, 2, 3], [6, 1, 2, 0, 3, 5]) == [0]
    assert accepted_path(tree, [7, 8, 9, 1, 2, 3], [8, 4, 2, 0, 3, 5]) == [0, 1]


@pytest.mark.parametrize("seed", range(30))
def test_the_longest_accepted_path_is_the_walk_from_the_root(seed):
    tree, generator = random_tree(4, 14, seed), torch.Generator().manual_seed(seed)
    said = torch.randint(3, (len(tree),), generator=generator).tolist()
    tokens = [0] * len(tree)
    for children in tree.children:  # siblings differ, as one head's tokens do
        for child, token in zip(children, torch.randperm(4, generator=generator).tolist(), strict=False):
            tokens[child] = token
    assert accepted_path(tree, tokens, said) == walked_path(tree, tokens, said)


def test_the_mask_shows_the_text_and_the_path_and_nothing_else(small_model):
    tree = random_tree(3, 9, 1)
    verifier = Verifier(small_model, 2, 40)
    mask = verifier.attention_mask(filled(tree, torch.zeros(2, 9, dtype=torch.long)), torch.tensor([5, 11]), 24)
    for text, length in enumerate((5, 11)):
        for node in range(9):
            path = {length + i for i in tree.mask()[node].nonzero()[:, 0].tolist()}
            seen = set((mask[text, 0, node] == 0).nonzero()[:, 0].tolist())
            assert seen == set(range(length)) | path


def test_scaled_logits_are_the_models_own_greedily_and_in_distribution():
    """Met with Granite: the best token was drawn with 0.148 where the model's probability is 0.023."""
    model, ids = random_model(GRANITE), prompt(7)
    decoder = Decoder(model, random_heads(model, 2), Tree.chain(2), max_length=60)
    assert decoder.generate([ids], 30, [])[0].new_tokens == own_text(model, ids, 30)
    state, tree = decoder.start([ids]), random_tree(3, 9)
    tokens = torch.randint(60, (1, 9), generator=torch.Generator().manual_seed(0))
    logits, _ = decoder.verifier.look(filled(tree, tokens), state.lengths, 32)
    for node in range(9):
        text = torch.cat([ids, tokens[0, tree.mask()[node]]])
        wanted, ours = model(text[None]).logits[0, -1].softmax(-1), Sampler().probabilities(logits[:, node])[0]
        assert torch.allclose(ours, wanted, atol=1e-4)
        assert wanted.max() < 0.9  # else a wrong scale would go unnoticed


def test_a_text_that_could_cross_the_switch_of_long_rope_is_refused():
    model = random_model(PHI3)
    decoder = Decoder(model, random_heads(model, 2), Tree.chain(2), max_length=60)
    with pytest.raises(InputError, match=r"changes its rope \(longrope\) at 24 tokens.*ask for fewer"):
        decoder.generate([prompt(9)], 40, [])
    assert decoder.generate([prompt(9)], 13, [])[0].new_tokens == own_text(model, prompt(9), 13)
    assert decoder.generate([prompt(30)], 25, [])[0].new_tokens == own_text(model, prompt(30), 25)


def test_a_short_text_that_its_long_neighbour_would_change_is_not_decoded_beside_it():
    model = random_model(PHI3)
    decoder = Decoder(model, random_heads(model, 2), Tree.chain(2), max_length=60, slots=2)
    with pytest.raises(InputError, match="only some of these prompts are longer; decode them one by one"):
        decoder.generate([prompt(9), prompt(30)], 13, [])
    for prompts in ([prompt(9), prompt(5)], [prompt(30), prompt(40)]):
        for ids, result in zip(prompts, decoder.generate(prompts, 13, []), strict=True):
            assert result.new_tokens == own_text(model, ids, 13)


def test_dynamic_rope_may_not_grow_beyond_its_length_at_all():
    rope = dict(rope_type="dynamic", rope_theta=1e4, factor=4.0, original_max_position_embeddings=24)
    model = random_model(LlamaConfig(**SIZES, max_position_embeddings=96, rope_parameters=rope))
    decoder = Decoder(model, max_length=60)
    for length in (9, 30):
        with pytest.raises(InputError, match=r"changes its rope \(dynamic\)"):
            decoder.generate([prompt(length)], 20, [])


def test_layers_that_keep_another_state_than_keys_and_values_are_refused():
    model = random_model(Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]))
    with pytest.raises(InputError, match="Lfm2ForCausalLM .*layers all use attention with a mask"):
        Decoder(model, max_length=40)


def test_a_model_that_ignores_our_mask_is_found_out_at_construction():
    sizes = dict(vocab_size=60, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=96)
    local = GPTNeoConfig(**sizes, window_size=8, attention_types=[[["global", "local"], 1]])
    with pytest.raises(InputError, match="GPTNeoForCausalLM gives other logits for a candidate tree"):
        Decoder(random_model(local), max_length=40)
    everywhere = GPTNeoConfig(**sizes, window_size=8, attention_types=[[["global"], 2]])
    assert Decoder(random_model(everywhere), max_length=40)


def test_logits_that_are_not_finite_are_an_error():
    model = small_llama().half()
    model.model.norm.weight.fill_(6e4)
    with pytest.raises(InputError, match="not finite in float16; use bfloat16 or float32"):
        Decoder(model, max_length=40)


def test_logits_that_become_infinite_later_stop_the_text_and_are_no_choice(small_model):
    decoder = Decoder(small_llama(), max_length=60, choose=Sampler(seed=0))
    state = decoder.start([prompt(5)])
    decoder.verifier.logits = lambda hidden: torch.full((*hidden.shape[:-1], 50), float("nan"))
    with pytest.raises(InputError, match="not finite"):
        decoder.step(state, 32)


def test_an_encoder_decoder_is_refused():
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(InputError, match="encoder-decoder"):
        Decoder(T5ForConditionalGeneration(config), max_length=40)


def test_a_model_without_an_output_layer_is_refused(small_model):
    with pytest.raises(InputError, match="no backbone and output layer"):
        Decoder(small_model.base_model, max_length=40)


@pytest.mark.parametrize("seed", range(6))
def test_random_trees_in_random_models_give_the_logits_of_their_branches(seed):
    model, tree = small_llama(seed=seed, sliding_window=None), random_tree(4, 14, seed)
    verifier, prompts = Verifier(model, 3, 60), [prompt(length, seed) for length in (3, 21, 9)]
    state = verifier.read_prompts(prompts)
    tokens = torch.randint(50, (3, 14), generator=torch.Generator().manual_seed(seed))
    logits, _ = verifier.look(filled(tree, tokens), state.lengths, 40)
    for i, ids in enumerate(prompts):
        for node in range(14):
            wanted = model(torch.cat([ids, tokens[i, tree.mask()[node]]])[None]).logits[0, -1]
            assert torch.allclose(logits[i, node], wanted, atol=1e-3)
