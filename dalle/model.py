"""The generator: a decoder-only transformer over [text | image] with separate vocabularies.

DALL-E (Ramesh et al. 2021, section 2.2) in the blocks of Llama (Touvron et al. 2023): RMSNorm before each branch,
SwiGLU, no biases, rotary positions, QK-norm. What stands where is `dalle/sequence.py`'s business alone.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.checkpoint import load_weights, resolve
from common.precision import checkpoint_contexts
from dalle import sequence
from dalle.attention import Attention, CausalMask, KVCache, RMSNorm, new_cache, rotary_table
from dalle.lines import LineEncoder
from dalle.model_config import (
    KIND,
    SIZES,
    TRAINING_ONLY,
    DalleConfig,
    ModelOptions,
    SizeName,
    config_mapping,
    read_model_config,
)

__all__ = [
    "KIND",
    "SIZES",
    "TRAINING_ONLY",
    "Dalle",
    "DalleConfig",
    "DalleOutput",
    "ModelOptions",
    "SizeName",
    "config_mapping",
    "read_model_config",
]


class DalleOutput(NamedTuple):
    """Logits of one forward pass."""

    image: Tensor  # (B, N, codebook_size): row k predicts image token k
    text: Tensor | None  # (M, text_vocab_size): predicts `sequence.text_targets`; None without a text head


class SwiGLU(nn.Module):
    """out(silu(gate) * up) (Shazeer 2020); gate and up are one product."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.out = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.out(F.silu(gate) * up)


