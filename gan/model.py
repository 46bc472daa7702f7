"""The generator: noise, a caption and a category to an image in one forward pass.

A style-based generator (Karras et al. 2020, StyleGAN2, arXiv:1912.04958) cut down for CPUs. Styles scale the input of
a convolution and its output is demodulated, which equals modulated weights (equation 3 there) without a kernel a
sample. The caption enters the mapping network and once more every style, as in StyleGAN-T (Sauer et al. 2023,
arXiv:2301.09515, section 3.1). Convolutions stop at half the image's side: each resolution adds Haar bands of the next
one (SWAGAN, Gal et al. 2021, arXiv:2102.06108). The smallest maps are made of noise and caption, as in FastGAN (Liu et
al. 2021, arXiv:2101.04775), half of their variance always of noise: from StyleGAN's learned constant, or by layers that
may learn one, all images became one within a thousand steps on ten thousand images. There is no noise beside z: an
image is a function of z, caption and category.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vq.autoencoder import from_bands

KIND = "gan"
FIRST_SIDE = 4  # of the smallest maps
MEAN_SAMPLES = 64  # latents whose mean style is the centre of truncation
SLOPE, GAIN = 0.2, 2**0.5  # of the leaky ReLU, and what keeps the variance behind it


@dataclass(frozen=True)
class GeneratorConfig:
    """Sizes of the generator."""

    img_size: int = 64
    """Side of the images in pixels: a power of two from 32 to 512."""
    z_dim: int = 128
    """Length of the noise vector."""
    style_dim: int = 256
    """Width of the styles."""
    max_channels: int = 256
    """Channels of the smallest maps."""
    channels: int = 64
    """Channels of the largest maps, half the image's side; they double at each halving, up to max_channels."""
    first_map: Literal["noise", "constant"] = "noise"
    """What the 4 x 4 maps are: of noise and caption in equal shares, or learned numbers, the same in all images."""

    def __post_init__(self) -> None:
        if self.img_size not in (32, 64, 128, 256, 512):
            raise ValueError(f"img_size must be 32, 64, 128, 256 or 512, not {self.img_size}")
        for name in ("z_dim", "style_dim", "max_channels", "channels"):
            if getattr(self, name) < 8:
                raise ValueError(f"{name} must be at least 8, not {getattr(self, name)}")
        if self.first_map not in ("noise", "constant"):
            raise ValueError(f"first_map must be noise or constant, not {self.first_map!r}")
        if self.channels > self.max_channels:
            raise ValueError(f"channels {self.channels} must not exceed max_channels {self.max_channels}")

    @property
    def sides(self) -> tuple[int, ...]:
        """4, 8, ... img_size / 2: the maps of the generator."""
        count = (self.img_size // 2 // FIRST_SIDE).bit_length()
        return tuple(FIRST_SIDE * 2**i for i in range(count))

    def width(self, side: int) -> int:
        """Channels of the maps of that side."""
        return min(self.max_channels, self.channels * (self.img_size // 2 // side))


class ScaledLinear(nn.Module):
    """Weights of unit variance, scaled when they are used: so Adam moves all layers by like shares (equalized learning
    rate, Karras et al. 2018, arXiv:1710.10196, section 4.1)."""

    def __init__(self, c_in: int, c_out: int, bias: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in))
        self.bias = nn.Parameter(torch.full((c_out,), bias))

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in) -> (B, c_out)"""
        return F.linear(x, self.weight * self.weight.shape[1] ** -0.5, self.bias)


class FirstMap(nn.Module):
    """Noise and condition -> the smallest maps, each number of unit variance, half of it of the noise: rows of unit
    length and no bias leave nothing that all images share."""

    def __init__(self, z_dim: int, condition_dim: int, channels: int) -> None:
        super().__init__()
        count = channels * FIRST_SIDE**2
        self.of_noise = nn.Parameter(torch.randn(count, z_dim))
        self.of_condition = nn.Parameter(torch.randn(count, condition_dim))

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        """z (B, Z) of unit variance, condition (B, D) of unit mean square -> (B, C, 4, 4)"""
        noise = F.linear(z, F.normalize(self.of_noise, dim=1))
        found = (noise + F.linear(condition, F.normalize(self.of_condition, dim=1))) * 0.5**0.5
        return found.unflatten(1, (-1, FIRST_SIDE, FIRST_SIDE))


class StyleConv(nn.Module):
    """Convolution whose input channels are scaled by a style, its output demodulated to unit variance."""

    def __init__(self, c_in: int, c_out: int, style_dim: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.affine = ScaledLinear(style_dim, c_in, bias=1.0)
        self.weight = nn.Parameter(torch.randn(c_out, c_in, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(c_out))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """x (B, c_in, s, s), style (B, D) -> (B, c_out, s, s)"""
        scale = self.affine(style).float()  # (B, c_in)
        weight = self.weight * self.weight[0].numel() ** -0.5
        power = weight.float().square().sum((2, 3))  # (c_out, c_in)
        demodulation = (scale.square() @ power.t() + 1e-8).rsqrt()  # (B, c_out)
        x = F.conv2d(x * scale[:, :, None, None].to(x.dtype), weight, padding=weight.shape[-1] // 2)
        x = x * demodulation[:, :, None, None].to(x.dtype) + self.bias[:, None, None].to(x.dtype)
        return F.leaky_relu(x, SLOPE) * GAIN


class ToBands(nn.Module):
    """Maps -> Haar bands of RGB images of twice their side."""

    def __init__(self, c_in: int, style_dim: int) -> None:
        super().__init__()
        self.affine = ScaledLinear(style_dim, c_in, bias=1.0)
        # Bands LL, LH, HL, HH of three colours each: the first starts soft, detail at nothing: no image starts as dots.
        start = torch.tensor([0.3, 0.0, 0.0, 0.0]).repeat_interleave(3)
        self.weight = nn.Parameter(torch.randn(12, c_in, 1, 1) * start.view(-1, 1, 1, 1))
        self.bias = nn.Parameter(torch.zeros(12))
        self.register_buffer(
            "gains", torch.tensor([0.5, 0.1, 0.1, 0.1]).repeat_interleave(3), persistent=False
        )

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """(B, C, s, s) -> (B, 3, 2s, 2s) float32"""
        scale = self.affine(style)[:, :, None, None].to(x.dtype)
        weight = self.weight * (self.gains.view(-1, 1, 1, 1) * self.weight.shape[1] ** -0.5)
        return from_bands(F.conv2d(x * scale, weight, self.bias), 1)


class SynthesisBlock(nn.Module):
    """Doubles the side (but for the first block): convolution, enlargement, convolution."""

    def __init__(self, c_in: int, c_out: int, style_dim: int, enlarges: bool) -> None:
        super().__init__()
        self.first = StyleConv(c_in, c_out, style_dim) if enlarges else None
        self.second = StyleConv(c_out, c_out, style_dim)
        self.to_bands = ToBands(c_out, style_dim)

    def forward(self, x: Tensor, style: Tensor) -> tuple[Tensor, Tensor]:
        """-> maps (B, c_out, s, s) and their part of the image (B, 3, 2s, 2s)"""
        if self.first:
            x = enlarge(self.first(x, style))
        x = self.second(x, style)
        return x, self.to_bands(x, style)


def enlarge(x: Tensor) -> Tensor:
    """(B, C, s, s) -> (B, C, 2s, 2s), bilinear."""
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


class Mapping(nn.Module):
    """z, caption and category -> style."""

    def __init__(self, config: GeneratorConfig, condition_dim: int) -> None:
        super().__init__()
        width = config.style_dim
        self.condition = ScaledLinear(condition_dim, width)
        self.layers = nn.ModuleList([ScaledLinear(config.z_dim + width, width), ScaledLinear(width, width)])

    def forward(self, z: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, z_dim), condition (B, C) -> style part of both (B, D), style part of the condition alone (B, D)"""
        c = unit(self.condition(condition))  # (B, D)
        w = torch.cat([unit(z), c], dim=1)
        for layer in self.layers:
            w = F.leaky_relu(layer(w), SLOPE) * GAIN
        return w, c


def unit(x: Tensor) -> Tensor:
    """Rows scaled to a mean square of 1."""
    return x.float() * (x.float().square().mean(1, keepdim=True) + 1e-8).rsqrt()


class Generator(nn.Module):
    """`generator(z, text, labels)` -> images. `text`: vectors of a TextTower; `labels`: 0 is no category."""

    def __init__(self, config: GeneratorConfig, text_dim: int, num_labels: int = 0) -> None:
        super().__init__()
        self.config, self.num_labels = config, num_labels
        self.null_text = nn.Parameter(torch.zeros(text_dim))  # stands for a caption that is not there
        self.label_embedding = nn.Embedding(num_labels + 1, 64) if num_labels else None
        self.mapping = Mapping(config, text_dim + (64 if num_labels else 0))
        first = config.width(FIRST_SIDE)
        if config.first_map == "noise":
            self.first = FirstMap(config.z_dim, config.style_dim, first)
            # of the captions' vectors: what they share would be the largest part of every condition
            self.register_buffer("text_mean", torch.zeros(text_dim))
        else:
            self.constant = nn.Parameter(torch.randn(first, FIRST_SIDE, FIRST_SIDE))
        widths = [first, *(config.width(side) for side in config.sides)]
        self.blocks = nn.ModuleList(
            SynthesisBlock(widths[i], widths[i + 1], 2 * config.style_dim, enlarges=i > 0)
            for i in range(len(config.sides))
        )

    def forward(self, z: Tensor, text: Tensor, labels: Tensor, has_text: Tensor) -> Tensor:
        """z (B, Z), text (B, D), labels (B,) long, has_text (B,) bool -> (B, 3, S, S) float32, about [-1, 1]."""
        w, c = self.mapping(z, self.condition(text, labels, has_text))
        return self.synthesis(torch.cat([w, c, z], dim=1))

    def condition(self, text: Tensor, labels: Tensor, has_text: Tensor) -> Tensor:
        """(B, D) or (B, D + 64)"""
        if self.config.first_map == "noise":
            text = text - self.text_mean
        text = torch.where(has_text[:, None], text, self.null_text)
        if self.label_embedding is None:
            return text
        return torch.cat([text, self.label_embedding(labels)], dim=1)

    def truncated(self, z: Tensor, condition: Tensor, psi: float) -> Tensor:
        """What `synthesis` takes, at `psi` of the way from the mean of each condition to that of its z.

        StyleGAN-T's truncation: towards the centre of the caption, not of everything.
        """
        w, c = self.mapping(z, condition)
        if psi == 1:
            return torch.cat([w, c, z], dim=1)
        generator = torch.Generator().manual_seed(0)
        many = torch.randn(MEAN_SAMPLES, self.config.z_dim, generator=generator).to(z.device)
        rows = [self.mapping(many, row.expand(MEAN_SAMPLES, -1))[0].mean(0) for row in condition]
        return torch.cat([torch.lerp(torch.stack(rows), w, psi), c, psi * z], dim=1)

    def synthesis(self, latents: Tensor) -> Tensor:
        """Styles of noise and condition together and of the condition alone, and the noise itself (B, 2D + Z)
        -> (B, 3, S, S) float32 in [-1.1, 1.1]"""
        width = self.config.style_dim
        style, c, z = latents[:, : 2 * width], latents[:, width : 2 * width], latents[:, 2 * width :]
        starts_from_noise = self.config.first_map == "noise"
        x = self.first(z, c) if starts_from_noise else self.constant.expand(len(style), -1, -1, -1)
        x = x.contiguous(memory_format=torch.channels_last)
        image = None
        for block in self.blocks:
            x, part = block(x, style)
            image = part if image is None else enlarge(image) + part
        return bounded(image)


def bounded(x: Tensor) -> Tensor:
    """Into [-1.1, 1.1]: pixels far outside would drift, and from the flat ends of a tanh they would never come back. A
    little room is left for pure black and white."""
    return 1.1 * x * (1 + x.square()).rsqrt()
