"""How a generator is run when it draws: the options, and the forms of a model that the sampling loop takes.

    plain     the model as it is, for any device and any model
    native    dalle/native.py: a step is one call of code compiled for the CPU, in 16 or 8 bits
    packed    dalle/packed.py: weights packed for the CPU, in 32, 16 or 8 bits
    compiled  the decode step under torch.compile: needs a C++ compiler on a CPU; the first picture waits for it
    graph     the decode step replayed as CUDA graphs, one for each quarter of the cache

Each gives the same bytes for the same seed on the same machine. One rounds otherwise than another, so under another
one a few codes of a picture differ: what was taken stands in images.jsonl.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from common.log import say
from common.native import level
from common.precision import has_native_bf16
from dalle import native, packed, sequence
from dalle.attention import KVCache
from dalle.model import Dalle
from dalle.native import NativeDecoder
from dalle.sampling import ROW_BLOCK, Generator

Engine = Literal["auto", "plain", "native", "packed", "compiled", "graph"]
WeightType = Literal["auto", "float32", "bfloat16", "int8"]
NUM_GRAPHS = 4  # cache lengths that decode steps are captured for: a step reads at most a quarter too much


@dataclass(frozen=True)
class FastOptions:
    """How to run the generator; the defaults are the fastest on the machine."""

    engine: Engine = "auto"
    """auto: graph on a CUDA GPU, plain on another; on a CPU native where it can run (AVX512-BF16 or AVX2, a C++
    compiler), else packed; plain and compiled on request."""
    weights: WeightType = "auto"
    """Numbers that weights and cache are kept in: auto takes bfloat16 where the machine or the engine computes in it.
    int8 (weights alone, native and packed engines) is the fastest for one picture at a time, and costs a little
    accuracy."""

    def __post_init__(self) -> None:
        if self.weights == "int8" and self.engine not in ("auto", "native", "packed"):
            raise ValueError(f"int8 weights need the native or packed engine, not {self.engine}")


def resolve_options(model: nn.Module, options: FastOptions) -> FastOptions:
    """`options` with what `auto` stands for here. Raises ValueError for what cannot be."""
    if not isinstance(model, Dalle):
        if options.engine not in ("auto", "plain") or options.weights not in ("auto", "float32"):
            raise ValueError("an imported generator is run as it is: leave the fast options alone")
        return FastOptions("plain", "float32")
    device, engine, weights = next(model.parameters()).device, options.engine, options.weights
    if weights == "int8" and device.type != "cpu":
        raise ValueError(f"int8 weights are for CPUs, the model is on {device}")
    if engine == "auto":
        others = _engine_of_cpu(model, weights) if device.type == "cpu" else "plain"  # such as Apple's GPUs
        engine = "graph" if device.type == "cuda" else others
    if weights == "auto":
        weights = "bfloat16" if engine == "native" or has_native_bf16(device) else "float32"
    return FastOptions(engine, weights)


def prepare(model: nn.Module, options: FastOptions) -> Generator:
    """The form of `model` to draw with; the model itself stays as it is. Raises ValueError for what cannot be."""
    device, options = next(model.parameters()).device, resolve_options(model, options)
    if not isinstance(model, Dalle):
        return PlainDecoder(model)
    engine, dtype = options.engine, getattr(torch, options.weights)
    if engine in ("native", "packed"):
        if device.type != "cpu":
            raise ValueError(f"the {engine} engine is for CPUs, the model is on {device}: use plain or graph")
        return (NativeDecoder if engine == "native" else packed.PackedDecoder)(model, dtype)
    if engine == "plain":
        return PlainDecoder(_as_type(model, dtype))
    if engine == "compiled":
        return CompiledDecoder(_as_type(model, dtype))
    if engine == "graph":
        if device.type != "cuda":
            raise ValueError(f"CUDA graphs need a GPU, the model is on {device}")
        return GraphDecoder(_as_type(model, dtype))
    raise ValueError(f"unknown engine {engine!r}")


def _engine_of_cpu(model: Dalle, weights: WeightType) -> Engine:
    if weights != "float32" and native.fits(model.config) and level():
        if not (reason := native.why_not()):
            return "native"
        say(f"drawing up to seven times slower, with the packed engine: {reason}")
    dtype = torch.float32 if weights == "auto" else getattr(torch, weights)
    return "packed" if packed.is_available(dtype) else "plain"


def _as_type(model: Dalle, dtype: torch.dtype) -> Dalle:
    return model if model.image_embed.weight.dtype == dtype else copy.deepcopy(model).to(dtype)


class PlainDecoder:
    """A model's own steps."""

    row_multiple = ROW_BLOCK

    def __init__(self, model: nn.Module) -> None:
        self.model, self.config = model, model.config
        self.new_cache, self.prefill, self.decode_step = model.new_cache, model.prefill, model.decode_step

    def new_rows(self, capacity: int) -> KVCache:
        """An empty cache whose rows come and go: `prefill_rows`, `decode_rows`, `move_row`."""
        text_ids = torch.zeros(capacity, self.config.max_text_len, dtype=torch.long)
        return self.new_cache(text_ids.to(next(self.model.parameters()).device))

    def prefill_rows(
        self, text_ids: Tensor, cache: KVCache, start: int, image_ids: Tensor | None = None
    ) -> Tensor:
        """As `prefill`, into the rows from `start` on; text_ids (R, max_text_len)."""
        rows = cache.rows(slice(start, start + len(text_ids)))
        visible = sequence.text_mask(text_ids, self.config.pad_id)
        rows.bias.copy_(sequence.key_bias(visible, self.config.num_image_tokens, rows.bias.dtype))
        return self.prefill(text_ids, rows, image_ids)

    def decode_rows(self, image_ids: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """As `decode_step` for the first R rows, each at a position of its own: (R,) and (R,) -> (R, V)"""
        return self.model.decode_step(image_ids, positions, cache.rows(slice(0, len(image_ids))))


class CompiledDecoder:
    """The step compiled once a row count: positions are tensors, so that shapes never change."""

    row_multiple = ROW_BLOCK

    def __init__(self, model: Dalle) -> None:
        self.config = model.config
        self.new_cache, self.prefill = model.new_cache, model.prefill
        self.positions = torch.arange(model.config.num_image_tokens, device=model.image_embed.weight.device)
        self.step = torch.compile(model.decode_step, dynamic=False)

    def decode_step(self, image_ids: Tensor, position: int, cache: KVCache) -> Tensor:
        return self.step(image_ids, self.positions[position], cache)


class GraphDecoder:
    """CUDA graphs of the step, kept with their cache for each shape of texts.

    A cache is lent to one drawing at a time: what an earlier one left in it is overwritten or hidden.
    """

    row_multiple = ROW_BLOCK

    def __init__(self, model: Dalle) -> None:
        self.model, self.config = model, model.config
        self.stages: dict[tuple[torch.Size, bool], _Stage] = {}  # by texts, and whether a drawing is followed

    def new_cache(self, text_ids: Tensor, lines: Tensor | None = None) -> "_Stage":
        fresh = self.model.new_cache(text_ids, lines)
        key = (text_ids.shape, lines is not None)
        stage = self.stages.setdefault(key, _Stage(self.model, fresh))
        stage.cache.bias.copy_(fresh.bias)
        if lines is not None:
            stage.cache.lines.copy_(fresh.lines)
        return stage

    def prefill(self, text_ids: Tensor, cache: "_Stage", image_ids: Tensor | None = None) -> Tensor:
        return self.model.prefill(text_ids, cache.cache, image_ids)

    def decode_step(self, image_ids: Tensor, position: int, cache: "_Stage") -> Tensor:
        return cache.step(image_ids, position)


class _Stage:
    """One shape of texts: its cache, the inputs that graphs read, and the graphs by cache length."""

    def __init__(self, model: Dalle, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        device = cache.entries.device
        self.image_ids = torch.zeros(cache.batch_size, dtype=torch.long, device=device)
        self.position = torch.zeros((), dtype=torch.long, device=device)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def step(self, image_ids: Tensor, position: int) -> Tensor:
        length = self._length(position)
        self.image_ids.copy_(image_ids)
        self.position.fill_(position)
        if length not in self.graphs:
            self.graphs[length] = self._capture(length)
        graph, logits = self.graphs[length]
        graph.replay()
        return logits

    def _length(self, position: int) -> int:
        """The cache length to look at, rounded up to a share of the whole."""
        unit = -(-self.cache.length // NUM_GRAPHS)
        needed = position + self.cache.text_len + 2
        return min(self.cache.length, -(-needed // unit) * unit)

    def _capture(self, length: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        view = KVCache(
            self.cache.entries[..., :length, :],
            self.cache.bias[..., :length],
            self.cache.text_len,
            self.cache.lines,
        )
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm-up writes the same cache entry that the replay will
            for _ in range(3):
                self.model.decode_step(self.image_ids, self.position, view)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # other threads go on meanwhile: a training's loader pins memory, collectives ask for events
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = self.model.decode_step(self.image_ids, self.position, view)
        return graph, logits
