"""Compiling a decoding step: Inductor with frozen weights on a CPU, CUDA graphs on a GPU."""

import hashlib
import inspect
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import FunctionType, MethodType

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from medusa_nb.base_model import attention_window, context_length
from medusa_nb.micro_attention import own_attention
from medusa_nb.micro_gemm import own_products, serves
from medusa_nb.verification import read_prompts

GROUPED = "medusa_grouped_sdpa"
ON_A_CPU = {  # options of Inductor
    "freezing": True,  # weights are constants
    "cpp.enable_concat_linear": True,  # layers that read the same states (q, k, v; gate, up) are one matrix
    "cpp_wrapper": True,  # kernels are called from C++: a small model's step is some hundred calls
}


def grouped_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention with grouped queries that never repeats keys and values.

    The query heads that share a key head stand one below the other as further rows: ``[B, heads, N, d]`` is
    read as ``[B, key heads, groups * N, d]``, and so is the mask. transformers' own sdpa copies every key and
    value once per group as soon as there is a mask.
    """
    groups = query.shape[1] // key.shape[1]
    if groups == 1 or attention_mask is None or attention_mask.shape[1] != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    rows = query.unflatten(1, (key.shape[1], groups)).flatten(2, 3)
    mask = attention_mask.repeat(1, 1, groups, 1)
    out = torch.nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    out = out.unflatten(2, (groups, query.shape[2])).flatten(1, 2)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


class Outside:
    """A choice of tokens that compiled code calls instead of containing it.

    Random numbers are then drawn as in eager decoding, and ``choose`` may be another one at every call.
    """

    def __init__(self, choose: Callable[[torch.Tensor], torch.Tensor]):
        self.choose = choose

    @torch.compiler.disable
    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return self.choose(logits)


@contextmanager
def grouped(model):
    """Let a model that uses sdpa use :func:`grouped_attention` instead, for a while."""
    config = model.config.get_text_config()
    stated = config._attn_implementation
    if stated == "sdpa":
        config._attn_implementation = GROUPED
    try:
        yield
    finally:
        config._attn_implementation = stated


@torch.no_grad()
def onednn_is_faster(weight: torch.Tensor, rows: int) -> bool:
    """Whether oneDNN multiplies ``rows`` float32 rows by ``weight`` ``[V, D]`` faster than MKL does, here.

    MKL, which Inductor takes for float32, is quick on Intel's processors; on others it can take three times as long.
    """
    if weight.dtype != torch.float32 or not (
        torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    ):
        return False
    weight = weight.detach()[:2048].contiguous()
    x = torch.ones(rows, weight.shape[1])
    for_mkl = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
    for_onednn = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    ways = {
        "mkl": lambda: torch.ops.mkl._mkl_linear(x, for_mkl, weight, None, rows),
        "onednn": lambda: torch.ops.mkldnn._linear_pointwise(x, for_onednn, None, "none", [], ""),
    }
    seconds = {name: [] for name in ways}
    for _ in range(9):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return statistics.median(seconds["onednn"]) < statistics.median(seconds["mkl"])


class _AsOnArm:
    """oneDNN's operators as Inductor sees them, with the answer it gets on Arm processors: use them for float32."""

    def __getattr__(self, name: str):
        return (lambda: True) if name == "_is_mkldnn_acl_supported" else getattr(torch.ops.mkldnn, name)


@contextmanager
def packed_for_onednn():
    """Let Inductor hand float32 matrices to oneDNN, too; by itself it prefers MKL wherever that is built in."""
    from torch._inductor.fx_passes import mkldnn_fusion

    operators = mkldnn_fusion.mkldnn
    mkldnn_fusion.mkldnn = _AsOnArm()
    try:
        yield
    finally:
        mkldnn_fusion.mkldnn = operators


@cache
def kernels_tag() -> str:
    """A hash of our own kernels: Inductor keeps compiled graphs on disk and does not know what is in them."""
    files = {inspect.getfile(part) for part in (own_products, own_attention)}
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in sorted(files))).hexdigest()


