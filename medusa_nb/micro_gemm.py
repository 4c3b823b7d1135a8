"""Multiplying a tree's few rows by a matrix on a CPU: a micro kernel for Inductor's C++ template.

Inductor writes the loops around a product (threads, cache blocks, what is done with the result) and asks a *micro
kernel* for one small block of it. This one is made for exactly as many rows as there are: their sums stay in registers
while the weights are read once. In bfloat16 it adds the products of two neighbours in one instruction (``vdpbf16ps``),
where Inductor's own kernel turns every weight into float32 first.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from unittest.mock import patch

import torch

MOST_ROWS = 12  # of a block; more rows are several blocks
FEW_ROWS = 6  # so few wait for the weights: wide blocks; with more, arithmetic counts, and weights are fetched ahead
ANY_ROWS = 8  # of a block where the number of rows is not known beforehand
# columns of a block of few rows, and of more: with registers of 512 bits, of 256
COLUMNS_512, COLUMNS_256 = (64, 32), (16, 8)

ROW_BLOCK = r"""
#ifndef ONCE_{{name}}
#define ONCE_{{name}}
// C[ROWS, {{columns}}] (+)= A[ROWS, K] @ B[K, {{columns}}]
template <int ROWS, bool accum>
{{target}} void {{name}}_block(
    const {{number}}* __restrict__ A, const {{number}}* __restrict__ B, float* __restrict__ C,
    int64_t K, int64_t lda, int64_t ldb, int64_t ldc
) {
    constexpr int COLS = {{columns}} / {{lanes}};
    {{vector}} sum[ROWS][COLS];
    #pragma GCC unroll {{most_rows}}
    for (int row = 0; row < ROWS; row++)
        #pragma GCC unroll {{columns}}
        for (int col = 0; col < COLS; col++)
            sum[row][col] = accum ? {{mm}}_loadu_ps(C + row * ldc + col * {{lanes}}) : {{mm}}_setzero_ps();
    for (int64_t k = 0; k < K; k += {{together}}) {
        {%- if ahead %}
        #pragma GCC unroll {{columns}}
        for (int col = 0; col < COLS; col++)  // of the next columns, which come K rows further on
            _mm_prefetch((const char*)(B + (k + K) * ldb + col * {{lanes * together}}), _MM_HINT_T1);
        {%- endif %}
        {{factor}} b[COLS];
        #pragma GCC unroll {{columns}}
        for (int col = 0; col < COLS; col++)
            b[col] = {{load("B + k * ldb + col * %d" % (lanes * together))}};
        #pragma GCC unroll {{most_rows}}
        for (int row = 0; row < ROWS; row++) {
            {{factor}} a = {{repeat("A + row * lda + k")}};
            #pragma GCC unroll {{columns}}
            for (int col = 0; col < COLS; col++)
                sum[row][col] = {{add("sum[row][col]", "a", "b[col]")}};
        }
    }
    #pragma GCC unroll {{most_rows}}
    for (int row = 0; row < ROWS; row++)
        #pragma GCC unroll {{columns}}
        for (int col = 0; col < COLS; col++)
            {{mm}}_storeu_ps(C + row * ldc + col * {{lanes}}, sum[row][col]);
}

