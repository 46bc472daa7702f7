"""Generators trained with lucidrains' DALLE-pytorch 1.x, for inference: what `dalle.convert` writes.

The sequence is [bos | text (T) | image (N)] over one vocabulary of V_text + V_image ids, V_text = tokens + T: a 0 at
text position i becomes the pad id tokens + i. Pre-norm blocks with LayerScale; optional token shift, rotary (q, k and
v), reversible streams, sandwich norms and masked ("sparse") attention patterns, whose static masks are dense here. One
code path serves full and cached passes: a pass computes positions [start, end) and reads the rest from the cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from common.checkpoint import load_weights, read_config, resolve
from common.config import from_mapping
from dalle.text_tokenizer import EncodedText, TextTokenizer

KIND = "dalle_pytorch"
CONV_REACH = 5  # side of the causal window of conv_like attention

AttnType = Literal["full", "axial_row", "axial_col", "conv_like"]


@dataclass(frozen=True)
class DallePytorchConfig:
    """Sizes and switches of one imported generator."""

    dim: int
    """Width."""
    num_layers: int
    """Attention and feed-forward pairs."""
    num_heads: int
    """Attention heads."""
    head_dim: int
    """Width of a head."""
    num_text_tokens: int
    """Text vocabulary without the pads of each position."""
    max_text_len: int
    """Text tokens T."""
    codebook_size: int
    """Image vocabulary."""
    grid_size: int
    """Side of the image token grid; N = grid_size ** 2."""
    text_pos_rows: int = 0
    """Rows of the learned text positions (T + 1, or T + 2 in a fork); 0 with rotary positions."""
    attn_types: tuple[AttnType, ...] = ("full",)
    """Attention patterns, repeated over the layers."""
    rotary: bool = False
    """Rotary positions instead of learned ones."""
    shift_tokens: bool = False
    """Mix channels of the previous, left and upper tokens into each sublayer's input."""
    reversible: bool = False
    """Two residual streams."""
    stable: bool = False
    """Divide the last hidden state by its maximum."""
    sandwich_norm: bool = False
    """A second LayerNorm after each sublayer."""
    conv_centred: bool = False
    """The window of conv_like lies around the token, as in releases before 1.5.0, not to its upper left."""

    def __post_init__(self) -> None:
        if self.rotary == bool(self.text_pos_rows):
            raise ValueError("a generator has rotary positions or learned ones, not both")
        if self.shift_tokens and self.dim % 4:
            raise ValueError(f"token shift needs a dim that divides by 4, not {self.dim}")

    pad_id = 0
    """Stands for every pad of a text; a text of pads alone is the null caption."""

    @property
    def num_image_tokens(self) -> int:
        return self.grid_size**2

    @property
    def prefix_len(self) -> int:
        """bos and text."""
        return self.max_text_len + 1

    @property
    def seq_len(self) -> int:
        """bos, text and image."""
        return self.prefix_len + self.num_image_tokens

    @property
    def text_vocab_size(self) -> int:
        return self.num_text_tokens + self.max_text_len

    @property
    def rotary_width(self) -> int:
        """Text, row and column angles, each doubled for a pair of channels."""
        return 3 * 2 * (self.head_dim // 3 // 2)


class Attention(nn.Module):
    """Multi-head attention over a cache of keys and values."""

    def __init__(self, config: DallePytorchConfig) -> None:
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.num_heads = config.num_heads
        self.to_qkv = nn.Linear(config.dim, 3 * inner, bias=False)
        self.to_out = nn.Linear(inner, config.dim)

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, start: int, mask: Tensor, rotary: Tensor | None
    ):
        """x (B, n, D) at positions [start, start + n); keys and values (B, H, L, K) are filled there; mask (n, end)."""
        end = start + x.shape[1]
        q, k, v = rearrange(self.to_qkv(x), "b n (three h k) -> three b h n k", three=3, h=self.num_heads)
        if rotary is not None:
            q, k, v = (rotate(t, rotary[start:end]) for t in (q, k, v))  # (B, H, n, K)
        keys[:, :, start:end], values[:, :, start:end] = k, v
        y = F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], attn_mask=mask)
        return self.to_out(rearrange(y, "b h n k -> b n (h k)"))


class FeedForward(nn.Module):
    """GEGLU: the first half is the value, the second the gate."""

    def __init__(self, config: DallePytorchConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.dim, 8 * config.dim)
        self.down = nn.Linear(4 * config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * F.gelu(gate))


class Sublayer(nn.Module):
    """scale * norm_out(f(shift(norm(x)))); the caller adds the residual."""

    def __init__(self, config: DallePytorchConfig, inner: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim)
        self.norm_out = nn.LayerNorm(config.dim) if config.sandwich_norm else nn.Identity()
        self.scale = nn.Parameter(torch.ones(config.dim))
        self.inner = inner


