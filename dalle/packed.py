"""The generator rearranged for decoding on a CPU: the same function, fewer and better fed operations.

A step of decoding reads every weight once for a handful of rows, so what counts is bytes and the number of operators.
Weights are packed once into the blocked layout of oneDNN (an ordinary linear layer repacks them at every call); norm
gains are folded into the matrices that follow, those of queries and keys and the softmax scale into the rotary tables;
keys and values go into the cache in one copy; SiLU and the gate's product run inside the matrix products. The residual
stream and all norms stay float32. Packed products round each row alike however many rows there are, so a picture does
not depend on the batch it is drawn in.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle import sequence
from dalle.attention import RMSNorm
from dalle.model import Block, Dalle

PACK_ROWS = (
    8  # row count that oneDNN lays the weights out for; fixed, so that the layout never depends on the batch
)
Weights = torch.dtype  # float32, bfloat16 or int8


def is_available() -> bool:
    """Whether this build of torch has the operators that packing needs."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


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
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
        self.weight = (weight / scale).round().to(torch.int8).contiguous()
        self.scale = scale[:, 0].to(torch.bfloat16)

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


class PackedCache:
    """Keys and values (num_layers, 2, R, H_kv, L, K) and the bias that hides padding, (R * H_kv, L, 1)."""

    def __init__(self, decoder: "PackedDecoder", text_ids: Tensor) -> None:
        c = decoder.config
        self.text_len, self.rows = text_ids.shape[1], len(text_ids)
        self.visible = sequence.text_mask(text_ids, c.pad_id)
        length = self.text_len + c.num_image_tokens
        shape = (c.num_layers, 2, self.rows, c.num_kv_heads, length, c.head_dim)
        self.entries = torch.zeros(shape, dtype=decoder.compute_dtype)
        bias = sequence.key_bias(self.visible, c.num_image_tokens, decoder.compute_dtype)  # (R, 1, 1, L)
        self.bias = bias.expand(-1, c.num_kv_heads, 1, -1).reshape(-1, length, 1).contiguous()


