"""The processors that kernels can be tested for on this machine (number format, bits of a register), and compiling."""

from contextlib import nullcontext

import pytest
import torch
from torch._inductor import config as inductor
from torch._inductor.utils import run_and_get_code

from medusa_nb.compilation import compiling
from medusa_nb.micro_gemm import serves

needs_avx2 = pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="the processor has no AVX2")
needs_avx512 = pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="the processor has no AVX512")
needs_pairs = pytest.mark.skipif(not serves(torch.bfloat16, 1), reason="bfloat16 is not multiplied in pairs here")
PROCESSORS = [
    pytest.param(torch.float32, 256, marks=needs_avx2),
    pytest.param(torch.float32, 512, marks=needs_avx512),
    pytest.param(torch.bfloat16, 512, marks=needs_pairs),
]


def compiled(function, *arguments, weight=None, rows=1, dynamic="", bits=None, library=False):
    """The compiled function, what it says first, and the code that Inductor wrote.

    ``weight`` and ``rows`` are what :func:`~medusa_nb.compilation.compiling` asks for; ``bits`` those of a register.
    """
    if weight is None:
        weight = torch.empty(8, 8, dtype=next(x.dtype for x in arguments if isinstance(x, torch.Tensor)))
    width = inductor.patch({"cpp.simdlen": bits}) if bits else nullcontext()
    with width, compiling(weight, rows, dynamic, library):
        run = torch.compile(function, fullgraph=True, dynamic=False)
        said, code = run_and_get_code(run, *arguments)
    return run, said, "\n".join(code)