@contextmanager
def compiling(weight: torch.Tensor, rows: int, dynamic: str, library: bool = False):
    """Settings under which a graph of about ``rows`` rows compiles well where ``weight`` lies, lm_head's ``[V, D]``.

    ``dynamic`` names what may change from call to call, on a CPU; CUDA graphs have one shape. ``library``: leave
    multiplications and attention to the libraries, also where :mod:`medusa_nb.micro_gemm` and
    :mod:`medusa_nb.micro_attention` are faster.
    """
    from torch._inductor import config  # who decodes eagerly needs no compiler

    cpu = weight.device.type == "cpu"
    own = cpu and not library and serves(weight.dtype, rows)  # our kernel takes the place of oneDNN's, not of MKL's
    with (
        own_products() if own else nullcontext(),
        own_attention() if own else nullcontext(),
        packed_for_onednn() if own or cpu and onednn_is_faster(weight, rows) else nullcontext(),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        config.patch(ON_A_CPU if cpu else {}),
        torch.compiler.config.patch(dynamic_sources=dynamic if cpu else "", cache_key_tag=kernels_tag() if own else ""),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # Inductor's own use of it
        yield


def compile_step(decoder, library: bool = False):
    """A compiled version of ``decoder.step``, warmed up, and the seconds that took.

    Shapes are fixed (tree, slots, capacity) and weights are constants of the compiled code, so that on a
    CPU every linear layer is laid out for exactly this number of rows; only ``span``, how far attention looks back,
    may change there from step to step. The step is one graph, or two with an :class:`Outside` between them. On a
    CPU the decoder also gets the model's :class:`CompiledReader`. Where no compiler works the eager step is returned,
    None, and why. ``library``: see :func:`compiling`.
    """
    device = decoder.verifier.device
    cpu, whole = device.type == "cpu", not isinstance(decoder.verifier.choose, Outside)
    mode = None if cpu else "reduce-overhead"
    run = compiled(decoder.step, whole=whole, always_fits=whole, mode=mode)

    def step(state, span):
        with grouped(decoder.model):
            return run(state, span)

    lm_head = decoder.model.get_output_embeddings().weight
    started = time.perf_counter()
    try:
        with compiling(lm_head, rows=decoder.slots * decoder.draft.size, dynamic="L['span']", library=library):
            prompts = [torch.zeros(2, dtype=torch.long, device=device)] * decoder.slots
            state = decoder.start(prompts)
            span = decoder.span(decoder.capacity // 2) if cpu else decoder.capacity
            for _ in range(3):
                state, _ = step(state, span)
    except Exception as error:  # whatever the compiler trips over, decoding goes on without it
        return decoder.step, None, first_line(error)
    why_eager = ""
    if cpu:
        try:
            decoder.verifier.read = CompiledReader.of(decoder.model, library)
        except Exception as error:
            why_eager = f"prompts are read eagerly: {first_line(error)}"

    def step_in_parts(state, span):  # parts are methods of every decoder, told apart by the model's config, too
        with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
            return step(state, span)

    return run if whole else step_in_parts, time.perf_counter() - started, why_eager


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]


def compiled(method: MethodType, always_fits: bool, whole: bool = True, mode: str | None = None):
    """``torch.compile`` of a method, as one graph if ``whole``.

    ``always_fits``: the code object, model and shapes are its own, so the first graph serves every call and needs no
    guards; evaluating those takes as long as a layer of a small model.
    """
    options = dict(torch._inductor.list_mode_options(mode)) if mode else {}
    if always_fits:
        options["guard_filter_fn"] = torch.compiler.skip_all_guards_unsafe
    return torch.compile(with_own_code(method), fullgraph=whole, dynamic=False, options=options)


def with_own_code(method: MethodType) -> MethodType:
    """The same method with a code object of its own.

    The compiler keeps its results per code object and at every call looks through all of them; decoders
    that shared one would slow each other down.
    """
    function = method.__func__
    copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return MethodType(copy, method.__self__)


class CompiledReader:
    """:func:`read_prompts` of a model on a CPU as one compiled graph, for one prompt of any length.

    It writes into no decoder's buffer, so all decoders of a model share it: it is kept on the model, a copy of
    which starts without one.
    """

    def __init__(self, model, library: bool = False):
        self.model, self.weights = model, weights_state(model)
        self.any_length = attention_window(model) is None  # else a graph may be for prompts shorter than the window
        self.run = compiled(self.read, always_fits=self.any_length)
        with compiling(model.get_output_embeddings().weight, rows=64, dynamic="L['ids']:1", library=library):
            longest = min(64, context_length(model) or 64)
            for length in (longest, longest // 2):
                self.run(torch.zeros(1, length, dtype=torch.long), torch.tensor([length - 1]))

    def __reduce__(self):
        return type(None), ()

    def __call__(self, ids: torch.Tensor, last: torch.Tensor):
        if len(ids) > 1 or ids.shape[1] == 1:
            return self.read(ids, last)
        # what fits any length is called at once, nothing is looked up
        with torch.compiler.set_stance("eager_on_recompile", skip_guard_eval_unsafe=self.any_length):
            return self.run(ids, last)

    def read(self, ids: torch.Tensor, last: torch.Tensor):
        return read_prompts(self.model, ids, last)

    @classmethod
    def of(cls, model, library: bool = False) -> "CompiledReader":
        """The reader of this model. Weights are constants of compiled code: if they changed, it is made anew."""
        name = "_medusa_library_reader" if library else "_medusa_reader"
        known = model.__dict__.get(name)
        if known is None or known.weights != weights_state(model):
            known = model.__dict__[name] = cls(model, library)
        return known


def weights_state(model) -> list[tuple[int, int]]:
    """Where each weight lies and how often it was written to: another one if the weights change."""
    return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters()]
