"""Keys and values of a decode on a CPU, laid out for one query a row.

One query's attention is two weighted sums of rows: of the transposed keys by the query, of the values by the
probabilities. `embedding_bag` has kernels for just that, which prefetch: measured at 16 rows, 8 heads of 64 and 162
keys in float16, 0.23 ms a layer and core, where batched products in bfloat16 take 0.53 and SDPA 1.9. A transposed key
is a column, and writing it touches as many cache lines as there are channels; so the last keys stand in float32 rows
and are turned RECENT at a time.
"""

import torch
from torch import Tensor

RECENT = 32  # keys that are turned together: in float16 they fill a cache line
CHUNK = 96  # positions whose turned keys lie together: a step reads at most this many too many


def weighted_sums(table: Tensor, rows: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Each bag's sum of weight * row of `table` (P, W): (bags, W). `rows` and `weights` list all bags one by one."""
    return torch.embedding_bag(table, rows, starts, False, 0, False, weights)[0]


class PackedCache:
    """`fill` with a prefix, then `attend` position by position."""

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: Tensor,
        dtype: torch.dtype,
    ) -> None:
        """bias: (R, 1, L) float32, 0 or -inf where a key is padding. dtype: of turned keys and values."""
        self.lines: Tensor | None = None  # (R, N, D) float32: features of line drawings
        rows, _, length = bias.shape
        self.bias, self.dtype, self.length = bias, dtype, length
        self.shape = (rows, num_kv_heads, head_dim)
        self.num_heads = num_heads
        stored = rows * num_kv_heads
        self.keys = torch.zeros(num_layers, -(-length // CHUNK), stored * head_dim, CHUNK, dtype=dtype)
        self.recent = torch.zeros(num_layers, stored, RECENT, head_dim)
        self.values = torch.zeros(num_layers, stored * length, head_dim, dtype=dtype)
        heads = torch.arange(rows * num_heads, dtype=torch.int32)[:, None]
        source = heads // (num_heads // num_kv_heads)  # the keys and values that a query head shares
        self.key_bags = (source * head_dim + torch.arange(head_dim, dtype=torch.int32)).flatten()
        self.key_starts = (heads * head_dim).flatten()
        self.value_bags = source * length + torch.arange(length, dtype=torch.int32)  # (R H, L)
        self.heads = heads.flatten()
        self.index, self.bags = -1, (self.heads, self.heads)

    def fill(self, layer: int, k: Tensor, v: Tensor) -> None:
        """The prefix: k and v (R, H_kv, n, K)"""
        rows, num_kv_heads, head_dim = self.shape
        n = k.shape[2]
        self.values[layer].view(rows, num_kv_heads, self.length, head_dim)[:, :, :n] = v
        keys = k.flatten(0, 1)  # (R H_kv, n, K)
        turned = (n - 1) // RECENT * RECENT
        for start in range(0, turned, RECENT):
            self._turn(layer, keys[:, start : start + RECENT], start)
        self.recent[layer, :, : n - turned] = keys[:, turned:]

    def move_to(self, index: int) -> None:
        """The position that `attend` is about, once for all layers."""
        self.index = index
        self.bags = self.value_bags[:, : index + 1].flatten(), self.heads * (index + 1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (R, H, K) and k (R, H_kv, K) float32, v (R, H_kv, K) of this position -> (R, H K) in the cache's type"""
        rows, num_kv_heads, head_dim = self.shape
        slot, start = self.index % RECENT, self.index // RECENT * RECENT
        recent = self.recent[layer]
        if slot == 0:
            self._turn(layer, recent, start - RECENT)
        recent[:, slot] = k.flatten(0, 1)
        self.values[layer].view(rows, num_kv_heads, self.length, head_dim)[:, :, self.index] = v
        grouped = q.reshape(rows * num_kv_heads, -1, head_dim)  # (R H_kv, r, K)
        near = torch.bmm(grouped, recent[:, : slot + 1].transpose(1, 2)).view(rows * self.num_heads, -1)
        weights = q.to(self.dtype).flatten()
        far = [
            weighted_sums(chunk, self.key_bags, self.key_starts, weights)[:, : start - i * CHUNK]
            for i, chunk in enumerate(self.keys[layer, : -(-start // CHUNK)])
        ]
        scores = torch.cat([*far, near], 1).view(rows, self.num_heads, -1)  # (R, H, index + 1) float32
        p = scores.add_(self.bias[..., : self.index + 1]).softmax(-1).to(self.dtype)
        return weighted_sums(self.values[layer], *self.bags, p.view(-1)).view(rows, -1)

    def _turn(self, layer: int, keys: Tensor, start: int) -> None:
        """RECENT keys (R H_kv, RECENT, K) of the positions from `start` on become columns."""
        if start >= 0:
            chunk = self.keys[layer, start // CHUNK]
            chunk[:, start % CHUNK : start % CHUNK + RECENT] = keys.transpose(1, 2).reshape(-1, RECENT)