// the same for M rows, as blocks of them
template <bool accum>
inline void {{name}}_rows(
    const {{number}}* A, const {{number}}* B, float* C, int64_t M, int64_t K, int64_t lda, int64_t ldb, int64_t ldc
) {
    int64_t m = 0;
    {%- for rows in blocks %}
    for (; m + {{rows}} <= M; m += {{rows}})
        {{name}}_block<{{rows}}, accum>(A + m * lda, B, C + m * ldc, K, lda, ldb, ldc);
    {%- endfor %}
}
#endif
"""

PRODUCT = r"""
{{block}}
{{declare_kernel}} {
    for (int64_t n = 0; n < N; n += {{columns}})
        {{name}}_rows<accum>(A, B + n, C + n, M, K, lda, ldb, ldc);
}
"""


@cache
def row_block() -> type:
    """The kernel as a class for Inductor, which is loaded only when something is compiled.

    ``C[M, N] = A[M, K] @ B[K, N]``, summed in float32; N is a multiple of the block's columns. In bfloat16 B lies as
    ``[K / 2, N, 2]``: two neighbours of a column side by side.
    """
    import torch._inductor.lowering  # noqa: F401  # must come first: the parts below import it in a circle
    from torch._inductor.codegen.cpp_micro_gemm import CppMicroGemm, LayoutType
    from torch._inductor.codegen.cpp_template import CppTemplate

    class RowBlock(CppMicroGemm):
        def codegen_define(self, kernel) -> str:
            rows, columns, together = self.register_blocking
            name, block = block_code(rows, columns, together, ahead=rows > FEW_ROWS)
            return CppTemplate._template_from_string(PRODUCT).render(
                **self.get_common_options(),
                declare_kernel=self.get_kernel_declaration(),
                name=name,
                block=block,
                columns=columns,
            )

        def get_b_layout(self) -> LayoutType:
            return LayoutType.VNNI2 if self.register_blocking.block_k == 2 else LayoutType.NORMAL

    return RowBlock


def block_code(rows: int, columns: int, together: int, ahead: bool) -> tuple[str, str]:
    """The micro kernel's name and its C++, which all products of a graph share: ``{name}_block`` and ``{name}_rows``.

    What remains of M is done in blocks of fewer rows. ``ahead``: fetch what lies K rows further on.
    """
    from torch._inductor.codegen.cpp_template import CppTemplate

    numbers = paired_bfloat16() if together == 2 else float32(512 if columns in COLUMNS_512 else 256)
    name = f"rows_{rows}x{columns}x{together}{'_ahead' * ahead}"
    code = CppTemplate._template_from_string(ROW_BLOCK).render(
        **numbers,
        name=name,
        columns=columns,
        together=together,
        ahead=ahead,
        most_rows=MOST_ROWS,
        blocks=[rows, *(few for few in (8, 4, 2, 1) if few < rows)],
    )
    return name, code


def float32(bits: int) -> dict:
    """Instructions for float32 in registers of so many bits."""
    mm = "_mm512" if bits == 512 else "_mm256"
    return dict(
        number="float",
        target="inline",
        mm=mm,
        lanes=bits // 32,
        vector=f"__m{bits}",
        factor=f"__m{bits}",
        load=lambda place: f"{mm}_loadu_ps({place})",
        repeat=lambda place: f"{mm}_set1_ps(*({place}))",
        add=lambda total, a, b: f"{mm}_fmadd_ps({a}, {b}, {total})",
    )


def paired_bfloat16() -> dict:
    """Instructions for pairs of bfloat16 in registers of 512 bits."""
    return dict(
        number="at::BFloat16",
        target='__attribute__((target("avx512bf16")))',  # Inductor's own flags leave it out
        mm="_mm512",
        lanes=16,
        vector="__m512",
        factor="__m512bh",
        load=lambda place: f"(__m512bh)_mm512_loadu_si512({place})",
        repeat=lambda place: f"(__m512bh)_mm512_set1_epi32(c10::load((const int32_t*)({place})))",
        add=lambda total, a, b: f"_mm512_dpbf16_ps({total}, {a}, {b})",
    )


def serves(dtype: torch.dtype, rows: int) -> bool:
    """Whether products of so many rows are best left to this kernel, with the instructions Inductor uses here.

    Libraries are ahead where a processor multiplies whole tiles of bfloat16 (AMX), and for many rows with AVX2.
    """
    from torch._inductor.cpu_vec_isa import VecAMX, VecAVX2, VecAVX512, VecAVX512VNNI, pick_vec_isa

    here = pick_vec_isa()
    if sys.platform == "win32":
        return False
    if dtype == torch.bfloat16:
        pairs = isinstance(here, VecAVX512VNNI) and torch.cpu._is_avx512_bf16_supported()
        return pairs and not isinstance(here, VecAMX)
    few = isinstance(here, VecAVX2) and rows <= 2 * ANY_ROWS
    return dtype == torch.float32 and (few or isinstance(here, VecAVX512))


def fits_rows(config, m, n, k, alpha, num_threads, **about) -> bool:
    """Whether a block is for this product: blocks of about as many rows each, and all of K."""
    rows, _, together = config.register_blocking
    return rows == (ANY_ROWS if about["dynamic_M"] else balanced(m)) and k % together == 0


def balanced(rows: int) -> int:
    """Rows of a block where there are so many: as few blocks as can be, of about as many rows each."""
    return -(-rows // -(-rows // MOST_ROWS))


def row_blocks() -> dict[type, list]:
    """The kernel and its blocks for each kind of processor and number: their sums fill most of the registers."""
    kernel = row_block()
    from torch._inductor.codegen.cpp_micro_gemm import generate_gemm_config
    from torch._inductor.cpu_vec_isa import VecAVX2, VecAVX512, VecAVX512VNNI

    def blocks(isa, columns, together, dtype):
        sizes = [(rows, columns[rows > FEW_ROWS], together) for rows in range(1, MOST_ROWS + 1)]
        return generate_gemm_config(isa, sizes, dtype, output_dtype=torch.float, extra_check=fits_rows)

    known = [
        *blocks(VecAVX512VNNI, COLUMNS_512, 2, torch.bfloat16),
        *blocks(VecAVX512, COLUMNS_512, 1, torch.float32),
        *blocks(VecAVX2, COLUMNS_256, 1, torch.float32),
    ]
    return {kernel: known}


@contextmanager
def own_products() -> Iterator[None]:
    """Let Inductor write every product with weights itself, with this kernel; nothing is timed to choose."""
    ours = row_blocks()
    from torch._inductor import config, mkldnn_lowerings
    from torch._inductor.codegen.cpp_micro_gemm import micro_gemm_configs

    others = {
        kind: [known for known in listed if known.input_dtype != torch.float32]
        for kind, listed in micro_gemm_configs.items()
    }
    in_cpp = mkldnn_lowerings.use_cpp_gemm_template

    def weights_in_cpp(*arguments, **options) -> bool:  # asked of products with weights only
        with config.patch(max_autotune_gemm_backends="CPP"):
            return in_cpp(*arguments, **options)

    with (
        patch.dict(micro_gemm_configs, ours | others, clear=True),
        patch.object(mkldnn_lowerings, "use_cpp_gemm_template", weights_in_cpp),
        patch.object(mkldnn_lowerings, "use_aten_gemm_kernels", lambda: False),
        config.patch(max_autotune_gemm=True, max_autotune_gemm_backends="ATEN"),
    ):
        yield
