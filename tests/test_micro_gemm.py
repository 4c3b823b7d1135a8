"""Our kernel against torch's product: every number of rows, odd sizes, both number formats and register widths."""

import pytest
import torch
from processors import PROCESSORS, compiled, needs_avx2, needs_pairs
from torch._inductor import cpu_vec_isa
from torch._inductor.utils import run_and_get_code

from medusa_nb.compilation import compiling
from medusa_nb.micro_gemm import ANY_ROWS, MOST_ROWS, row_blocks, serves


def products(layer, xs, **options):
    """What a compiled layer makes of each x, and the code that Inductor wrote."""

    def multiply(input):
        return layer(input)

    run, first, code = compiled(multiply, xs[0], weight=layer.weight, rows=len(xs[0]), **options)
    with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
        return [first, *(run(x) for x in xs[1:])], code


@pytest.mark.parametrize(("dtype", "bits"), PROCESSORS)
@pytest.mark.parametrize("rows", [*range(1, MOST_ROWS + 2), 16, 17, 31])
def test_any_number_of_rows(rows, dtype, bits, compiler_works):
    torch.manual_seed(rows)
    layer, x = torch.nn.Linear(70, 90, bias=rows % 2 == 0).to(dtype).eval(), torch.randn(rows, 70, dtype=dtype)
    [made], code = products(layer, [x], bits=bits)
    if bits == 256 and rows > 2 * ANY_ROWS:
        assert "_block<" not in code  # a library is faster
    else:
        assert f"_block<{-(-rows // -(-rows // MOST_ROWS))}, accum>" in code
        assert ("_mm512_" in code, "_dpbf16_" in code) == (bits == 512, dtype == torch.bfloat16)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(made, layer.double()(x.double()).to(dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "bits"), PROCESSORS[1:])
def test_prompts_of_any_length(dtype, bits, compiler_works):
    layer = torch.nn.Linear(64, 100).to(dtype).eval()
    xs = [torch.randn(rows, 64, dtype=dtype) for rows in (64, 2, 3, 7, 8, 13, 200)]
    made, code = products(layer, xs, dynamic="L['input']")
    assert f"rows_{ANY_ROWS}x" in code
    for x, y in zip(xs, made, strict=True):
        torch.testing.assert_close(y, layer(x), rtol=2e-2, atol=2e-2)


@needs_pairs
def test_an_odd_number_of_inputs_is_left_to_others(compiler_works):
    layer, x = torch.nn.Linear(33, 64).bfloat16().eval(), torch.randn(3, 33).bfloat16()
    [made], code = products(layer, [x])
    assert "dpbf16" not in code
    torch.testing.assert_close(made, layer(x), rtol=2e-2, atol=2e-2)


@needs_avx2
def test_the_library_on_request_and_nothing_is_left_behind(compiler_works):
    layer, x = torch.nn.Linear(64, 64).eval(), torch.randn(3, 64)
    products(layer, [x])
    for library in (True, False):
        [made], code = products(layer, [x], library=library)
        assert ("_block<3, accum>" in code) != library
        torch.testing.assert_close(made, layer(x), rtol=1e-5, atol=1e-5)
    said, code = run_and_get_code(torch.compile(layer.forward, fullgraph=True, dynamic=False), x)
    assert "_block<" not in "\n".join(code)


@needs_avx2
def test_graphs_kept_on_disk_are_found_only_with_the_same_kernels():
    tags = []
    for library in (False, True):
        with compiling(torch.empty(8, 8), 1, "", library):
            tags.append(torch.compiler.config.cache_key_tag)
    assert len(tags[0]) == 64 and tags[1] == torch.compiler.config.cache_key_tag == ""


@needs_avx2
def test_products_without_weights_compile_too(compiler_works):
    class Scores(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(64, 64))

        def forward(self, input):
            query = (input @ self.weight).view(3, 4, 16).transpose(0, 1)
            return query @ query.transpose(1, 2)

    module, x = Scores().eval(), torch.randn(3, 64)
    [made], _ = products(module, [x])
    torch.testing.assert_close(made, module(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("processor", "served"),
    [
        ("VecAMX", {(torch.float32, 1), (torch.float32, 64)}),  # it has tiles for bfloat16
        ("VecAVX512VNNI", {(torch.float32, 1), (torch.float32, 64), (torch.bfloat16, 1), (torch.bfloat16, 64)}),
        ("VecAVX512", {(torch.float32, 1), (torch.float32, 64)}),
        ("VecAVX2", {(torch.float32, 1)}),
        ("VecNEON", set()),
    ],
)
def test_what_is_best_left_to_a_library(processor, served, monkeypatch):
    here = getattr(cpu_vec_isa, processor)()
    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", lambda: here)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    kinds = [(dtype, rows) for dtype in (torch.float32, torch.bfloat16, torch.float16) for rows in (1, 64)]
    assert {kind for kind in kinds if serves(*kind)} == served
    # where float32 is served there is a block for it: Inductor would take its slow reference kernel
    [blocks] = row_blocks().values()
    known = [config for config in blocks if issubclass(type(here), config.vec_isa_cls)]
    assert {config.input_dtype for config in known} >= {dtype for dtype, _ in served}
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert not serves(torch.bfloat16, 1)
