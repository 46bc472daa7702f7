"""The generator rearranged for decoding on a CPU: the same function, fewer and better fed operations.

A step of decoding reads every weight once for a handful of rows, so what counts is bytes and the number of operators.
Weights are packed once into the blocked layout of oneDNN (an ordinary linear layer repacks them at every call); norm
gains are folded into the matrices that follow, those of queries and keys and the softmax scale into the rotary tables;
SiLU and the gate's product run inside the matrix products; the cache is laid out for `embedding_bag` (packed_cache.py).
The residual stream and all norms stay float32. Packed products round each row alike however many rows there are, so a
picture does not depend on the batch it is drawn in.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.precision import has_native_bf16
from dalle import sequence
from dalle.attention import RMSNorm
from dalle.model import Block, Dalle
from dalle.packed_cache import PackedCache

PACK_ROWS = (
    8  # row count that oneDNN lays the weights out for; fixed, so that the layout never depends on the batch
)
Weights = torch.dtype  # float32, bfloat16 or int8


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


@dataclass(frozen=True)
class PackedBlock:
    qkv: Callable[[Tensor], Tensor]
    out: Callable[[Tensor], Tensor]
    gate: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]


class PackedDecoder:
    """`new_cache`, `prefill` and `decode_step` of a `Dalle` on a CPU; see `dalle.sampling.Generator`."""

    row_multiple = 1

    @staticmethod
    def require(weights: Weights) -> None:
        """Raises ValueError where the machine does not allow it."""
        if not is_available():
            raise ValueError("this build of torch lacks oneDNN: decode with --fast.engine plain")
        if not is_available(weights):
            raise ValueError("oneDNN packs weights in 32 bits alone on this CPU: take --fast.weights float32")

    @staticmethod
    def layer_types(weights: Weights) -> tuple[type, type, type]:
        """Of the products, of the gate, and of the head, which stays in 16 bits at least: its rounding goes straight
        into the probabilities."""
        if weights == torch.int8:
            return Int8Linear, Int8Gate, PackedLinear
        return PackedLinear, PackedGate, PackedLinear

    def __init__(self, model: Dalle, weights: Weights) -> None:
        self.require(weights)
        c = self.config = model.config
        self.compute_dtype = torch.bfloat16 if weights == torch.int8 else weights
        # of a prefix; PyTorch only emulates bfloat16 on other CPUs
        self.attention_dtype = self.compute_dtype if has_native_bf16(torch.device("cpu")) else torch.float32
        # queries and keys are normed and values of order one: float16 holds them with three more bits than bfloat16
        self.cache_dtype = torch.float32 if weights == torch.float32 else torch.float16
        linear, gate, head_type = self.layer_types(weights)
        with torch.inference_mode():
            self.text_embed, self.text_in = model.text_embed, model.text_in
            self.image_embed, self.begin_image = model.image_embed.weight.float(), model.begin_image
            self.blocks = [pack_block(block, weights, linear, gate) for block in model.blocks]
            head = model.image_embed.weight if c.tie_image_head else model.image_head.weight
            self.head = head_type(fold(head, model.norm), self.compute_dtype)
            self.turns = torch.stack([rotary_with_gains(block, model.rotary) for block in model.blocks])
        self.head_group = torch.tensor([0] * c.num_heads + [1] * c.num_kv_heads)
        self.eps, self.head_eps = (model.norm.eps * c.dim) ** 0.5, (model.norm.eps * c.head_dim) ** 0.5

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
    def prefill(self, text_ids: Tensor, cache: PackedCache, image_ids: Tensor | None = None) -> Tensor:
        """As `Dalle.prefill`: logits (R, V) of the first unknown image token. Rows that are alike are computed once."""
        text_ids, image_ids, lines, which = _distinct_rows(text_ids, image_ids, cache.lines)
        begin = self.begin_image.expand(len(text_ids), 1, -1)
        image = torch.cat([begin, self.image_embed[image_ids]], 1)
        if lines is not None:
            image = image + lines[:, : image.shape[1]]
        x = torch.cat([self.text_in(self.text_embed(text_ids)), image], 1)  # (U, n, D)
        rows, n, _ = x.shape
        text_len = text_ids.shape[1]
        visible = sequence.text_mask(text_ids, self.config.pad_id)
        bias = sequence.attention_bias(visible, n - text_len, self.compute_dtype)
        slices = sequence.input_rows(text_len, self.config.max_text_len, n - text_len)
        turns = torch.cat([self.turns[:, :, s] for s in slices], 2)  # (layers, 2, n, 2, K)
        turns = turns.index_select(3, self.head_group)  # (layers, 2, n, H + H_kv, K)
        x = x.reshape(rows * n, -1)
        for layer, block in enumerate(self.blocks):
            heads = self._heads(x, block, turns[layer].repeat(1, rows, 1, 1))
            q, k, v = (t.unflatten(0, (rows, n)).transpose(1, 2) for t in heads)  # (U, H or H_kv, n, K)
            cache.fill(layer, k[which], v[which])
            self._finish(x, self._attend(q, k, v, bias), block)
        return self._logits(x.unflatten(0, (rows, n))[:, -1])[which]

    @torch.inference_mode()
    def decode_step(self, image_ids: Tensor, position: int, cache: PackedCache) -> Tensor:
        """As `Dalle.decode_step`: the token drawn at `position` (R,) -> logits (R, V) of the next."""
        num_image = self.config.num_image_tokens
        cache.move_to(position + cache.length - num_image + 1)
        turns = self.turns[:, :, position - num_image].index_select(2, self.head_group)
        x = self.image_embed[image_ids]  # (R, D)
        if cache.lines is not None:
            x = x + cache.lines[:, position + 1]
        for layer, block in enumerate(self.blocks):
            q, k, v = self._heads(x, block, turns[layer])  # (R, H or H_kv, K)
            self._finish(x, cache.attend(layer, q, k, v).to(self.compute_dtype), block)
        return self._logits(x)

    def _heads(self, x: Tensor, block: PackedBlock, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (M, D) -> queries (M, H, K) and keys (M, H_kv, K), normed and turned, float32; values (M, H_kv, K).

        turn: (2, [M,] H + H_kv, K)
        """
        c = self.config
        heads = block.qkv(self._norm(x)).view(len(x), -1, c.head_dim)
        straight = heads[:, : c.num_heads + c.num_kv_heads]
        y = torch.addcmul(straight * turn[0], straight.roll(c.head_dim // 2, -1), turn[1])  # float32
        norm = torch.linalg.vector_norm(straight, dim=-1, keepdim=True, dtype=torch.float32)
        y.div_(norm.square_().add_(self.head_eps**2).sqrt_())
        return y[:, : c.num_heads], y[:, c.num_heads :], heads[:, c.num_heads + c.num_kv_heads :]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """Causal attention of a whole prefix: (R, H or H_kv, n, K) -> (R n, H K)"""
        dtype = self.attention_dtype
        q, k, v, bias = (None if t is None else t.to(dtype) for t in (q, k, v, bias))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, bias, is_causal=bias is None, scale=1.0)  # (R, H, n, K)
        return y.transpose(1, 2).flatten(2).flatten(0, 1).to(self.compute_dtype)

    def _finish(self, x: Tensor, y: Tensor, block: PackedBlock) -> None:
        """Adds the attention's result and the feed-forward branch to x in place."""
        x.add_(block.out(y))
        x.add_(block.down(block.gate(self._norm(x))))

    def _norm(self, x: Tensor) -> Tensor:
        """x / sqrt(|x|^2 + D eps), float32 inside; sqrt(D) is in the weights that follow."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        out = torch.empty(x.shape, dtype=self.compute_dtype)
        return torch.div(x, norm.square_().add_(self.eps**2).sqrt_(), out=out)

    def _logits(self, x: Tensor) -> Tensor:
        return self.head(self._norm(x))


def _distinct_rows(
    text_ids: Tensor, image_ids: Tensor | None, lines: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Texts (U, T), known image tokens (U, n) and drawings (U, N, D) of the U different rows, and which of them each
    row is: (R,)"""
    image_ids = text_ids.new_empty(len(text_ids), 0) if image_ids is None else image_ids
    number = text_ids.new_zeros(len(text_ids), 1)
    if lines is not None:  # neighbours alike have one number: rows of a drawing stand side by side
        is_new = (lines[1:] != lines[:-1]).flatten(1).any(1)
        number[1:, 0] = is_new.long().cumsum(0)
    rows, which = torch.cat([number, text_ids, image_ids], 1).unique(dim=0, return_inverse=True)
    _, text_ids, image_ids = rows.split([1, text_ids.shape[1], image_ids.shape[1]], 1)
    if lines is not None:
        first = torch.zeros(len(rows), dtype=torch.long).scatter_(0, which, torch.arange(len(which)))
        lines = lines[first]
    return text_ids, image_ids, lines, which


def int8_steps(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) -> whole numbers from -127 to 127, and what one of them is worth in each row (N,)"""
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
    return (weight / scale).round(), scale[:, 0].contiguous()


def pack_block(block: Block, weights: Weights, linear: type, gate: type) -> PackedBlock:
    return PackedBlock(
        linear(fold(block.attention.qkv.weight, block.attention_norm), weights),
        linear(block.attention.out.weight.float(), weights),
        gate(fold(block.ffn.gate_up.weight, block.ffn_norm), weights),
        linear(block.ffn.out.weight.float(), weights),
    )


def fold(weight: Tensor, norm: RMSNorm) -> Tensor:
    """The matrix after a norm takes the norm's gains and its sqrt(D): (O, D) float32."""
    return weight.float() * norm.weight.float() * weight.shape[1] ** 0.5


def rotary_with_gains(block: Block, rotary: Tensor) -> Tensor:
    """rotate(norm(x) * gain) = x / |x| * a + roll(x / |x|) * b. rotary (2, P, K) -> a and b: (2, P, 2, K) float32 for
    queries, which also take the softmax scale, and keys."""
    attention = block.attention
    width = attention.head_dim
    gains = (
        torch.stack([attention.q_norm.weight / width**0.5, attention.k_norm.weight]).float() * width**0.5
    )  # (2, K)
    rolled = gains.roll(width // 2, -1)
    return torch.stack([rotary[0][:, None] * gains, rotary[1][:, None] * rolled])
