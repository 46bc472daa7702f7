"""Sizes of a base of our own, and the networks of diffusers and transformers that they stand for."""

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the AutoencoderKL."""

    image_size: int = 128
    """Side of the images in pixels."""
    channels: tuple[int, ...] = (32, 32, 128, 192)
    """Widths from the full side down; each after the first halves the side."""
    num_blocks: int = 1
    """Residual blocks a width in the encoder; the decoder has one more."""
    latent_channels: int = 8
    """Numbers at each place of the latent grid."""
    norm_groups: int = 16
    """Groups of the group norms; must divide every width."""
    mid_attention: bool = False
    """Self-attention at the smallest side."""

    def __post_init__(self) -> None:
        _require_groups(self.channels, self.norm_groups)
        if self.image_size % self.downsample_factor:
            raise ValueError(
                f"image_size must be a multiple of {self.downsample_factor}, not {self.image_size}"
            )
        if self.latent_channels < 1 or self.num_blocks < 1:
            raise ValueError("latent_channels and num_blocks must be at least 1")

    @property
    def downsample_factor(self) -> int:
        return 2 ** (len(self.channels) - 1)

    @property
    def latent_size(self) -> int:
        """Side of the latent grid."""
        return self.image_size // self.downsample_factor

    def build(self) -> nn.Module:
        """An AutoencoderKL with random weights; latents are meant to have mean 0 and deviation 1: scaling factor 1."""
        from diffusers import AutoencoderKL

        levels = len(self.channels)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=self.channels,
            layers_per_block=self.num_blocks,
            latent_channels=self.latent_channels,
            norm_num_groups=self.norm_groups,
            sample_size=self.image_size,
            scaling_factor=1.0,
            mid_block_add_attention=self.mid_attention,
        )


@dataclass(frozen=True)
class UnetConfig:
    """Sizes of the UNet2DConditionModel."""

    channels: tuple[int, ...] = (128, 192, 320)
    """Widths from the full latent side down; each after the first halves the side."""
    num_blocks: int = 1
    """Residual blocks a width on the way down; one more on the way up."""
    attention: tuple[bool, ...] = (True, True, True)
    """Which widths have self- and cross-attention."""
    head_dim: int = 64
    """Width of an attention head; must divide every width that has attention."""
    norm_groups: int = 32
    """Groups of the group norms; must divide every width."""

    def __post_init__(self) -> None:
        _require_groups(self.channels, self.norm_groups)
        if len(self.attention) != len(self.channels):
            raise ValueError(
                f"attention must name each of the {len(self.channels)} widths, not {len(self.attention)}"
            )
        for width in self.channels:
            if width % self.head_dim:
                raise ValueError(
                    f"head_dim {self.head_dim} must divide every width, and does not divide {width}"
                )

    def build(self, latents: AutoencoderConfig, text_width: int) -> nn.Module:
        """A UNet2DConditionModel with random weights for the latents of that autoencoder."""
        from diffusers import UNet2DConditionModel

        if latents.latent_size % 2 ** (len(self.channels) - 1):
            raise ValueError(
                f"a latent side of {latents.latent_size} cannot be halved {len(self.channels) - 1} times: give the "
                "UNet fewer widths"
            )
        down = tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in self.attention)
        up = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(self.attention))
        return UNet2DConditionModel(
            sample_size=latents.latent_size,
            in_channels=latents.latent_channels,
            out_channels=latents.latent_channels,
            block_out_channels=self.channels,
            layers_per_block=self.num_blocks,
            down_block_types=down,
            up_block_types=up,
            cross_attention_dim=text_width,
            attention_head_dim=tuple(
                c // self.head_dim for c in self.channels
            ),  # diffusers: the number of heads
            norm_num_groups=self.norm_groups,
        )


@dataclass(frozen=True)
class TextConfig:
    """The BERT text encoder and its vocabulary."""

    vocab: str = ""
    """Folder or hub id of a BERT tokenizer, such as chinese-roberta-wwm-ext."""
    text_len: int = 24
    """Tokens of every padded text, marks included, in training and in inference."""
    dim: int = 256
    """Width: what the UNet's cross-attention reads."""
    num_layers: int = 2
    num_heads: int = 4
    dropout: float = 0.0
    """Dropout of the text encoder while the base is trained."""

    def __post_init__(self) -> None:
        if self.text_len < 3:
            raise ValueError(f"text_len must be at least 3, not {self.text_len}")
        if self.dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} must divide the width {self.dim}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")

    def build(self, tokenizer: Any) -> nn.Module:
        """A BertModel with random weights. Its pooler, which nothing reads, stays frozen: transformers' loader asks
        for its weights."""
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.dim,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            intermediate_size=4 * self.dim,
            max_position_embeddings=max(64, self.text_len),
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
            pad_token_id=tokenizer.pad_token_id,
        )
        encoder = BertModel(config)
        encoder.pooler.requires_grad_(False)
        return encoder

    def load_tokenizer(self) -> Any:
        """A BertTokenizer whose model_max_length is `text_len`. Raises FileNotFoundError or ValueError."""
        from pathlib import Path

        from transformers import BertTokenizer

        if not self.vocab:
            raise ValueError(
                "no vocabulary: name the folder or the hub id of a BERT tokenizer with --text.vocab, such as "
                "hfl/chinese-roberta-wwm-ext"
            )
        path = Path(self.vocab)
        if not path.is_dir() and (self.vocab.startswith((".", "/")) or self.vocab.count("/") != 1):
            raise FileNotFoundError(f"no vocabulary folder {self.vocab}")
        try:
            return BertTokenizer.from_pretrained(self.vocab, model_max_length=self.text_len)
        except (OSError, ValueError, TypeError) as error:
            raise FileNotFoundError(
                f"{self.vocab} holds no BERT vocabulary, or cannot be reached: a folder with vocab.txt will do"
            ) from error


def _require_groups(channels: tuple[int, ...], groups: int) -> None:
    if not channels:
        raise ValueError("channels must name at least one width")
    for width in channels:
        if width % groups:
            raise ValueError(f"norm_groups {groups} must divide every width, and does not divide {width}")