class BranchDropout(nn.Module):
    """In training, zeros in what a branch adds: single elements, and whole samples (stochastic depth, Huang et al.
    2016)."""

    def __init__(self, dropout: float, drop_path: float) -> None:
        super().__init__()
        self.dropout, self.drop_path = dropout, drop_path

    def forward(self, y: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)"""
        if self.training and self.dropout:
            y = F.dropout(y, self.dropout)
        if self.training and self.drop_path:
            y = y * self.path_scale(y).to(y.dtype)
        return y

    def path_scale(self, y: Tensor) -> Tensor:
        """0 for a dropped sample, 1 / (1 - drop_path) for others: (B, 1, 1) bfloat16"""
        kept = torch.rand(y.shape[0], 1, 1, device=y.device) >= self.drop_path
        return (kept / (1 - self.drop_path)).to(torch.bfloat16)


class Block(nn.Module):
    """x + attention(norm(x)), then x + swiglu(norm(x)); a branch may be dropped for a whole sample."""

    def __init__(self, config: DalleConfig, drop_path: float) -> None:
        super().__init__()
        c = config
        self.attention_norm, self.ffn_norm = RMSNorm(c.dim), RMSNorm(c.dim)
        self.attention = Attention(c.dim, c.num_heads, c.num_kv_heads, c.head_dim, c.attention_dropout)
        self.ffn = SwiGLU(c.dim, c.ffn_dim)
        self.branch = BranchDropout(c.dropout, drop_path)

    def forward(self, x: Tensor, table: Tensor, mask: CausalMask) -> Tensor:
        x = x + self.branch(self.attention(self.attention_norm(x), table, mask))  # (B, L, D)
        return x + self.branch(self.ffn(self.ffn_norm(x)))

    def prefill(self, x: Tensor, table: Tensor, mask: CausalMask, cache: KVCache, layer: int) -> Tensor:
        x = x + self.attention.prefill(self.attention_norm(x), table, mask, cache, layer)
        return x + self.ffn(self.ffn_norm(x))

    def decode(
        self, x: Tensor, table: Tensor, bias: Tensor, cache: KVCache, layer: int, index: int | Tensor
    ) -> Tensor:
        x = x + self.attention.decode(self.attention_norm(x), table, bias, cache, layer, index)
        return x + self.ffn(self.ffn_norm(x))


class Heads(nn.Module):
    """The last norm, and products with the vocabularies that follow. No weights of its own: they may be embeddings."""

    def forward(
        self, x: Tensor, norm: RMSNorm, weights: list[Tensor], text_len: int, text_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """x: (B, T + N, D); weights: of images (V, D), and of text; text_mask: (B, T) bool, None without text.

        -> logits of image tokens (B, N, V), and of text (M, V) where it follows.
        """
        text = None if text_mask is None else F.linear(norm(x[:, :text_len][text_mask]), weights[1])
        return F.linear(norm(x[:, text_len:]), weights[0]), text


class Dalle(nn.Module):
    """p(text, image): logits of text and image tokens, in one pass or one token at a time."""

    def __init__(self, config: DalleConfig) -> None:
        super().__init__()
        self.config = c = config
        self.text_embed = nn.Embedding(c.text_vocab_size, c.text_embed_dim)
        factorised = c.text_embed_dim != c.dim
        self.text_in = nn.Linear(c.text_embed_dim, c.dim, bias=False) if factorised else nn.Identity()
        self.image_embed = nn.Embedding(c.codebook_size, c.dim)
        self.begin_image = nn.Parameter(torch.empty(c.dim))
        rates = [c.stochastic_depth * i / max(1, c.num_layers - 1) for i in range(c.num_layers)]
        self.blocks = nn.ModuleList(Block(c, rate) for rate in rates)
        self.norm, self.heads = RMSNorm(c.dim), Heads()
        if c.text_head:
            self.text_out = nn.Linear(c.dim, c.text_embed_dim, bias=False) if factorised else nn.Identity()
            if not c.tie_text_head:
                self.text_head = nn.Linear(c.text_embed_dim, c.text_vocab_size, bias=False)
        if not c.tie_image_head:
            self.image_head = nn.Linear(c.dim, c.codebook_size, bias=False)
        table = rotary_table(sequence.positions(c.max_text_len, c.grid_size), c.head_dim, c.rope_theta)
        self.register_buffer("rotary", table, persistent=False)
        self.line_encoder = LineEncoder(c.dim, c.line_factor, c.line_width) if c.line_factor else None
        self._init_weights()

    @property
    def hidden_layers(self) -> list[nn.Module]:
        """What lies between embeddings and heads: the matrices that Muon trains."""
        return list(self.blocks)

    def _init_weights(self) -> None:
        """Normal of 0.02; the last product of every branch shrunk by depth (GPT-2); embeddings and heads alike."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = 0.02
                if name.endswith(("attention.out.weight", "ffn.out.weight")):
                    std /= (2 * self.config.num_layers) ** 0.5
                nn.init.normal_(parameter, std=std)
        nn.init.normal_(self.begin_image, std=0.02)

    def forward(
        self,
        text_ids: Tensor,
        image_ids: Tensor,
        drawings: Tensor | None = None,
        has_drawing: Tensor | None = None,
    ) -> DalleOutput:
        """text_ids: (B, T) long, padded on the right, T <= max_text_len; image_ids: (B, N) long.

        drawings: (B, 1, S, S) in [0, 1], and which of them count: (B,) bool, None: all.
        Raises ValueError when T or N does not fit the config, and for drawings where the model takes none.
        """
        if image_ids.shape[1] != self.config.num_image_tokens:
            raise ValueError(
                f"the model samples {self.config.num_image_tokens} image tokens, got {image_ids.shape[1]}"
            )
        lines = None if drawings is None else self.line_features(drawings, has_drawing)
        x, table, mask = self._inputs(text_ids, image_ids[:, :-1], lines)  # (B, L, D)
        for block in self.blocks:
            if self.config.gradient_checkpointing and self.training:
                x = checkpoint(block, x, table, mask, use_reentrant=False, context_fn=checkpoint_contexts)
            else:
                x = block(x, table, mask)
        return self._outputs(x, text_ids)

    def line_features(self, drawings: Tensor, has_drawing: Tensor | None = None) -> Tensor:
        """What is added to image inputs, (B, N, D): zeros where there is no drawing. Raises ValueError."""
        if self.line_encoder is None:
            raise ValueError("this model takes no line drawings")
        features = self.line_encoder(drawings)
        if features.shape[1] != self.config.num_image_tokens:
            raise ValueError(
                f"a drawing of side {drawings.shape[-1]} gives {features.shape[1]} tokens, the model has "
                f"{self.config.num_image_tokens}"
            )
        return features if has_drawing is None else features * has_drawing[:, None, None].to(features.dtype)

    def compile_blocks(self) -> None:
        """Forward passes of the blocks under torch.compile: one compilation for all of them, names stay."""
        for block in self.blocks:
            block.compile(dynamic=False)

    def new_cache(
        self, text_ids: Tensor, lines: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> KVCache:
        """An empty cache for `text_ids` (B, T) and all image tokens; dtype None: that of the weights.

        lines: (B, N, D), features of drawings.
        """
        c = self.config
        visible = sequence.text_mask(text_ids, c.pad_id)
        dtype = dtype or self.image_embed.weight.dtype
        cache = new_cache(c.num_layers, c.num_kv_heads, c.head_dim, visible, c.num_image_tokens, dtype)
        cache.lines = None if lines is None else lines.to(self.image_embed.weight.dtype)
        return cache

    @torch.no_grad()
    def prefill(self, text_ids: Tensor, cache: KVCache, image_ids: Tensor | None = None) -> Tensor:
        """Run the text, and image tokens that are already known (B, n), into an empty cache.

        -> logits (B, V) of image token n, the first unknown one.
        """
        known = text_ids.new_empty(text_ids.shape[0], 0) if image_ids is None else image_ids
        x, table, mask = self._inputs(text_ids, known, cache.lines)
        for layer, block in enumerate(self.blocks):
            x = block.prefill(x, table, mask, cache, layer)
        return self.image_logits(x[:, -1])

    @torch.no_grad()
    def decode_step(self, image_ids: Tensor, position: int | Tensor, cache: KVCache) -> Tensor:
        """image_ids: (B,) long, the token just sampled at image index `position` -> logits (B, V) of the next.

        `position` as an int reads the filled part of the cache alone; as a 0-d long tensor it keeps every shape
        constant, for `torch.compile` and CUDA graphs; as (B,) long each row stands at a position of its own.
        """
        index = position + cache.text_len + 1
        row = position + self.config.max_text_len + 1
        if isinstance(position, int):
            table = self.rotary[:, row : row + 1]  # (2, 1, K)
        else:
            table = self.rotary.index_select(1, row.view(-1))  # (2, 1 or B, K)
            table = table[:, :, None] if position.dim() else table  # (2, B, 1, K)
        x = self.image_embed(image_ids)[:, None]  # (B, 1, D)
        if cache.lines is not None:
            x = x + cache.lines_at(position + 1)
        bias = cache.bias_at(index)
        for layer, block in enumerate(self.blocks):
            x = block.decode(x, table, bias, cache, layer, index)
        return self.image_logits(x[:, -1])

    def _head_weights(self) -> list[Tensor]:
        """Of images, and of text where there is such a head."""
        c = self.config
        weights = [self.image_embed.weight if c.tie_image_head else self.image_head.weight]
        if c.text_head:
            weights.append(self.text_embed.weight if c.tie_text_head else self.text_head.weight)
        return weights

    def image_logits(self, x: Tensor) -> Tensor:
        """Last hidden states (..., D) -> (..., V)"""
        return F.linear(self.norm(x), self._head_weights()[0])

    def _outputs(self, x: Tensor, text_ids: Tensor) -> DalleOutput:
        """Last hidden states (B, T + N, D) -> logits of image tokens, and of text where text follows."""
        text_len, weights, text = text_ids.shape[1], self._head_weights(), None
        mask = sequence.text_target_mask(text_ids, self.config.pad_id) if self.config.text_head else None
        if mask is not None and isinstance(self.text_out, nn.Linear):  # a product between norm and head
            text, mask = F.linear(self.text_out(self.norm(x[:, :text_len][mask])), weights.pop()), None
        image, plain_text = self.heads(x, self.norm, weights, text_len, mask)
        return DalleOutput(image, plain_text if text is None else text)

    def _inputs(
        self, text_ids: Tensor, image_ids: Tensor, lines: Tensor | None = None
    ) -> tuple[Tensor, Tensor, CausalMask]:
        """(B, T), (B, n) and (B, N, D) -> embeddings (B, T + 1 + n, D), rotary table, attention mask"""
        c = self.config
        batch_size, text_len = text_ids.shape
        if text_len > c.max_text_len:
            raise ValueError(f"the model reads {c.max_text_len} text tokens, got {text_len}")
        image = self.image_embed(image_ids)
        begin = self.begin_image.to(image.dtype).expand(batch_size, 1, -1)
        text = self.text_in(self.text_embed(text_ids)).to(image.dtype)
        image = torch.cat([begin, image], 1)  # (B, 1 + n, D)
        if lines is not None:
            image = image + lines[:, : image.shape[1]].to(image.dtype)
        if (
            c.token_dropout and self.training
        ):  # of both: a norm of nearly nothing would have a gradient of thousands
            kept = torch.rand(image_ids.shape, device=image.device) >= c.token_dropout
            image = image * F.pad(kept, (1, 0), value=True)[..., None]
        x = torch.cat([text, image], 1)  # (B, T + 1 + n, D)
        num_image = x.shape[1] - text_len
        rows = sequence.input_rows(text_len, c.max_text_len, num_image)
        table = torch.cat([self.rotary[:, r] for r in rows], 1)  # (2, T + 1 + n, K)
        return x, table, CausalMask(sequence.text_mask(text_ids, c.pad_id), x.shape[1])

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "Dalle":
        """A checkpoint directory of kind generator, a run directory or a hub id; strict. In eval mode, float32."""
        directory = resolve(name)
        model = cls(read_model_config(directory))
        load_weights(model, directory)
        return model.eval()
