"""Self-attention of the generator: QK-norm, rotary positions in two axes, grouped queries, a static KV cache.

Rotary: Su et al. 2021 (RoFormer); for images each pair of channels turns with the row or with the column, in turn,
as in Qwen2-VL's M-RoPE (Wang et al. 2024, section 2.1). QK-norm: Dehghani et al. 2023 (ViT-22B, section 2).
Grouped queries: Ainslie et al. 2023.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dalle import sequence


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class CausalMask:
    """Causality, and keys of padding that none may see. Built once for all layers."""

    def __init__(self, visible: Tensor, length: int) -> None:
        """visible: (B, T) bool text positions; length: inputs in all."""
        self.visible, self.length = visible, length
        self.padding = None if bool(visible.all()) else ~visible
        self.bias = None  # (B, 1, L, L) bfloat16, 0 or -inf: exact in any dtype
        if self.padding is not None:
            self.bias = sequence.attention_bias(visible, length - visible.shape[1], torch.bfloat16)

    @functools.cached_property
    def key_bias(self) -> Tensor | None:
        """(B, L) float32: 0, or -inf where a key is padding; None where none is."""
        if self.padding is None:
            return None
        num_image = self.length - self.visible.shape[1]
        return sequence.key_bias(self.visible, num_image, torch.float32)[:, 0, 0].contiguous()


def rotary_table(positions: Tensor, head_dim: int, theta: float) -> Tensor:
    """Angles of every input: (P, 2) positions -> (2, P, K) float32, cosines and signed sines.

    Channel pairs are (i, i + K/2); pair i turns with the row where i is even, with the column where it is odd.
    """
    pairs = torch.arange(head_dim // 2)
    frequency = theta ** (-(pairs // 2) / (head_dim / 4))  # (K/2,) from 1 down to about 1 / theta
    axis = pairs % 2
    angles = positions[:, axis].float() * frequency  # (P, K/2)
    cosine, sine = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cosine, cosine], -1), torch.cat([-sine, sine], -1)])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x: (B, L, H, K); table: (2, L, K) in x's dtype. -> (B, L, H, K)"""
    cosine, sine = table[:, :, None]  # (L, 1, K) each
    return torch.addcmul(x * cosine, x.roll(x.shape[-1] // 2, -1), sine)


@dataclass
class KVCache:
    """Keys and values of every layer, allocated once for the whole sequence.

    Index t < T holds text, T holds BOI, T + 1 + k holds image token k.
    """

    entries: Tensor  # (num_layers, 2, B, H_kv, L, K)
    bias: Tensor  # (B, 1, 1, L): 0, or -inf for padding
    text_len: int
    lines: Tensor | None = (
        None  # (B, N, D): features of line drawings; n is added to the input before image token n
    )

    @property
    def batch_size(self) -> int:
        return self.entries.shape[2]

    @property
    def length(self) -> int:
        return self.entries.shape[4]

    def lines_at(self, index: int | Tensor) -> Tensor:
        """What is added to the input that predicts image token `index`: (B, 1, D)"""
        if isinstance(index, int):
            return self.lines[:, index : index + 1]
        if index.dim():  # an index a row
            return self.lines[torch.arange(len(index), device=index.device), index][:, None]
        return self.lines.index_select(1, index.view(1))

    def bias_at(self, index: int | Tensor) -> Tensor:
        """What the query at `index` adds to its scores. An int looks at the filled part alone; a tensor at all of the
        cache with the rest hidden, which keeps shapes constant for compiled or captured steps: 0-d, or (B,) where each
        row stands at an index of its own."""
        if isinstance(index, int):
            return self.bias[..., : index + 1]
        later = torch.arange(self.length, device=index.device) > index.view(-1, 1, 1, 1)
        return self.bias.masked_fill(later, float("-inf"))

    def update(self, layer: int, k: Tensor, v: Tensor, index: int | Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, H_kv, n, K) keys and values from `index` on (n = 1 for a tensor); returns those to look at.

        A tensor is 0-d, or (B,): an index a row.
        """
        keys, values = self.entries[layer, 0], self.entries[layer, 1]
        if isinstance(index, int):
            end = index + k.shape[2]
            keys[:, :, index:end], values[:, :, index:end] = k, v
            return keys[:, :, :end], values[:, :, :end]
        if index.dim():
            rows = torch.arange(len(k), device=k.device)
            keys[rows, :, index], values[rows, :, index] = (
                k[:, :, 0].to(keys.dtype),
                v[:, :, 0].to(values.dtype),
            )
            return keys, values
        keys.index_copy_(2, index.view(1), k.to(keys.dtype))
        values.index_copy_(2, index.view(1), v.to(values.dtype))
        return keys, values

    def rows(self, rows: slice) -> "KVCache":
        """A view of some rows."""
        lines = None if self.lines is None else self.lines[rows]
        return KVCache(self.entries[:, :, rows], self.bias[rows], self.text_len, lines)

    def move_row(self, source: int, target: int) -> None:
        """Row `source` takes the place of row `target`, whose contents are lost."""
        self.entries[:, :, target] = self.entries[:, :, source]
        self.bias[target] = self.bias[source]
        if self.lines is not None:
            self.lines[target] = self.lines[source]


class CausalAttention(nn.Module):
    """softmax(q k^T / sqrt(K)) v over earlier positions that are no padding. No weights of its own."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: CausalMask) -> Tensor:
        """q, k, v: (B, H, L, K) -> (B, H, L, K)"""
        bias = None if mask.bias is None else mask.bias.to(q.dtype)
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, bias, dropout, is_causal=bias is None)


class Attention(nn.Module):
    """Causal self-attention; `num_kv_heads` < `num_heads` shares keys and values among groups of queries."""

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.qkv = nn.Linear(dim, (num_heads + 2 * num_kv_heads) * head_dim, bias=False)
        self.q_norm, self.k_norm = RMSNorm(head_dim), RMSNorm(head_dim)
        self.attend = CausalAttention(dropout)
        self.out = nn.Linear(num_heads * head_dim, dim, bias=False)

    def forward(self, x: Tensor, table: Tensor, mask: CausalMask) -> Tensor:
        """x: (B, L, D); table: (2, L, K). -> (B, L, D)"""
        return self._attend(*self._project(x, table), mask)

    def prefill(self, x: Tensor, table: Tensor, mask: CausalMask, cache: KVCache, layer: int) -> Tensor:
        """The same, and the keys and values go into the empty cache."""
        q, k, v = self._project(x, table)
        cache.update(layer, k, v, 0)
        return self._attend(q, k, v, mask)

    def decode(
        self, x: Tensor, table: Tensor, bias: Tensor, cache: KVCache, layer: int, index: int | Tensor
    ) -> Tensor:
        """One input a row: x (B, 1, D); table (2, 1, K); bias from `cache.bias_at`. -> (B, 1, D)"""
        q, k, v = self._project(x, table)
        keys, values = cache.update(layer, k, v, index)
        # the queries of a group stand side by side as rows of one product: the cache is read once and never repeated
        q = rearrange(q, "b (g r) 1 k -> b g r k", g=self.num_kv_heads).to(keys.dtype)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias.to(keys.dtype))
        return self.out(rearrange(y, "b g r k -> b 1 (g r k)"))

    def _project(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D) -> queries (B, H, L, K), keys and values (B, H_kv, L, K)"""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # (B, L, H + 2 H_kv, K)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
        table = table.to(v.dtype)
        q, k = rotate(self.q_norm(q), table), rotate(self.k_norm(k), table)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: CausalMask) -> Tensor:
        """(B, H, L, K), keys and values (B, H_kv, L, K) -> (B, L, D)"""
        if self.num_kv_heads != self.num_heads:
            repeats = self.num_heads // self.num_kv_heads
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        y = self.attend(q.to(v.dtype), k.to(v.dtype), v, mask)  # (B, H, L, K)
        return self.out(rearrange(y, "b h l k -> b l (h k)"))


def new_cache(
    num_layers: int, num_kv_heads: int, head_dim: int, visible: Tensor, num_image: int, dtype: torch.dtype
) -> KVCache:
    """visible: (B, T) bool text positions; num_image: image tokens N. Holds T + N inputs."""
    batch_size, text_len = visible.shape
    shape = (num_layers, 2, batch_size, num_kv_heads, text_len + num_image, head_dim)
    entries = torch.zeros(shape, dtype=dtype, device=visible.device)
    return KVCache(entries, sequence.key_bias(visible, num_image, dtype), text_len)
