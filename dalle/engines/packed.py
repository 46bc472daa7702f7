"""The folded generator with weights packed into the blocked layout of oneDNN, for machines without a compiler.

A step of decoding reads every weight once for a handful of rows, so what counts is bytes and the number of operators.
An ordinary linear layer repacks its weights at every call; here they are packed once. The cache is laid out for
`embedding_bag` (packed_cache.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle import sequence
from dalle.engines.folded import FoldedDecoder, Weights
from dalle.engines.packed_cache import PackedCache
from kernels.decode import int8_steps

PACK_ROWS = (
    8  # row count that oneDNN lays the weights out for; fixed, so that the layout never depends on the batch
)


def is_available(dtype: torch.dtype = torch.float32) -> bool:
    """Whether this build of torch has the operators that packing needs, and this CPU can pack `dtype`."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


class PackedLinear:
    """x @ weight.T with the weight packed once; x in the weight's dtype."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous(), PACK_ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


class PackedGate:
    """silu(x @ gate.T) * (x @ up.T) in two operators."""

    def __init__(self, gate_up: Tensor, dtype: torch.dtype) -> None:
        gate, up = gate_up.chunk(2)
        self.gate, self.up = PackedLinear(gate, dtype).packed, PackedLinear(up, dtype).packed

    def __call__(self, x: Tensor) -> Tensor:
        gate = torch.ops.mkldnn._linear_pointwise(x, self.gate, None, "swish", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, gate, self.up, None, "mul")


class Int8Linear:
    """x @ weight.T with the weight as int8 and one scale an output channel; x in bfloat16. Raises ValueError."""

    def __init__(self, weight: Tensor, dtype: torch.dtype = torch.int8) -> None:
        if weight.shape[0] % 32 or weight.shape[1] % 32:
            raise ValueError(f"int8 weights need sizes that are multiples of 32, not {tuple(weight.shape)}")
        steps, scale = int8_steps(weight)
        self.weight, self.scale = steps.to(torch.int8).contiguous(), scale.to(torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, self.weight, self.scale)


class Int8Gate:
    """silu(x @ gate.T) * (x @ up.T)"""

    def __init__(self, gate_up: Tensor, dtype: torch.dtype = torch.int8) -> None:
        self.gate_up = Int8Linear(gate_up, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return F.silu(gate).mul_(up)


class PackedDecoder(FoldedDecoder):
    """Steps in oneDNN's packed products."""

    @staticmethod
    def require(weights: Weights) -> None:
        """Raises ValueError where the machine does not allow it."""
        if not is_available():
            raise ValueError("this build of torch lacks oneDNN: decode with --fast.engine torch")
        if not is_available(weights):
            raise ValueError("oneDNN packs weights in 32 bits alone on this CPU: take --fast.weights float32")

    @staticmethod
    def layer_types(weights: Weights) -> tuple[type, type, type]:
        """Of the products, of the gate, and of the head, which stays in 16 bits at least: its rounding goes straight
        into the probabilities."""
        if weights == torch.int8:
            return Int8Linear, Int8Gate, PackedLinear
        return PackedLinear, PackedGate, PackedLinear

    @staticmethod
    def compared_dtype() -> Weights:
        return torch.float32

    @torch.inference_mode()
    def new_cache(self, text_ids: Tensor, lines: Tensor | None = None) -> PackedCache:
        """As `Dalle.new_cache`."""
        c = self.config
        bias = sequence.key_bias(sequence.text_mask(text_ids, c.pad_id), c.num_image_tokens, torch.float32)
        cache = PackedCache(
            c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim, bias[:, 0], self.cache_dtype
        )
        cache.lines = None if lines is None else lines.float()
        return cache

    @torch.inference_mode()
    def decode_step(self, image_ids: Tensor, position: int, cache: PackedCache) -> Tensor:
        """As `Dalle.decode_step`: the token sampled at `position` (R,) -> logits (R, V) of the next."""
        num_image = self.config.num_image_tokens
        cache.move_to(position + cache.length - num_image + 1)
        tables = self.rotary_tables[:, :, position - num_image].index_select(2, self.head_group)
        x = self.image_embed[image_ids]  # (R, D)
        if cache.lines is not None:
            x = x + cache.lines[:, position + 1]
        for layer, block in enumerate(self.blocks):
            q, k, v = self._heads(x, block, tables[layer])  # (R, H or H_kv, K)
            self._finish(x, cache.attend(layer, q, k, v).to(self.compute_dtype), block)
        return self._logits(x)
