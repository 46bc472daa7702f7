"""A plain PyTorch Llama-style text-to-image transformer as LlamaGen trains it: the baseline of train_speed.py.

Follows the reference in structure (FoundationVision/LlamaGen, autoregressive/models/gpt.py, MIT): float32 RMSNorm,
separate gate and up products, rotary positions in float32, a boolean mask to SDPA, dropout 0.1 on tokens and
branches, float32 logits. Ours to write: text tokens in place of caption features, losses on both parts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle import sequence
from dalle.model import DalleConfig


class BaselineNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).type_as(x) * self.weight


def apply_rotary(x: Tensor, angles: Tensor) -> Tensor:
    """x: (B, L, H, K); angles: (L, K/2, 2), cosine and sine. -> (B, L, H, K), turned in float32"""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    angles = angles.view(1, pairs.shape[1], 1, pairs.shape[3], 2)
    turned = torch.stack(
        [
            pairs[..., 0] * angles[..., 0] - pairs[..., 1] * angles[..., 1],
            pairs[..., 1] * angles[..., 0] + pairs[..., 0] * angles[..., 1],
        ],
        dim=-1,
    )
    return turned.flatten(3).type_as(x)


class BaselineBlock(nn.Module):
    def __init__(self, config: DalleConfig, dropout: float) -> None:
        super().__init__()
        c = config
        self.num_heads, self.head_dim = c.num_heads, c.head_dim
        self.attention_norm, self.ffn_norm = BaselineNorm(c.dim), BaselineNorm(c.dim)
        self.wqkv, self.wo = nn.Linear(c.dim, 3 * c.dim, bias=False), nn.Linear(c.dim, c.dim, bias=False)
        self.w1, self.w3 = nn.Linear(c.dim, c.ffn_dim, bias=False), nn.Linear(c.dim, c.ffn_dim, bias=False)
        self.w2 = nn.Linear(c.ffn_dim, c.dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor) -> Tensor:
        x = x + self.dropout(self.wo(self._attend(self.attention_norm(x), angles, mask)))
        y = self.ffn_norm(x)
        return x + self.dropout(self.w2(F.silu(self.w1(y)) * self.w3(y)))

    def _attend(self, x: Tensor, angles: Tensor, mask: Tensor) -> Tensor:
        batch_size, length, dim = x.shape
        q, k, v = (
            y.view(batch_size, length, self.num_heads, self.head_dim)
            for y in self.wqkv(x).split([dim, dim, dim], dim=-1)
        )
        q, k = apply_rotary(q, angles), apply_rotary(k, angles)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.transpose(1, 2).contiguous().view(batch_size, length, dim)


class LlamaBaseline(nn.Module):
    """Same sizes, vocabularies and loss positions as `Dalle` of the config."""

    def __init__(self, config: DalleConfig, dropout: float = 0.1) -> None:
        super().__init__()
        self.config = c = config
        self.text_embed, self.image_embed = (
            nn.Embedding(c.text_vocab_size, c.dim),
            nn.Embedding(c.codebook_size, c.dim),
        )
        self.begin_image = nn.Parameter(torch.randn(c.dim) * 0.02)
        self.token_dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(BaselineBlock(c, dropout) for _ in range(c.num_layers))
        self.norm = BaselineNorm(c.dim)
        self.text_head = nn.Linear(c.dim, c.text_vocab_size, bias=False)
        self.image_head = nn.Linear(c.dim, c.codebook_size, bias=False)
        positions = sequence.positions(c.max_text_len, c.grid_size).float()  # (P, 2)
        frequency = 10000.0 ** (-torch.arange(0, c.head_dim // 2, 2) / (c.head_dim // 2))
        angles = (positions[:, :, None] * frequency).flatten(1)  # (P, K/2): rows, then columns
        self.register_buffer("angles", torch.stack([angles.cos(), angles.sin()], -1), persistent=False)

    def loss(self, text_ids: Tensor, image_ids: Tensor) -> Tensor:
        """text_ids: (B, T) without padding; image_ids: (B, N)."""
        batch_size, text_len = text_ids.shape
        begin = self.begin_image.expand(batch_size, 1, -1)
        x = torch.cat([self.text_embed(text_ids), begin, self.image_embed(image_ids[:, :-1])], 1)
        x, length = self.token_dropout(x), x.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        mask = mask.expand(batch_size, 1, -1, -1)
        for block in self.blocks:
            x = block(x, self.angles[:length], mask)
        x = self.norm(x)
        text_logits = self.text_head(x[:, : text_len - 1]).float()
        image_logits = self.image_head(x[:, text_len:]).float()
        text_loss = F.cross_entropy(text_logits.flatten(0, 1), text_ids[:, 1:].flatten())
        return (text_loss + 7 * F.cross_entropy(image_logits.flatten(0, 1), image_ids.flatten())) / 8
