"""PatchGAN: judges overlapping patches of an image (Isola et al. 2017, arXiv:1611.07004, section 3.2).

With `haar_levels` 0, 3 strided layers and batch norm it is the published NLayerDiscriminator of taming (weights
included); the default looks through one Haar level, which covers the same patch at a quarter of the work.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from vq.autoencoder import to_bands
from vq.layers import GroupNorm


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of the discriminator."""

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
        return 3 * 2 ** (self.haar_levels + self.layers)


class PatchDiscriminator(nn.Module):
    """(B, 3, S, S) in [-1, 1] -> logits (B, 1, h, w), high for real; and the features of each layer."""

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

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = to_bands(images, self.haar_levels)
        features = []
        for layer in self.main:
            x = layer(x)
            if isinstance(layer, nn.LeakyReLU):
                features.append(x)
        return x, features


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
