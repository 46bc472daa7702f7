"""What builds a generator: the options of its architecture, its config, and the table of sizes."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.checkpoint import read_config
from common.config import from_mapping, to_mapping
from dalle.lines import require_line_config

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
    line_factor: int = 0  # pixels of a line drawing a token; 0: the model takes no drawings
    line_width: int = 128  # channels of the encoder of drawings

    def __post_init__(self) -> None:
        if self.line_factor:
            require_line_config(self.line_factor, self.line_width)
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
    def line_size(self) -> int:
        """Side in pixels of the line drawings that the model takes; 0: it takes none."""
        return self.grid_size * self.line_factor


def config_mapping(config: DalleConfig) -> dict[str, Any]:
    """JSON-ready, for config.json; without a word of drawings for a model that takes none."""
    values = to_mapping(config)
    if not config.line_factor:
        del values["line_factor"], values["line_width"]
    return values


def read_model_config(directory: Path) -> DalleConfig:
    """Raises ValueError when the checkpoint is of another kind or its config is damaged."""
    return from_mapping(DalleConfig, read_config(directory, KIND)["model"], where=f"{directory}/config.json")


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
