"""The `fast` encoder and decoder: a Haar patch in, depth at low resolution, a Haar patch out.

Most of the work of the taming VQGAN (Esser et al. 2021, arXiv:2012.09841, section 3.1) is convolution at full
resolution. Two levels of an orthonormal Haar transform turn (3, S, S) into (48, S/4, S/4) without loss, as in
Cosmos-Tokenizer (arXiv:2501.03575); residual blocks work from there down to the latent grid. The last convolution is
followed by the exact inverse transform, so neighbouring pixels of a patch come from orthogonal bands.
"""

import contextlib
import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vq.layers import GroupNorm, attend, run_block


@dataclass(frozen=True)
class FastConfig:
    """Sizes of the fast architecture."""

    haar_levels: int = 2
    """Levels of the Haar transform before the first and after the last convolution (each halves the side)."""
    channels: tuple[int, ...] = (128, 256)
    """Width at each resolution, fine to coarse; the first stands at side S / 2**haar_levels."""
    encoder_blocks: tuple[int, ...] = (1, 2)
    """Residual blocks at each resolution of the encoder."""
    decoder_blocks: tuple[int, ...] = (3, 3)
    """Residual blocks at each resolution of the decoder, fine to coarse."""
    attention: bool = True
    """One self-attention block at the latent grid of each half."""

    def __post_init__(self) -> None:
        if self.haar_levels < 0:
            raise ValueError(f"haar_levels must not be negative, not {self.haar_levels}")
        if not len(self.channels) == len(self.encoder_blocks) == len(self.decoder_blocks):
            raise ValueError("channels, encoder_blocks and decoder_blocks must have one entry a resolution")
        if any(c % 32 for c in self.channels):
            raise ValueError(f"channels must be multiples of 32, not {self.channels}")

    @property
    def downsample_factor(self) -> int:
        return 2 ** (self.haar_levels + len(self.channels) - 1)


def haar(x: Tensor) -> Tensor:
    """One level of the 2-D orthonormal Haar transform: (B, C, H, W) -> (B, 4C, H/2, W/2), bands LL, LH, HL, HH."""
    a, b = x[..., 0::2, 0::2], x[..., 0::2, 1::2]
    c, d = x[..., 1::2, 0::2], x[..., 1::2, 1::2]
    return torch.cat([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], dim=1) * 0.5


@functools.cache
@torch.inference_mode(False)  # it is kept: made while sampling, it must serve training too
def haar_matrix(channels: int, levels: int, device: torch.device) -> Tensor:
    """(n, n) orthonormal, n = channels * 4**levels: a patch of pixels (row, column, channel) -> its bands."""
    side = 2**levels
    size = channels * side**2
    patches = torch.eye(size, device=device).view(size, side, side, channels).permute(0, 3, 1, 2)
    for _ in range(levels):
        patches = haar(patches)
    return patches.flatten(1)


def coarse_bands(levels: int, channels: int = 3) -> Tensor:
    """Bands of `to_bands(x, levels)` that see the 2x2 means of x alone: twice `to_bands(means, levels - 1)`, in order.

    Each level transforms all bands of the one before, so a band's index is (..., band of level 2, band of level 1,
    channel), and the means are band 0 of level 1.
    """
    return torch.arange(channels * 4**levels).view(-1, 4, channels)[:, 0].flatten()


