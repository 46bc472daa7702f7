"""The folded generator with its decode step as one call of compiled code (kernels/decode.py), in bfloat16 or int8.

The prefix goes through PyTorch's operators around compiled products, each step is one call.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dalle import sequence
from dalle.engines.folded import FoldedDecoder, Weights
from dalle.lines import no_lines
from dalle.model import Dalle, DalleConfig
from kernels import Report, decode
from kernels.compiler import level
from kernels.decode import Gate, Layer, Linear, RowCache, Sizes, Step, unavailable_reason
from kernels.report import COMPILED, Taken


def fits(config: DalleConfig) -> bool:
    """Whether the widths of a model are whole registers."""
    return decode.fits(config.dim, config.head_dim, config.ffn_dim)


def unsupported_reason(model: Dalle) -> str:
    """Why it cannot be sampled by this engine here; empty where it can."""
    return unavailable_reason() or CpuKernelDecoder.changed_reason(model)


@dataclass(frozen=True)
class _RowsFrom:
    """The rows of a cache from `start` on, for `prefill`."""

    cache: RowCache
    start: int
    lines: Tensor | None = None

    def fill(self, layer: int, k: Tensor, v: Tensor) -> None:
        self.cache.fill(layer, k, v, self.start)


class CpuKernelDecoder(FoldedDecoder):
    """Steps in compiled code, for rows that stand at one position or each at its own."""

    @property
    def report(self) -> Report:
        return Report((Taken("decode steps", COMPILED, 1, 1),), level=level())

    @staticmethod
    def require(weights: Weights) -> None:
        """Raises ValueError where the machine does not allow it."""
        if weights not in (torch.bfloat16, torch.int8):
            raise ValueError("the cpu_kernel engine computes in bfloat16 or int8: take packed for float32")
        if reason := unavailable_reason():
            raise ValueError(f"the cpu_kernel engine cannot run here: {reason}")

    @staticmethod
    def layer_types(weights: Weights) -> tuple[type, type, type]:
        return Linear, Gate, Linear

    @staticmethod
    def compared_dtype() -> Weights:
        return torch.bfloat16

    def __init__(self, model: Dalle, weights: Weights) -> None:
        """Raises ValueError where the machine or the model does not allow it."""
        if not fits(model.config):
            raise ValueError(
                "the cpu_kernel engine needs a width that is a multiple of 32 and heads of multiples of 16"
            )
        super().__init__(model, weights)

    def _fold(self, model: Dalle, weights: Weights) -> None:
        super()._fold(model, weights)
        c = self.config
        self.sizes = Sizes(
            c.num_layers, c.dim, c.num_heads, c.num_kv_heads, c.head_dim, c.ffn_dim, c.num_image_tokens
        )
        layers = [Layer(b.qkv, b.out, b.gate, b.down) for b in self.blocks]
        self.step = Step(
            self.sizes, layers, self.head, self.image_embed, self.rotary_tables, self.eps**2, self.head_eps**2
        )

    @torch.inference_mode()
    def new_cache(self, text_ids: Tensor, lines: Tensor | None = None) -> RowCache:
        """As `Dalle.new_cache`."""
        c = self.config
        bias = sequence.key_bias(sequence.text_mask(text_ids, c.pad_id), c.num_image_tokens, torch.float32)
        return self._following(RowCache(self.sizes, bias[:, 0, 0]), lines)

    def _following(self, cache: RowCache, lines: Tensor | None) -> RowCache:
        if lines is None:
            return cache
        if len(lines) > self.config.codebook_size:
            raise ValueError(
                f"{len(lines)} rows with drawings need a codebook of as many codes: lower the batch size"
            )
        cache.follow(lines, self.step.struct)
        return cache

    @torch.inference_mode()
    def new_rows(self, capacity: int) -> RowCache:
        """An empty cache whose rows come and go: `prefill_rows`, `decode_rows`, `move_row`."""
        c = self.config
        cache = RowCache(self.sizes, torch.zeros(capacity, c.max_text_len + c.num_image_tokens))
        return self._following(cache, no_lines(c, capacity))

    @torch.inference_mode()
    def prefill_rows(
        self,
        text_ids: Tensor,
        cache: RowCache,
        start: int,
        image_ids: Tensor | None = None,
        lines: Tensor | None = None,
    ) -> Tensor:
        """As `prefill`, into the rows from `start` on; text_ids (R, max_text_len), lines (R, N, D) or None for none."""
        c = self.config
        bias = sequence.key_bias(sequence.text_mask(text_ids, c.pad_id), c.num_image_tokens, torch.float32)
        cache.bias[start : start + len(text_ids)] = bias[:, 0, 0]
        if cache.lines is not None:
            cache.lines[start : start + len(text_ids)] = 0 if lines is None else lines
        return self.prefill(text_ids, _RowsFrom(cache, start, lines), image_ids)

    @torch.inference_mode()
    def decode_step(self, image_ids: Tensor, position: int, cache: RowCache) -> Tensor:
        """As `Dalle.decode_step`: the token sampled at `position` (R,) -> logits (R, V) of the next."""
        if len(image_ids) != cache.struct.capacity:
            raise ValueError(f"expected {cache.struct.capacity} ids, got {len(image_ids)}")
        return self.step(image_ids, torch.tensor([position]), cache)

    @torch.inference_mode()
    def decode_rows(self, image_ids: Tensor, positions: Tensor, cache: RowCache) -> Tensor:
        """The same for the first R rows of the cache, each at a position of its own: (R,) and (R,) -> (R, V)"""
        if len(positions) != len(image_ids):
            raise ValueError(f"expected as many positions as ids, got {len(positions)} and {len(image_ids)}")
        return self.step(image_ids, positions, cache)
