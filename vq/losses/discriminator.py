"""Discriminators of stage 1: what tells photographs and reconstructions apart.

PatchGAN judges overlapping patches of an image (Isola et al. 2017, arXiv:1611.07004, section 3.2). With `haar_levels`
0, 3 strided layers and batch norm it is the published NLayerDiscriminator of taming (weights included); the default
looks through one Haar level, which covers the same patch at a quarter of the work.

The projected one judges features of a frozen ImageNet network at several strides (Projected GAN, Sauer et al. 2021,
arXiv:2111.01007), here with small heads at each place instead of random mixing across channels and scales.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from vq.autoencoder import to_bands
from vq.layers import GroupNorm
from vq.losses.imagenet_features import TRAINING_NETWORK, load_imagenet_features

TAPS = (
    2,
    3,
    5,
    7,
)  # of ImageNetFeatures: what the projected discriminator judges, at strides 4, 8, 16 and 32


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Kind and sizes of the discriminator."""

    kind: Literal["patch", "projected"] = "patch"
    """patch: a network of its own on pixels; projected: heads of width `channels` on EfficientNet-Lite0's features,
    which the other sizes do not touch."""
    haar_levels: int = 1
    """Haar levels before the first convolution."""
    channels: int = 64
    """Width of the first layer; it doubles a layer, up to eight times."""
    layers: int = 2
    """Strided convolutions; with the Haar levels they set the patch: 3 in all see 70 pixels."""
    norm: Literal["group", "batch", "none"] = "group"
    """Norm of the inner layers; batch is the published one, and wants large batches."""

    def __post_init__(self) -> None:
        if self.haar_levels < 0 or self.layers < 1 or self.channels % 32:
            raise ValueError(
                f"the discriminator needs haar_levels >= 0, layers >= 1 and channels in steps of 32, not "
                f"{self.haar_levels}, {self.layers}, {self.channels}"
            )

    @property
    def smallest_side(self) -> int:
        """Images smaller than this leave no patch to judge, in pixels."""
        if self.kind == "projected":
            return 64
        return 3 * 2 ** (self.haar_levels + self.layers)


def build_discriminator(config: DiscriminatorConfig) -> nn.Module:
    """Raises FileNotFoundError where the ImageNet network of the projected one is not installed."""
    return (PatchDiscriminator if config.kind == "patch" else ProjectedDiscriminator)(config)


class PatchDiscriminator(nn.Module):
    """(B, 3, S, S) in [-1, 1] -> logits [(B, 1, h, w)], high for real; and the features of each layer."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.haar_levels = config.haar_levels
        widths = [config.channels * min(2**i, 8) for i in range(config.layers + 1)]
        layers = [nn.Conv2d(3 * 4**config.haar_levels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (before, width) in enumerate(pairwise(widths), start=1):
            stride = 2 if i < config.layers else 1
            bias = config.norm == "none"
            layers += [nn.Conv2d(before, width, 4, stride=stride, padding=1, bias=bias)]
            layers += [*_norm(config.norm, width), nn.LeakyReLU(0.2)]
        layers += [nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1)]
        self.main = nn.Sequential(*layers)
        self.apply(_init)

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        x = to_bands(images, self.haar_levels)
        features = []
        for layer in self.main:
            x = layer(x)
            if isinstance(layer, nn.LeakyReLU):
                features.append(x)
        return [x], features


class ProjectedDiscriminator(nn.Module):
    """(B, 3, S, S) in [-1, 1] -> logits (B, 1, S / s, S / s) for strides s of 4, 8, 16 and 32; and what they judge.

    The frozen network is no submodule: it is neither trained nor saved. Gradients reach the images through it.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        network = load_imagenet_features(TRAINING_NETWORK)
        self._frozen = [network]
        self.heads = nn.ModuleList([_head(network.config.widths[tap], config.channels) for tap in TAPS])
        self.heads.apply(_init)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> "ProjectedDiscriminator":
        self._frozen[0]._apply(function, recurse)  # moves with the heads
        return super()._apply(function, recurse)

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        every = self._frozen[0](images)
        features = [every[tap] for tap in TAPS]
        return [head(tap) for head, tap in zip(self.heads, features, strict=True)], features


def _head(c_in: int, channels: int) -> nn.Sequential:
    """Logits at each place of features, from 3 x 3 places."""
    return nn.Sequential(
        nn.GroupNorm(1, c_in, affine=False),
        nn.Conv2d(c_in, channels, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        GroupNorm(32, channels),
        nn.LeakyReLU(0.2),
        nn.Conv2d(channels, 1, 1),
    )


def _norm(kind: str, channels: int) -> list[nn.Module]:
    if kind == "group":
        return [GroupNorm(32, channels)]
    if kind == "batch":
        return [nn.BatchNorm2d(channels)]
    if kind == "none":
        return []
    raise ValueError(f"unknown norm {kind!r}")


def _init(module: nn.Module) -> None:
    """As published: convolutions N(0, 0.02), batch norm N(1, 0.02)."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