class Block(nn.Module):
    def __init__(self, config: DallePytorchConfig) -> None:
        super().__init__()
        self.attention = Sublayer(config, Attention(config))
        self.feed_forward = Sublayer(config, FeedForward(config))


class BareTextTokenizer(TextTokenizer):
    """Pieces without begin and end marks, as DALLE-pytorch reads them."""

    def encode(self, texts: Sequence[str], max_len: int) -> EncodedText:
        """Ids (B, max_len), 0 where the text has ended."""
        pieces = self.backend.pieces([text[: 64 * max_len] for text in texts])
        ids = torch.zeros(len(texts), max_len, dtype=torch.long)
        for row, found in zip(ids, pieces, strict=True):
            row[: min(len(found), max_len)] = torch.tensor(found[:max_len])
        return EncodedText(
            ids,
            num_pieces=sum(map(len, pieces)),
            num_unknown=sum(piece == self.unk_id for found in pieces for piece in found),
            num_truncated=sum(len(found) > max_len for found in pieces),
        )


class DallePytorchCache:
    """Keys, values and (for the token shift) normed inputs of every layer, preallocated for the whole sequence."""

    def __init__(
        self, config: DallePytorchConfig, batch_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        kv = (config.num_layers, batch_size, config.num_heads, config.seq_len, config.head_dim)
        self.keys = torch.zeros(kv, device=device, dtype=dtype)
        self.values = torch.zeros(kv, device=device, dtype=dtype)
        rows = config.seq_len + 1 if config.shift_tokens else 0  # the last row stays zero: "nothing there"
        self.normed = torch.zeros(
            config.num_layers, 2, batch_size, rows, config.dim, device=device, dtype=dtype
        )
        self.length = 0


class DallePytorch(nn.Module):
    """An imported generator."""

    def __init__(self, config: DallePytorchConfig) -> None:
        super().__init__()
        self.config = config
        self.text_embedding = nn.Embedding(config.text_vocab_size, config.dim)
        self.image_embedding = nn.Embedding(config.codebook_size, config.dim)
        if config.rotary:
            self.register_buffer("rotary", torch.zeros(config.seq_len, config.rotary_width))
        else:
            self.text_positions = nn.Parameter(torch.zeros(config.text_pos_rows, config.dim))
            self.row_positions = nn.Parameter(torch.zeros(config.grid_size, config.dim))
            self.column_positions = nn.Parameter(torch.zeros(config.grid_size, config.dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.text_vocab_size + config.codebook_size)
        for name in sorted(set(config.attn_types)):
            self.register_buffer(f"mask_{name}", static_mask(config, name), persistent=False)
        upper, left = shift_sources(config)
        self.register_buffer("upper", upper, persistent=False)
        self.register_buffer("left", left, persistent=False)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "DallePytorch":
        """A directory that `dalle.convert` wrote. Strict; in eval mode, float32."""
        directory = resolve(name)
        config = read_config(directory, KIND)
        model = cls(from_mapping(DallePytorchConfig, config["model"], where=f"{directory}/config.json"))
        load_weights(model, directory)
        return model.eval()

    def new_cache(self, text_ids: Tensor) -> DallePytorchCache:
        """Empty, for as many rows as `text_ids` has."""
        weight = self.head.weight
        return DallePytorchCache(self.config, len(text_ids), weight.device, weight.dtype)

    def forward(self, text_ids: Tensor, image_ids: Tensor) -> Tensor:
        """text_ids (B, T) with 0 as pad, image_ids (B, n <= N) -> logits (B, min(1 + T + n, T + N), V_text + V_image).

        The logits at position p are of the token at p + 1; text positions allow text ids only, image positions image
        ids only (the others are -max), as upstream.
        """
        tokens = torch.cat([self.embed_text(text_ids), self.embed_image(image_ids, 0)], dim=1)
        tokens = tokens[:, : self.config.seq_len - 1]
        logits = self.head(self.hidden(tokens, self.new_cache(tokens)))
        split, text_vocab = self.config.max_text_len, self.config.text_vocab_size
        logits[:, split:, :text_vocab] = -torch.finfo(logits.dtype).max
        logits[:, :split, text_vocab:] = -torch.finfo(logits.dtype).max
        return logits

    @torch.no_grad()
    def prefill(self, text_ids: Tensor, cache: DallePytorchCache, image_ids: Tensor | None = None) -> Tensor:
        """Text (B, T) and image tokens that are known (B, n) -> logits (B, V_image) of the first unknown token."""
        known = [self.embed_image(image_ids, 0)] if image_ids is not None else []
        x = self.hidden(torch.cat([self.embed_text(text_ids), *known], 1), cache)
        return self._image_logits(x[:, -1])

    @torch.no_grad()
    def decode_step(self, image_ids: Tensor, position: int, cache: DallePytorchCache) -> Tensor:
        """The token sampled at raster index `position` (B,) -> logits (B, V_image) of the next."""
        return self._image_logits(self.hidden(self.embed_image(image_ids[:, None], position), cache)[:, -1])

    def _image_logits(self, x: Tensor) -> Tensor:
        first = self.config.text_vocab_size
        return F.linear(x, self.head.weight[first:], self.head.bias[first:])

    def embed_text(self, text_ids: Tensor) -> Tensor:
        """(B, T) -> (B, 1 + T, D), bos in front."""
        config = self.config
        pads = torch.arange(config.max_text_len, device=text_ids.device) + config.num_text_tokens
        ids = F.pad(torch.where(text_ids == 0, pads, text_ids), (1, 0))  # (B, 1 + T)
        x = self.text_embedding(ids)
        return x if config.rotary else x + self.text_positions[: config.prefix_len]

    def embed_image(self, image_ids: Tensor, first: int) -> Tensor:
        """(B, n) at raster positions [first, first + n) -> (B, n, D)."""
        x = self.image_embedding(image_ids)
        if self.config.rotary:
            return x
        positions = (self.row_positions[:, None] + self.column_positions).flatten(0, 1)  # (N, D)
        return x + positions[first : first + image_ids.shape[1]]

    def hidden(self, x: Tensor, cache: DallePytorchCache) -> Tensor:
        """x (B, n, D) at the cache's next n positions -> normed hidden states; the cache moves on."""
        start, end = cache.length, cache.length + x.shape[1]
        rotary = self.rotary if self.config.rotary else None
        x1 = x2 = x
        for i, block in enumerate(self.blocks):
            name = self.config.attn_types[i % len(self.config.attn_types)]
            mask = getattr(self, f"mask_{name}")[start:end, :end]
            attend = (cache.keys[i], cache.values[i], start, mask, rotary)
            if self.config.reversible:
                x1 = x1 + self._sublayer(block.attention, x2, cache.normed[i, 0], start, *attend)
                x2 = x2 + self._sublayer(block.feed_forward, x1, cache.normed[i, 1], start)
            else:
                x1 = x1 + self._sublayer(block.attention, x1, cache.normed[i, 0], start, *attend)
                x1 = x1 + self._sublayer(block.feed_forward, x1, cache.normed[i, 1], start)
        cache.length = end
        y = (x1 + x2) / 2 if self.config.reversible else x1
        if self.config.stable:
            y = y / y.amax(dim=-1, keepdim=True)
        return self.norm(y)

    def _sublayer(self, layer: Sublayer, x: Tensor, normed: Tensor, start: int, *attend) -> Tensor:
        y = layer.norm(x)
        if self.config.shift_tokens:
            end, q = start + x.shape[1], self.config.dim // 4
            normed[:, start:end] = y
            y = torch.cat(
                [
                    normed[:, self.upper[start:end], :q],
                    normed[:, self.left[start:end], q : 2 * q],
                    y[..., 2 * q :],
                ],
                -1,
            )
        return layer.norm_out(layer.inner(y, *attend)) * layer.scale


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x (..., n, K) with its first channels turned pairwise by angles (n, R); the rest as they are."""
    width = angles.shape[-1]
    part, rest = x[..., :width], x[..., width:]
    turned = torch.stack([-part[..., 1::2], part[..., ::2]], dim=-1).flatten(-2)
    return torch.cat([part * angles.cos() + turned * angles.sin(), rest], dim=-1)


def static_mask(config: DallePytorchConfig, name: AttnType) -> Tensor:
    """(L, L) bool, True where a query (row) may see a key: causal; an image token sees all text, and of the image its
    row, its column or a window, to the upper left or around it."""
    position = torch.arange(config.seq_len)
    cell = position - config.prefix_len
    row, column = cell // config.grid_size, cell % config.grid_size
    causal = position[:, None] >= position
    same_row, same_column = row[:, None] == row, column[:, None] == column
    if name == "full":
        near = torch.ones_like(causal)
    elif name == "axial_row":
        near = same_row
    elif name == "axial_col":
        near = same_column
    elif name == "conv_like":
        down, right = row[:, None] - row, column[:, None] - column
        first = -(CONV_REACH // 2) if config.conv_centred else 0
        near = (down >= first) & (down < first + CONV_REACH) & (right >= first) & (right < first + CONV_REACH)
    else:
        raise ValueError(f"unknown attention pattern {name!r}")
    return causal & (near | (cell < 0))


def shift_sources(config: DallePytorchConfig) -> tuple[Tensor, Tensor]:
    """(L,) positions that the first and the second quarter of a token's channels come from; L means nowhere (zeros).

    Text: both from the token before. Image: from the token above and the token to the left.
    """
    length, width = config.seq_len, config.grid_size
    position = torch.arange(length)
    cell = position - config.prefix_len
    before = torch.where(position > 0, position - 1, length)
    above = torch.where(cell >= width, position - width, length)
    beside = torch.where(cell % width > 0, position - 1, length)
    return torch.where(cell < 0, before, above), torch.where(cell < 0, before, beside)
