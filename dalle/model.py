"""The generator: a decoder-only transformer over [text | image] with separate vocabularies.

DALL-E (Ramesh et al. 2021, section 2.2) in the blocks of Llama (Touvron et al. 2023): RMSNorm before each branch,
SwiGLU, no biases, rotary positions, QK-norm. What stands where is `dalle/sequence.py`'s business alone.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.checkpoint import load_weights, read_config, resolve
from common.config import from_mapping
from common.precision import checkpoint_contexts
from dalle import sequence, train_heads, train_native
from dalle.attention import Attention, CausalMask, KVCache, RMSNorm, new_cache, on_eager_cpu, rotary_table
from dalle.cpu_kernels import dropout_mask

KIND = "generator"
TRAINING_ONLY = (
    "dropout",
    "attention_dropout",
    "token_dropout",
    "stochastic_depth",
    "gradient_checkpointing",
)
SizeName = Literal["3m", "8m", "14m", "26m", "50m", "110m", "340m", "760m", "1.4b", "3b"]


@dataclass(frozen=True)
class ModelOptions:
    """Architecture of the generator; the vocabularies and the grid come from the two tokenizers."""

    size: SizeName = "3m"
    """Row of the size table: dim, num_layers and num_heads where they are not given."""
    dim: int | None = None
    """Width; None takes the row's."""
    num_layers: int | None = None
    """Blocks; None takes the row's."""
    num_heads: int | None = None
    """Attention heads; None takes the row's."""
    num_kv_heads: int | None = None
    """Heads of keys and values, a divisor of num_heads; None: as many as num_heads."""
    ffn_multiple: float = 8 / 3
    """Width of SwiGLU over dim, rounded up to a multiple of 64."""
    text_embed_dim: int | None = None
    """Width of the text embedding before it is projected to dim: small for a large vocabulary; None: dim."""
    tie_text_head: bool = True
    """The text head reuses the text embedding."""
    tie_image_head: bool = False
    """The image head reuses the image embedding."""
    rope_theta: float = 1000.0
    """Longest wavelength of the rotary positions over 2 pi, in tokens."""
    dropout: float = 0.0
    """Dropout on the output of every branch."""
    attention_dropout: float = 0.0
    """Dropout on attention weights."""
    token_dropout: float = 0.0
    """Share of image inputs whose embedding is zeroed in training: the text and what is left must do."""
    stochastic_depth: float = 0.0
    """Probability that the last block's branches are skipped for a sample; grows linearly from 0 at the first."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, a third more work."""

    def __post_init__(self) -> None:
        for name in ("dropout", "attention_dropout", "token_dropout", "stochastic_depth"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), not {getattr(self, name)}")
        for name in ("dim", "num_layers", "num_heads", "num_kv_heads", "text_embed_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")

    def config(
        self,
        text_vocab_size: int,
        pad_id: int,
        max_text_len: int,
        codebook_size: int,
        grid_size: int,
        text_head: bool = True,
    ) -> "DalleConfig":
        """The model's own config for these vocabularies."""
        dim, num_layers, num_heads = SIZES[self.size]
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "size"}
        values["dim"] = self.dim or dim
        values["num_layers"] = self.num_layers or num_layers
        values["num_heads"] = self.num_heads or num_heads
        values["num_kv_heads"] = self.num_kv_heads or values["num_heads"]
        values["text_embed_dim"] = self.text_embed_dim or values["dim"]
        return DalleConfig(
            text_vocab_size=text_vocab_size,
            pad_id=pad_id,
            max_text_len=max_text_len,
            codebook_size=codebook_size,
            grid_size=grid_size,
            text_head=text_head,
            **values,
        )


