"""Our attention against torch's: trees, prompts, grouped heads, odd lengths, number formats and register widths."""

import pytest
import torch
from processors import PROCESSORS, compiled, needs_avx2, needs_pairs
from torch._inductor.utils import run_and_get_code
from torch.nn.functional import scaled_dot_product_attention

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
OURS = "attention_rows_"


def attend(query, key, value, mask, causal, scale=None):
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def inputs(texts, heads, key_heads, rows, span, depth, dtype):
    """As a decoder has them: keys and values are parts of one buffer, seen through strides."""
    torch.manual_seed(rows * span)
    buffer = torch.randn(2, texts, span + 3, key_heads, depth, dtype=dtype)
    key, value = (part[:, :span].transpose(1, 2) for part in buffer)
    return torch.randn(texts, rows, heads, depth, dtype=dtype).transpose(1, 2), key, value


def exact(query, key, value, mask, causal, scale=None):
    return attend(query.double(), key.double(), value.double(), mask.double(), causal, scale).to(query.dtype)


@pytest.mark.parametrize(("dtype", "bits"), PROCESSORS)
@pytest.mark.parametrize(
    ("texts", "heads", "key_heads", "rows", "span", "depth"),
    [
        (1, 2, 2, 18, 192, 64),
        (1, 2, 2, 3, 97, 64),
        (3, 4, 2, 16, 45, 32),
        (1, 1, 1, 7, 1, 128),
        (2, 6, 1, 1, 65, 96),
        (1, 3, 3, 25, 31, 64),
    ],
)
def test_a_tree_of_any_size(texts, heads, key_heads, rows, span, depth, dtype, bits, compiler_works):
    query, key, value = inputs(texts, heads, key_heads, rows, span, depth, dtype)
    seen = torch.rand(texts, 1, rows, span) > 0.5
    seen[..., 0] = True
    mask = torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)
    run, said, code = compiled(attend, query, key, value, mask, False, 0.3, bits=bits)
    assert OURS in code
    torch.testing.assert_close(
        said, exact(query, key, value, mask, False, 0.3), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize(("dtype", "bits"), PROCESSORS)
def test_prompts_of_any_length(dtype, bits, compiler_works):
    def read(query, key, value):
        return attend(query, key, value, None, True)

    whole = inputs(1, 6, 2, 70, 70, 64, dtype)
    run = None
    for length in (70, 2, 3, 7, 8, 9, 64):
        arguments = [x[:, :, :length] for x in whole]
        if run is None:
            run, said, code = compiled(read, *arguments, bits=bits, dynamic="L['query']:2,L['key']:2,L['value']:2")
            assert f"{OURS}8x" in code and "causal" in code
        else:
            said = run(*arguments)
        mask = torch.full((length, length), -torch.inf).triu(1)
        torch.testing.assert_close(said, exact(*arguments, mask, False), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@needs_avx2
def test_a_row_that_sees_nothing_gives_zeros_as_in_torch(compiler_works):
    query, key, value = inputs(1, 1, 1, 2, 16, 64, torch.float32)
    mask = torch.zeros(1, 1, 2, 16)
    mask[..., 0, :] = -torch.inf
    _, said, code = compiled(attend, query, key, value, mask, False)
    assert OURS in code and (said[0, 0, 0] == 0).all()
    torch.testing.assert_close(said, attend(query, key, value, mask, False), rtol=1e-5, atol=1e-5)


@needs_avx2
def test_two_scales_in_one_graph(compiler_works):
    query, key, value = inputs(1, 1, 1, 4, 16, 64, torch.float32)
    mask = torch.zeros(1, 1, 4, 16)

    def twice(query, key, value, mask):
        return attend(query, key, value, mask, False, 0.1), attend(query, key, value, mask, False, 0.9)

    _, said, code = compiled(twice, query, key, value, mask)
    assert OURS in code
    for made, scale in zip(said, (0.1, 0.9), strict=True):
        torch.testing.assert_close(made, attend(query, key, value, mask, False, scale), rtol=1e-5, atol=1e-5)


@needs_pairs
def test_keys_that_do_not_lie_in_pairs_are_left_to_the_library(compiler_works):
    query, _, _ = inputs(1, 1, 1, 4, 16, 64, torch.bfloat16)
    key, value = torch.randn(2, 1, 1, 16, 65, dtype=torch.bfloat16)[..., :64]
    mask = torch.zeros(1, 1, 4, 16, dtype=torch.bfloat16)
    for parted, ours in (((key, value), False), ((key.contiguous(), value), True)):
        _, said, code = compiled(attend, query, *parted, mask, False)
        assert (OURS in code) == ours
        torch.testing.assert_close(said, exact(query, key, value, mask, False), rtol=2e-2, atol=2e-2)


@needs_avx2
def test_what_is_left_to_the_library(compiler_works):
    thin = inputs(1, 2, 2, 4, 16, 20, torch.float32)  # no block is as narrow
    wide = inputs(1, 2, 2, 4, 16, 64, torch.float32)
    other = inputs(1, 2, 2, 4, 16, 64, torch.float64)
    mask = torch.zeros(1, 1, 4, 16)
    same = torch.zeros(1, 1, 4, 1)  # of all columns
    for (query, key, value), hides, library in (
        (thin, mask, False),
        (wide, mask, True),
        (wide, same, False),
        (other, mask.double(), False),
    ):
        _, said, code = compiled(attend, query, key, value, hides, False, library=library)
        assert OURS not in code
        torch.testing.assert_close(said, attend(query, key, value, hides, False), rtol=1e-5, atol=1e-5)
    _, said, code = compiled(attend, *wide, mask, False)
    assert OURS in code  # and nothing of it is left behind
    _, code = run_and_get_code(torch.compile(attend, fullgraph=True, dynamic=False), *wide, mask, False)
    assert OURS not in "\n".join(code)
