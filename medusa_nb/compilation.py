"""Compiling a decoding step: one layer is compiled and serves all layers, so the cost does not grow with depth.

On a CPU the step runs on a copy of the model that shares its weights, in which

- every linear layer has its weight packed once for oneDNN, which reads it at nearly the memory's full speed
- every decoder layer calls one compiled function, which gets the layer's weights and cache block as arguments.

On an accelerator the whole step is captured as a CUDA graph. Only public options of ``torch.compile`` are used; the two
private operators behind packed weights stand in :mod:`medusa_nb.private`.
"""

import copy
import time
import warnings
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from types import FunctionType

import torch
from torch import nn
from transformers import DynamicCache

from medusa_nb.base_model import weights_state
from medusa_nb.kv_cache import KeysValues, Window
from medusa_nb.logits import first_line, logits_maker, require_same_logits
from medusa_nb.packing import group_attention, pack

MOST_LAYERS = 6  # layers that are compiled together: each call of compiled code costs about a tenth of a layer


class BlockCache:
    """What decoder layers see of the cache while they are compiled: their blocks, or new keys and values only."""

    def __init__(self, blocks: KeysValues, window: Window | None = None):
        self.blocks, self.window, self.calls = blocks, window, 0

    def update(self, key_states, value_states, *args, **kwargs):
        if self.window is None:
            self.blocks.append((key_states, value_states))
            return key_states, value_states
        keys, values = self.blocks[self.calls]
        self.calls += 1
        return self.window.update(keys, key_states), self.window.update(values, value_states)


def step_block(layers, hidden, rows, span, batch, capacity, blocks, named):
    """A few layers' part of a step: they read and write their blocks of the cache."""
    cache = BlockCache(blocks, Window(capacity, rows, batch, span))
    for layer in layers:
        hidden = layer(hidden, past_key_values=cache, **named)
    return hidden


def prompt_block(layers, hidden, named):
    """A few layers' part of reading a prompt; also returns their keys and values."""
    cache = BlockCache([])
    for layer in layers:
        hidden = layer(hidden, past_key_values=cache, **named)
    return hidden, cache.blocks


class PromptCache(DynamicCache):
    """Collects each layer's keys and values while a prompt is read."""

    def __init__(self):
        super().__init__()
        self.read: KeysValues = []


class BlockCall(nn.Module):
    """Stands in for a few decoder layers of the copy: calls what was compiled for layers like them."""

    def __init__(self, layers: list[nn.Module], first: int, functions: "BlockFunctions"):
        super().__init__()
        self.layers, self.first, self.functions = nn.ModuleList(layers), first, functions
        self.kind = kind_of(self.layers)

    def forward(self, hidden, *args, past_key_values=None, **named):
        if args:
            raise TypeError("this model passes its layers arguments without names")
        layers = list(self.layers)
        if isinstance(past_key_values, PromptCache):
            hidden, read = self.functions.get(prompt_block, self.kind, ())(layers, hidden, named)
            past_key_values.read += read
            return hidden
        window = past_key_values.window
        blocks = [(b.keys, b.values) for b in past_key_values.layers[self.first : self.first + len(layers)]]
        run = self.functions.get(step_block, self.kind, (window.batch, hidden.shape[1]))
        return run(layers, hidden, window.rows, window.span, window.batch, window.capacity, blocks, named)


def kind_of(layer: nn.Module) -> str:
    """What a compiled layer depends on besides the values of its weights: classes, plain attributes, shapes."""
    facts = []
    for name, module in layer.named_modules():
        facts.append(f"{name} {type(module).__name__}")
        facts += [f"{k}={v}" for k, v in vars(module).items() if isinstance(v, int | float | str | tuple)]
        facts += [f"{k}:{tuple(p.shape)}" for k, p in module.named_parameters(recurse=False)]
    return "\n".join(facts)


class BlockFunctions:
    """Compiled functions of a few layers, by what they do, the kind of layers, and the shape of what they get."""

    def __init__(self):
        self.known: dict = {}

    def get(self, function: Callable, kind: str, shape: tuple) -> Callable:
        key = function.__name__, kind, shape
        if key not in self.known:
            # one code object each: the compiler keeps its results by code object. The first graph serves every call,
            # so nothing is checked before one; the sizes that may change are named in `dynamic_sizes`.
            own = FunctionType(function.__code__.replace(), function.__globals__)
            options: dict = dict(guard_filter_fn=torch.compiler.skip_all_guards_unsafe)
            self.known[key] = torch.compile(own, fullgraph=True, dynamic=function is prompt_block, options=options)
        return self.known[key]