class PackedDecoder:
    """`new_cache`, `prefill` and `decode_step` of a `Dalle` on a CPU; see `dalle.sampling.Generator`."""

    row_multiple = 1

    def __init__(self, model: Dalle, weights: Weights) -> None:
        if not is_available():
            raise ValueError("this build of torch lacks oneDNN: decode with --fast.engine plain")
        c = self.config = model.config
        self.compute_dtype = torch.bfloat16 if weights == torch.int8 else weights
        linear, gate = (Int8Linear, Int8Gate) if weights == torch.int8 else (PackedLinear, PackedGate)
        with torch.inference_mode():
            self.text_embed, self.text_in = model.text_embed, model.text_in
            self.image_embed, self.begin_image = model.image_embed.weight.float(), model.begin_image
            self.blocks = [pack_block(block, weights, linear, gate) for block in model.blocks]
            head = model.image_embed.weight if c.tie_image_head else model.image_head.weight
            # the head stays in 16 bits at least: its rounding goes straight into the probabilities
            self.head = PackedLinear(fold(head, model.norm), self.compute_dtype)
            self.turns = torch.stack([rotary_with_gains(block, model.rotary) for block in model.blocks])
        self.head_group = torch.tensor([0] * c.num_heads + [1] * c.num_kv_heads)
        self.eps, self.head_eps = (model.norm.eps * c.dim) ** 0.5, (model.norm.eps * c.head_dim) ** 0.5

    @torch.inference_mode()
    def new_cache(self, text_ids: Tensor) -> PackedCache:
        return PackedCache(self, text_ids)

    @torch.inference_mode()
    def prefill(self, text_ids: Tensor, cache: PackedCache, image_ids: Tensor | None = None) -> Tensor:
        """As `Dalle.prefill`: logits (R, V) of the first unknown image token."""
        begin = self.begin_image.expand(len(text_ids), 1, -1)
        known = [self.image_embed[image_ids]] if image_ids is not None else []
        x = torch.cat([self.text_in(self.text_embed(text_ids)), begin, *known], 1)  # (R, n, D)
        rows, n, _ = x.shape
        bias = sequence.attention_bias(cache.visible, n - cache.text_len, self.compute_dtype)
        slices = sequence.input_rows(cache.text_len, self.config.max_text_len, n - cache.text_len)
        turns = torch.cat([self.turns[:, :, s] for s in slices], 2)  # (layers, 2, n, 2, K)
        turns = turns.index_select(3, self.head_group)  # (layers, 2, n, H + H_kv, K)
        x = x.reshape(rows * n, -1)
        for layer, block in enumerate(self.blocks):
            heads = self._heads(x, block, turns[layer].repeat(1, rows, 1, 1))  # (R n, H + 2 H_kv, K)
            heads = heads.unflatten(0, (rows, n)).transpose(1, 2)  # (R, H + 2 H_kv, n, K)
            y = self._attend_all(heads, cache.entries[layer], bias)  # (R n, H K)
            self._finish(x, y, block)
        return self._logits(x.unflatten(0, (rows, n))[:, -1])

    @torch.inference_mode()
    def decode_step(self, image_ids: Tensor, position: int, cache: PackedCache) -> Tensor:
        """As `Dalle.decode_step`: the token drawn at `position` (R,) -> logits (R, V) of the next."""
        index = position + cache.text_len + 1
        turns = self.turns[:, :, position + self.config.max_text_len + 1].index_select(2, self.head_group)
        x = self.image_embed[image_ids]  # (R, D)
        for layer, block in enumerate(self.blocks):
            heads = self._heads(x, block, turns[layer])  # (R, H + 2 H_kv, K)
            y = self._attend_one(heads, cache.entries[layer], cache.bias, index)  # (R, H K)
            self._finish(x, y, block)
        return self._logits(x)

    def _heads(self, x: Tensor, block: PackedBlock, turn: Tensor) -> Tensor:
        """x (M, D) -> heads (M, H + 2 H_kv, K), queries and keys normed and turned. turn: (2, [M,] H + H_kv, K)"""
        c = self.config
        heads = block.qkv(self._norm(x)).view(len(x), -1, c.head_dim)
        turned = heads[:, : c.num_heads + c.num_kv_heads]  # (M, H + H_kv, K), a view
        y = torch.addcmul(turned * turn[0], turned.roll(c.head_dim // 2, -1), turn[1])  # float32
        norm = torch.linalg.vector_norm(turned, dim=-1, keepdim=True, dtype=torch.float32)
        torch.div(y, norm.square_().add_(self.head_eps**2).sqrt_(), out=turned)
        return heads

    def _attend_one(self, heads: Tensor, entries: Tensor, bias: Tensor, index: int) -> Tensor:
        """One query a row against the cache: heads (R, H + 2 H_kv, K), entries (2, R, H_kv, L, K) -> (R, H K)"""
        c = self.config
        rows, end = len(heads), index + 1
        entries[:, :, :, index] = heads[:, c.num_heads :].unflatten(1, (2, -1)).transpose(0, 1)
        keys, values = entries.flatten(1, 2)[:, :, :end]  # (R H_kv, end, K) each
        q = heads[:, : c.num_heads].reshape(rows * c.num_kv_heads, -1, c.head_dim)  # (R H_kv, r, K)
        scores = torch.baddbmm(bias[:, :end], keys, q.transpose(1, 2))  # (R H_kv, end, r)
        return torch.bmm(scores.transpose(1, 2).softmax(-1), values).view(rows, -1)

    def _attend_all(self, heads: Tensor, entries: Tensor, bias: Tensor | None) -> Tensor:
        """Causal attention of a whole prefix (R, H + 2 H_kv, n, K), which goes into the cache -> (R n, H K)"""
        c = self.config
        q, kv = heads.split([c.num_heads, 2 * c.num_kv_heads], 1)
        entries[:, :, :, : heads.shape[2]] = kv.unflatten(1, (2, -1)).transpose(0, 1)
        k, v = (t.repeat_interleave(c.num_heads // c.num_kv_heads, 1) for t in kv.chunk(2, 1))
        y = F.scaled_dot_product_attention(q, k, v, bias, is_causal=bias is None, scale=1.0)  # (R, H, n, K)
        return y.transpose(1, 2).flatten(2).flatten(0, 1)

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
