"""The processors that kernels can be tested for on this machine: number format and bits of a register."""

import pytest
import torch

from medusa_nb.micro_gemm import serves

needs_avx2 = pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="the processor has no AVX2")
needs_avx512 = pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="the processor has no AVX512")
needs_pairs = pytest.mark.skipif(not serves(torch.bfloat16, 1), reason="bfloat16 is not multiplied in pairs here")
PROCESSORS = [
    pytest.param(torch.float32, 256, marks=needs_avx2),
    pytest.param(torch.float32, 512, marks=needs_avx512),
    pytest.param(torch.bfloat16, 512, marks=needs_pairs),
]
