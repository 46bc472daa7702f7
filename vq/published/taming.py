"""The `taming` encoder and decoder: the published VQGAN (Esser et al. 2021, arXiv:2012.09841, appendix A, table 7).

Names and layout are those of CompVis/taming-transformers, so its weights load; LlamaGen's tokenizers (Sun et al. 2024,
arXiv:2406.06525, section 3.1) are the same network under other names. `quant_conv` and `post_quant_conv`, which the
original keeps beside encoder and decoder, are their last and first layer here.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from vq.layers import run_block


@dataclass(frozen=True)
class TamingConfig:
    """Sizes of the taming architecture; the defaults are ImageNet f16."""

    channels: int = 128
    """Width at full resolution (`ch`)."""
    channel_mults: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Width at each resolution, fine to coarse, in units of `channels` (`ch_mult`)."""
    res_blocks: int = 2
    """Residual blocks at each resolution of the encoder; the decoder has one more (`num_res_blocks`)."""
    attention_factors: tuple[int, ...] = (16,)
    """Downsampling factors at which blocks are followed by attention (`resolution` / `attn_resolutions`)."""
    z_channels: int = 256
    """Width between the encoder and quant_conv."""
    dropout: float = 0.0
    """Dropout in residual blocks."""

    def __post_init__(self) -> None:
        if self.channels % 32 or not self.channel_mults or min(self.channel_mults) < 1:
            raise ValueError(
                f"channels must be a multiple of 32 and channel_mults 1 or more, not {self.channels} and "
                f"{self.channel_mults}"
            )
        if self.res_blocks < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"res_blocks must be at least 1 and dropout in [0, 1), not {self}")

    @property
    def downsample_factor(self) -> int:
        return 2 ** (len(self.channel_mults) - 1)

    @property
    def widths(self) -> list[int]:
        """Fine to coarse."""
        return [self.channels * m for m in self.channel_mults]


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, before: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = _norm(before)
        self.conv1 = nn.Conv2d(before, channels, 3, padding=1)
        self.norm2 = _norm(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(before, channels, 1) if before != channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h


class AttnBlock(nn.Module):
    """One head over all positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        h = self.norm(x)
        q, k, v = (
            f(h).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.q, self.k, self.v)
        )  # (B, 1, hw, C)
        h = F.scaled_dot_product_attention(q, k, v)  # scale C ** -0.5
        h = h.squeeze(1).transpose(1, 2).reshape(batch, channels, height, width)
        return x + self.proj_out(h)


class _Mid(nn.Module):
    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom, as published


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    """Blocks of one resolution, each followed by attention where there is any, then a change of resolution or none."""

    def __init__(self, before: int, channels: int, blocks: int, attention: bool, dropout: float) -> None:
        super().__init__()
        widths = [before] + [channels] * blocks
        self.block = nn.ModuleList([ResnetBlock(widths[i], channels, dropout) for i in range(blocks)])
        self.attn = nn.ModuleList([AttnBlock(channels) for _ in range(blocks if attention else 0)])

    def run(self, x: Tensor, checkpointing: bool) -> Tensor:
        for i, block in enumerate(self.block):
            x = run_block(block, x, checkpointing)
            if self.attn:
                x = run_block(self.attn[i], x, checkpointing)
        return x


class TamingEncoder(nn.Module):
    """(B, 3, S, S) in [-1, 1] -> (B, latent_dim, h, w)."""

    checkpointing = False

    def __init__(self, config: TamingConfig, latent_dim: int) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        before = config.channels
        for i, width in enumerate(widths):
            level = _Level(before, width, config.res_blocks, 2**i in config.attention_factors, config.dropout)
            if i + 1 < len(widths):
                level.downsample = _Downsample(width)
            self.down.append(level)
            before = width
        self.mid = _Mid(widths[-1], config.dropout)
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(config.z_channels, latent_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for i, level in enumerate(self.down):
            x = level.run(x, self.checkpointing and self.training)
            if i + 1 < len(self.down):
                x = level.downsample(x)
        x = self.conv_out(F.silu(self.norm_out(self.mid(x))))  # (B, z_channels, h, w)
        return self.quant_conv(x)


class TamingDecoder(nn.Module):
    """(B, latent_dim, h, w) -> (B, 3, S, S), unclamped."""

    checkpointing = False

    def __init__(self, config: TamingConfig, latent_dim: int) -> None:
        super().__init__()
        widths = config.widths
        self.post_quant_conv = nn.Conv2d(latent_dim, config.z_channels, 1)
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = _Mid(widths[-1], config.dropout)
        levels: list[_Level] = []  # coarse to fine
        before = widths[-1]
        for i, width in reversed(list(enumerate(widths))):
            level = _Level(
                before, width, config.res_blocks + 1, 2**i in config.attention_factors, config.dropout
            )
            if i:
                level.upsample = _Upsample(width)
            levels.append(level)
            before = width
        self.up = nn.ModuleList(reversed(levels))  # numbered fine to coarse, as published
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradients balance the adversary (equation 7)."""
        return self.conv_out.weight

    def trunk(self, latents: Tensor) -> Tensor:
        """All but the last convolution."""
        x = self.mid(self.conv_in(self.post_quant_conv(latents)))
        for i in reversed(range(len(self.up))):
            x = self.up[i].run(x, self.checkpointing and self.training)
            if i:
                x = self.up[i].upsample(x)
        return F.silu(self.norm_out(x))  # (B, C0, S, S)

    def forward(self, latents: Tensor) -> Tensor:
        return self.conv_out(self.trunk(latents))  # (B, 3, S, S)