def sizes_that_change(layers: int) -> str:
    """Names of the sizes that may differ from call to call of a compiled step, as the compiler knows them."""
    blocks = [f"L['blocks'][{i}][{j}]:0" for i in range(layers) for j in (0, 1)]
    return ",".join(["L['span']", "L['capacity']", "L['named']['attention_mask']:3", *blocks])


@contextmanager
def compiling():
    """Settings under which blocks of layers are compiled."""
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        torch.compiler.config.patch(dynamic_sources=sizes_that_change(MOST_LAYERS)),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # Inductor's own use of it
        yield


class FastModel:
    """A copy of a model that shares its weights, with compiled layers and, on a CPU, packed products."""

    def __init__(self, model):
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.model, self.weights = copy.deepcopy(model, shared), weights_state(model)
        config = self.model.config.get_text_config()
        for module in self.model.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = 0  # or every layer would be of a kind of its own
        if model.device.type == "cpu":
            pack(self.model)
            group_attention(self.model)
        layers, functions = decoder_layers(self.model), BlockFunctions()
        alike = (
            len({kind_of(layer) for layer in layers}) == 1
            and len(set(getattr(config, "layer_types", None) or [0])) == 1
        )
        size = max(n for n in range(1, MOST_LAYERS + 1) if len(layers) % n == 0) if alike else 1
        calls = [BlockCall(list(layers[i : i + size]), i, functions) for i in range(0, len(layers), size)]
        del layers[:]
        layers.extend(calls)
        self.logits = logits_maker(model)(self.model)

    def read(self, ids: torch.Tensor) -> tuple[torch.Tensor, KeysValues]:
        """See :meth:`medusa_nb.verification.Verifier.read`."""
        cache, positions = PromptCache(), torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        backbone = self.model.base_model
        hidden = backbone(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
        return hidden.last_hidden_state, cache.read

    @classmethod
    def of(cls, model) -> "FastModel":
        """The copy of this model, made once; if the model's weights have changed, it is made again."""
        known = _FAST.get(model)
        if known is None or known.weights != weights_state(model):
            known = _FAST[model] = cls(model)
        return known


_FAST: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def decoder_layers(model) -> nn.ModuleList:
    """The list of decoder layers of a transformers model."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise TypeError(f"{type(model).__name__} has no list of {count} layers")


def compile_decoder(decoder) -> tuple[Callable, float | None, str]:
    """A compiled version of ``decoder.step``, the seconds it took, and why it is eager (empty if it is not).

    What was compiled is run against the eager step first: it must give the same logits. Whatever the compiler trips
    over, decoding goes on eagerly: the eager step is returned, None, and the reason.
    """
    verifier, started = decoder.verifier, time.perf_counter()
    eager = verifier.backbone, verifier.logits, verifier.read
    try:
        with compiling():
            device, capacity = verifier.device, verifier.capacity
            length = max(2, min(24, capacity - decoder.draft.size - 2))
            prompts = [torch.arange(1, 1 + length - i % 2, device=device) for i in range(decoder.slots)]
            state = decoder.start(prompts)
            span = decoder.span(capacity // 2)
            candidates = decoder.draft(state)
            wanted, _ = verifier.look(candidates, state.lengths, span)
            fast = FastModel.of(decoder.model)
            verifier.backbone, verifier.logits = fast.model.base_model, fast.logits
            found, _ = verifier.look(candidates, state.lengths, span)
            require_same_logits(found, wanted)
            if decoder.slots == 1:
                verifier.read = lambda ids: fast.read(ids) if ids.shape[0] == 1 < ids.shape[1] else eager[2](ids)
                decoder.start(prompts)
            run = capture(decoder, state) if device.type == "cuda" else decoder.step
            for _ in range(3):
                state, _ = run(state, span if device.type == "cpu" else capacity)
    except Exception as error:  # whatever the compiler trips over, decoding goes on without it
        verifier.backbone, verifier.logits, verifier.read = eager
        return decoder.step, None, first_line(error)
    return run, time.perf_counter() - started, ""


def capture(decoder, state) -> Callable:
    """``decoder.step`` as a CUDA graph: its launches are recorded once and replayed."""
    fixed = state._replace(**{name: value.clone() for name, value in state._asdict().items() if value is not None})
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            decoder.step(fixed, decoder.verifier.capacity)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = decoder.step(fixed, decoder.verifier.capacity)

    def run(state, span):
        for kept, value in zip(fixed, state, strict=True):
            if kept is not None:
                kept.copy_(value)
        graph.replay()
        return result

    return run
