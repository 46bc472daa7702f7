"""The decode step replayed as CUDA graphs, one for each quarter of the cache: a step costs one launch."""

import torch
from torch import Tensor

from dalle.attention import KVCache
from dalle.model import Dalle
from dalle.sampling import ROW_BLOCK
from kernels import OFF

NUM_GRAPHS = 4  # cache lengths that decode steps are captured for: a step reads at most a quarter too much


class CudaGraphDecoder:
    """CUDA graphs of the step, kept with their cache for each shape of texts.

    A cache is lent to one sampling at a time: what an earlier one left in it is overwritten or hidden.
    """

    row_multiple, report = ROW_BLOCK, OFF

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