@dataclass(frozen=True)
class DalleConfig:
    """All that builds a `Dalle`; kept in the checkpoint's config.json."""

    text_vocab_size: int
    pad_id: int
    max_text_len: int
    codebook_size: int
    grid_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    text_embed_dim: int
    text_head: bool = True  # False: trained without a text loss
    tie_text_head: bool = True
    tie_image_head: bool = False
    ffn_multiple: float = 8 / 3
    rope_theta: float = 1000.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    token_dropout: float = 0.0
    stochastic_depth: float = 0.0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} does not divide over {self.num_heads} heads")
        if self.head_dim % 4:
            raise ValueError(
                f"dim / num_heads is {self.head_dim}; rotary positions in two axes need a multiple of 4"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} must divide num_heads {self.num_heads}")
        if not 0 <= self.pad_id < self.text_vocab_size:
            raise ValueError(f"pad_id {self.pad_id} is outside the vocabulary of {self.text_vocab_size}")
        if self.max_text_len < 2 or self.grid_size < 1:
            raise ValueError(
                f"max_text_len must be at least 2 and grid_size at least 1, not {self.max_text_len} and "
                f"{self.grid_size}"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def ffn_dim(self) -> int:
        return -(-int(self.dim * self.ffn_multiple) // 64) * 64

    @property
    def num_image_tokens(self) -> int:
        return self.grid_size**2

    @property
    def sequence_len(self) -> int:
        return self.max_text_len + self.num_image_tokens


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


class Block(nn.Module):
    """x + attention(norm(x)), then x + swiglu(norm(x)); a branch may be dropped for a whole sample."""

    def __init__(self, config: DalleConfig, drop_path: float) -> None:
        super().__init__()
        c = config
        self.attention_norm, self.ffn_norm = RMSNorm(c.dim), RMSNorm(c.dim)
        self.attention = Attention(c.dim, c.num_heads, c.num_kv_heads, c.head_dim, c.attention_dropout)
        self.ffn = SwiGLU(c.dim, c.ffn_dim)
        self.dropout, self.drop_path = c.dropout, drop_path

    def forward(self, x: Tensor, table: Tensor, mask: CausalMask) -> Tensor:
        if train_native.takes(self, x):
            return train_native.run_block(self, x, table, mask.key_bias)
        x = x + self._branch(self.attention(self.attention_norm(x), table, mask))
        return x + self._branch(self.ffn(self.ffn_norm(x)))

    def prefill(self, x: Tensor, table: Tensor, mask: CausalMask, cache: KVCache, layer: int) -> Tensor:
        x = x + self.attention.prefill(self.attention_norm(x), table, mask, cache, layer)
        return x + self.ffn(self.ffn_norm(x))

    def decode(
        self, x: Tensor, table: Tensor, bias: Tensor, cache: KVCache, layer: int, index: int | Tensor
    ) -> Tensor:
        x = x + self.attention.decode(self.attention_norm(x), table, bias, cache, layer, index)
        return x + self.ffn(self.ffn_norm(x))

    def _branch(self, y: Tensor) -> Tensor:
        if self.training and self.dropout and not on_eager_cpu(y):
            y = F.dropout(y, self.dropout)
        mask = self.branch_mask(y)
        return y if mask is None else y * mask.to(y.dtype)

    def branch_mask(self, y: Tensor) -> Tensor | None:
        """What a branch's result is multiplied with in training: (B, L, D) or (B, 1, 1) bfloat16, or None.

        Dropout is a part of it on eager CPUs alone.
        """
        mask = None
        if self.training and self.dropout and on_eager_cpu(y):
            mask = dropout_mask(torch.empty_like(y, dtype=torch.bfloat16), self.dropout)
        if self.training and self.drop_path:
            kept = torch.rand(y.shape[0], 1, 1, device=y.device) >= self.drop_path
            scale = (kept / (1 - self.drop_path)).to(torch.bfloat16)
            mask = scale if mask is None else mask * scale
        return mask


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
        self.norm = RMSNorm(c.dim)
        if c.text_head:
            self.text_out = nn.Linear(c.dim, c.text_embed_dim, bias=False) if factorised else nn.Identity()
            if not c.tie_text_head:
                self.text_head = nn.Linear(c.text_embed_dim, c.text_vocab_size, bias=False)
        if not c.tie_image_head:
            self.image_head = nn.Linear(c.dim, c.codebook_size, bias=False)
        table = rotary_table(sequence.positions(c.max_text_len, c.grid_size), c.head_dim, c.rope_theta)
        self.register_buffer("rotary", table, persistent=False)
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

    def forward(self, text_ids: Tensor, image_ids: Tensor) -> DalleOutput:
        """text_ids: (B, T) long, padded on the right, T <= max_text_len; image_ids: (B, N) long.

        Raises ValueError when T or N does not fit the config.
        """
        if image_ids.shape[1] != self.config.num_image_tokens:
            raise ValueError(
                f"the model draws {self.config.num_image_tokens} image tokens, got {image_ids.shape[1]}"
            )
        x, table, mask = self._inputs(text_ids, image_ids[:, :-1])  # (B, L, D)
        for block in self.blocks:
            if self.config.gradient_checkpointing and self.training:
                x = checkpoint(block, x, table, mask, use_reentrant=False, context_fn=checkpoint_contexts)
            else:
                x = block(x, table, mask)
        return self._outputs(x, text_ids)

    def compile_blocks(self) -> None:
        """Forward passes of the blocks under torch.compile: one compilation for all of them, names stay."""
        for block in self.blocks:
            block.compile(dynamic=False)

    def new_cache(self, text_ids: Tensor, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for `text_ids` (B, T) and all image tokens; dtype None: that of the weights."""
        c = self.config
        visible = sequence.text_mask(text_ids, c.pad_id)
        dtype = dtype or self.image_embed.weight.dtype
        return new_cache(c.num_layers, c.num_kv_heads, c.head_dim, visible, c.num_image_tokens, dtype)

    @torch.no_grad()
    def prefill(self, text_ids: Tensor, cache: KVCache, image_ids: Tensor | None = None) -> Tensor:
        """Run the text, and image tokens that are already known (B, n), into an empty cache.

        -> logits (B, V) of image token n, the first unknown one.
        """
        known = text_ids.new_empty(text_ids.shape[0], 0) if image_ids is None else image_ids
        x, table, mask = self._inputs(text_ids, known)
        for layer, block in enumerate(self.blocks):
            x = block.prefill(x, table, mask, cache, layer)
        return self.image_logits(x[:, -1])

    @torch.no_grad()
    def decode_step(self, image_ids: Tensor, position: int | Tensor, cache: KVCache) -> Tensor:
        """image_ids: (B,) long, the token just drawn at image index `position` -> logits (B, V) of the next.

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
        image, plain_text = train_heads.run_both(x, self.norm, weights, text_len, mask)
        return DalleOutput(image, plain_text if text is None else text)

    def _inputs(self, text_ids: Tensor, image_ids: Tensor) -> tuple[Tensor, Tensor, CausalMask]:
        """(B, T) and (B, n) -> embeddings (B, T + 1 + n, D), rotary table, attention mask"""
        c = self.config
        batch_size, text_len = text_ids.shape
        if text_len > c.max_text_len:
            raise ValueError(f"the model reads {c.max_text_len} text tokens, got {text_len}")
        image = self.image_embed(image_ids)
        if c.token_dropout and self.training:
            kept = torch.rand(image.shape[:2], device=image.device) >= c.token_dropout
            image = image * kept[..., None]
        begin = self.begin_image.to(image.dtype).expand(batch_size, 1, -1)
        text = self.text_in(self.text_embed(text_ids)).to(image.dtype)
        x = torch.cat([text, begin, image], 1)  # (B, T + 1 + n, D)
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


def read_model_config(directory: Path) -> DalleConfig:
    """Raises ValueError when the checkpoint is of another kind or its config is damaged."""
    model: dict[str, Any] = read_config(directory, KIND).get("model", {})
    try:
        return from_mapping(DalleConfig, model, where=f"{directory}/config.json")
    except TypeError as error:
        raise ValueError(f"{directory}/config.json is damaged: {error}") from error


# name: (dim, num_layers, num_heads); the names give the size of the blocks, vocabularies come on top
SIZES: dict[str, tuple[int, int, int]] = {
    "3m": (192, 6, 3),
    "8m": (256, 10, 4),
    "14m": (384, 8, 6),
    "26m": (512, 8, 8),
    "50m": (640, 10, 10),
    "110m": (768, 15, 12),
    "340m": (1024, 27, 16),
    "760m": (1536, 27, 16),
    "1.4b": (2048, 28, 16),
    "3b": (2560, 38, 20),
}