def to_bands(images: Tensor, levels: int) -> Tensor:
    """(B, C, H, W) -> (B, C * 4**levels, H / 2**levels, W / 2**levels) float32: all levels of `haar` in one product."""
    if levels == 0:
        return images.float()
    batch, channels, height, width = images.shape
    side = 2**levels
    rows = (
        images.float().permute(0, 2, 3, 1).reshape(batch, height // side, side, width // side, side, channels)
    )
    rows = rows.transpose(2, 3).reshape(batch, height // side, width // side, -1)  # (B, h, w, n)
    with _float32(images.device):
        bands = rows @ haar_matrix(channels, levels, images.device)
    return bands.permute(0, 3, 1, 2)


def from_bands(bands: Tensor, levels: int) -> Tensor:
    """(B, C * 4**levels, h, w) -> (B, C, h * 2**levels, w * 2**levels) float32: the exact inverse of `to_bands`."""
    if levels == 0:
        return bands.float()
    batch, size, height, width = bands.shape
    side = 2**levels
    channels = size // side**2
    with _float32(bands.device):
        rows = bands.float().permute(0, 2, 3, 1) @ haar_matrix(channels, levels, bands.device).t()
    pixels = rows.view(batch, height, width, side, side, channels).transpose(2, 3)  # (B, h, P, w, P, C)
    return pixels.reshape(batch, height * side, width * side, channels).permute(0, 3, 1, 2)


def _float32(device: torch.device) -> contextlib.AbstractContextManager:
    """Without autocast; meta tensors, which only have shapes, know none."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


class ResBlock(nn.Module):
    """x + conv(silu(conv(silu(norm x)))): one norm a block, since at these widths norms cost as much as kernels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(32, channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


class AttentionBlock(nn.Module):
    """Self-attention over the grid with heads of width 64, residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.num_heads = channels // 64 or 1
        self.norm = GroupNorm(32, channels, eps=1e-6)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # (B, hw, 3C)
        q, k, v = (t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=2))
        out = attend(q, k, v)  # (B, H, hw, K)
        out = out.transpose(1, 2).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        return x + self.out(out)


class Encoder(nn.Module):
    """(B, 3, S, S) in [-1, 1] -> (B, latent_dim, h, w)."""

    checkpointing = False

    def __init__(self, config: FastConfig, latent_dim: int) -> None:
        super().__init__()
        self.haar_levels = config.haar_levels
        widths = config.channels
        self.conv_in = nn.Conv2d(3 * 4**config.haar_levels, widths[0], 3, padding=1)
        layers: list[nn.Module] = []
        for level, (width, blocks) in enumerate(zip(widths, config.encoder_blocks, strict=True)):
            if level:
                layers.append(nn.Conv2d(widths[level - 1], width, 4, stride=2, padding=1))
            layers += [ResBlock(width) for _ in range(blocks)]
        if config.attention:
            layers.append(AttentionBlock(widths[-1]))
        self.body = nn.Sequential(*layers)
        self.norm_out = GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], latent_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(to_bands(images, self.haar_levels))  # (B, C0, S/4, S/4)
        for block in self.body:
            x = run_block(block, x, self.checkpointing and self.training)  # ends at (B, C, h, w)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, latent_dim, h, w)


class Decoder(nn.Module):
    """(B, latent_dim, h, w) -> (B, 3, S, S), unclamped."""

    checkpointing = False

    def __init__(self, config: FastConfig, latent_dim: int) -> None:
        super().__init__()
        self.haar_levels = config.haar_levels
        widths = config.channels
        self.conv_in = nn.Conv2d(latent_dim, widths[-1], 3, padding=1)
        layers: list[nn.Module] = [AttentionBlock(widths[-1])] if config.attention else []
        for level in reversed(range(len(widths))):
            layers += [ResBlock(widths[level]) for _ in range(config.decoder_blocks[level])]
            if level:
                layers += [nn.Conv2d(widths[level], 4 * widths[level - 1], 3, padding=1), nn.PixelShuffle(2)]
        self.body = nn.Sequential(*layers)
        self.norm_out = GroupNorm(32, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3 * 4**config.haar_levels, 3, padding=1)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradients balance the adversary (taming, equation 7)."""
        return self.conv_out.weight

    def trunk(self, latents: Tensor) -> Tensor:
        """All but the last convolution."""
        x = self.conv_in(latents)
        for block in self.body:
            x = run_block(block, x, self.checkpointing and self.training)
        return F.silu(self.norm_out(x))  # (B, C0, S/4, S/4)

    def forward(self, latents: Tensor) -> Tensor:
        # Float32 from the bands on: a step of bf16 at the mean of a white patch is a grey level of the image.
        bands = self.conv_out(self.trunk(latents))  # (B, 48, S/4, S/4)
        return from_bands(bands, self.haar_levels)  # (B, 3, S, S)
