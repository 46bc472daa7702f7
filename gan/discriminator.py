"""What tells generated images from real ones, and right captions from wrong ones.

A discriminator reads `inputs`, a list of maps that a trunk makes of images. The first are the image's Haar bands, read
by residual blocks that are trained from the start (with the deviation over the batch, StyleGAN2, section 4). With
`features: imagenet` features of a frozen network follow, mixed across channels and scales by fixed random convolutions
(Projected GAN, Sauer et al. 2021, arXiv:2111.01007, section 4): a light head a scale learns what goods look like within
few images, while the bands show what such a network hardly sees, exact colours and dots (both together as in
Vision-aided GAN, Kumari et al. 2022, arXiv:2112.09130). Convolutions are spectrally normalized. Every head ends in a
map of logits that adds a projection on the condition (Miyato and Koyama 2018, arXiv:1802.05637).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from gan.model import SLOPE
from gan.text import TextTower
from vq.autoencoder import to_bands
from vq.losses.imagenet_features import TRAINING_NETWORK, load_imagenet_features

LAST_SIDE = 4  # of the logit maps
MAX_BAND_SCALE = 30.0  # the faintest band is enlarged by so much more than the strongest at most
TAPS = (
    2,
    3,
    5,
    7,
)  # what of ImageNetFeatures is read: 24, 40, 112 and 320 channels at 1/4 ... 1/32 of the side


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The discriminator and what it is trained by."""

    features: Literal["none", "imagenet"] = "none"
    """none: all is learned from the images; imagenet: heads on the frozen features of efficientnet_lite0 too, which
    needs its package."""
    features_size: int = 128
    """Side to which images are resized for the ImageNet features."""
    channels: int = 64
    """Channels of the largest maps of the blocks that read Haar bands; they double at each halving, up to 4 times."""
    haar_levels: int = 1
    """Haar levels before those blocks: 2 is a quarter of the cost of 1, enough beside features."""
    mixed_channels: int = 32
    """Channels of the finest of the mixed features; they double at each coarser scale."""
    condition_dim: int = 64
    """Width of the projection on caption and category."""
    r1_weight: float = 0.0
    """Half of it times the squared gradient of the logits by `inputs` is added every r1_every steps; 0: never."""
    r1_every: int = 16
    """Steps between two R1 terms; each is weighted by this number."""
    mismatch_weight: float = 0.5
    """Weight of real images with captions of others, which count as fake (matching-aware); 0: none."""
    lr: float = 2e-4
    """Peak learning rate of the discriminator; it falls as the generator's does."""

    def __post_init__(self) -> None:
        for name in ("r1_weight", "mismatch_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"discriminator.{name} must not be negative, not {getattr(self, name)}")
        if self.lr <= 0 or self.r1_every < 1:
            raise ValueError(
                f"discriminator.lr must be above 0 and r1_every at least 1, not {self.lr} and {self.r1_every}"
            )
        for name in ("channels", "mixed_channels", "condition_dim"):
            if getattr(self, name) < 8 or getattr(self, name) % 8:
                raise ValueError(f"discriminator.{name} must be a multiple of 8, not {getattr(self, name)}")
        if self.haar_levels not in (1, 2, 3):
            raise ValueError(f"discriminator.haar_levels must be 1, 2 or 3, not {self.haar_levels}")
        if not 64 <= self.features_size <= 512:
            raise ValueError(f"discriminator.features_size must lie in [64, 512], not {self.features_size}")


class Trunk(nn.Module):
    """Images -> the inputs of a discriminator; nothing of it is trained."""

    widths: tuple[int, ...]
    """Channels of each input."""
    sides: tuple[int, ...]
    """Side of each input."""

    def fit_scale(self, images: Tensor) -> None:
        """The scale of Haar bands from real images (B, 3, S, S) in [-1, 1]."""
        raise NotImplementedError

    def fixed_weights(self) -> dict[str, Tensor]:
        """Random or measured ones, which going on with a run needs again."""
        raise NotImplementedError

    def load_fixed_weights(self, weights: dict[str, Tensor]) -> None:
        """What `fixed_weights` gave."""
        raise NotImplementedError


class BandsTrunk(Trunk):
    """Haar bands alone, each of unit variance over real images: the finest are a tenth of the coarsest, and under
    spectral normalization the heads would hardly see dots in them."""

    def __init__(self, img_size: int, haar_levels: int) -> None:
        super().__init__()
        self.haar_levels = haar_levels
        self.widths, self.sides = (3 * 4**haar_levels,), (img_size // 2**haar_levels,)
        self.register_buffer("scale", torch.ones(self.widths[0], 1, 1))

    @torch.no_grad()
    def fit_scale(self, images: Tensor) -> None:
        spread = to_bands(images, self.haar_levels).float().std((0, 2, 3)).view(-1, 1, 1)
        self.scale.copy_(1 / torch.maximum(spread, spread.max().clamp(min=0.01) / MAX_BAND_SCALE))

    def fixed_weights(self) -> dict[str, Tensor]:
        return self.state_dict()

    def load_fixed_weights(self, weights: dict[str, Tensor]) -> None:
        self.scale.copy_(weights["scale"])

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, S, S) in [-1, 1] -> [(B, 3 * 4**levels, S / 2**levels, S / 2**levels)]"""
        return [to_bands(images, self.haar_levels) * self.scale]


class ImageNetTrunk(Trunk):
    """Haar bands, then frozen features, mixed across channels (1x1) and from coarse to fine (3x3) by fixed random
    convolutions."""

    def __init__(self, bands: BandsTrunk, features_size: int, channels: int, seed: int) -> None:
        """Raises FileNotFoundError where the weights' package is not installed."""
        super().__init__()
        self.bands, self.features_size = bands, features_size
        self.network = load_imagenet_features(TRAINING_NETWORK)
        found = [self.network.config.widths[tap] for tap in TAPS]
        widths = [channels * 2**i for i in range(len(TAPS))]
        self.widths = (*bands.widths, *widths)
        self.sides = (*bands.sides, *(-(-features_size // 4 // 2**i) for i in range(len(TAPS))))
        generator = torch.Generator().manual_seed(seed)
        self.across = nn.ModuleList(_fixed(a, b, 1, generator) for a, b in zip(found, widths, strict=True))
        self.down = nn.ModuleList(_fixed(b, a, 3, generator) for a, b in pairwise(widths))
        self.requires_grad_(False)

    def fit_scale(self, images: Tensor) -> None:
        self.bands.fit_scale(images)

    def fixed_weights(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.state_dict().items() if not name.startswith("network.")}

    def load_fixed_weights(self, weights: dict[str, Tensor]) -> None:
        for name, tensor in self.fixed_weights().items():
            tensor.copy_(weights[name])

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, S, S) in [-1, 1] -> bands, then maps (B, C_l, s_l, s_l), fine to coarse."""
        size, bands = self.features_size, self.bands(images)
        if images.shape[-1] != size:
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=images.shape[-1] > size)
        features = self.network(images)
        mixed = [conv(features[tap]) for tap, conv in zip(TAPS, self.across, strict=True)]
        for i in reversed(range(len(mixed) - 1)):
            above = F.interpolate(mixed[i + 1], mixed[i].shape[-2:], mode="bilinear", align_corners=False)
            mixed[i] = (mixed[i] + self.down[i](above)) * 0.5**0.5
        return bands + mixed


def _fixed(c_in: int, c_out: int, kernel_size: int, generator: torch.Generator) -> nn.Conv2d:
    """A random convolution that keeps the variance."""
    conv = nn.Conv2d(c_in, c_out, kernel_size, padding=kernel_size // 2, bias=False)
    std = (c_in * kernel_size**2) ** -0.5
    conv.weight.data = torch.randn(conv.weight.shape, generator=generator) * std
    return conv


def make_trunk(config: DiscriminatorConfig, img_size: int, seed: int) -> Trunk:
    """The trunk of `config.features`."""
    bands = BandsTrunk(img_size, config.haar_levels)
    if config.features == "none":
        return bands
    if config.features == "imagenet":
        return ImageNetTrunk(bands, config.features_size, config.mixed_channels, seed)
    raise ValueError(f"unknown features {config.features!r}")


class LogitHead(nn.Module):
    """Maps -> logits with and without a condition."""

    def __init__(self, c_in: int, condition_dim: int) -> None:
        super().__init__()
        self.own = spectral_norm(nn.Conv2d(c_in, 1, 1))
        self.condition = spectral_norm(nn.Conv2d(c_in, condition_dim, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, s, s) -> logits (B, P) float32 and what the condition is multiplied with (B, P, D), P = s * s"""
        return self.own(x).float().flatten(1), self.condition(x).float().flatten(2).transpose(1, 2)


class FeatureHead(nn.Module):
    """Logits of one scale of frozen features: strided convolutions down to 4 x 4, and how far samples differ there:
    without that all images became one within a hundred steps."""

    def __init__(self, c_in: int, side: int, condition_dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = c_in
        while side > LAST_SIDE:
            out = min(2 * width, 256)
            layers += [
                spectral_norm(nn.Conv2d(width, out, 4, 2, 1)),
                nn.GroupNorm(8, out),
                nn.LeakyReLU(SLOPE),
            ]
            width, side = out, -(-side // 2)
        self.layers = nn.Sequential(*layers)
        self.last = nn.Sequential(
            spectral_norm(nn.Conv2d(width + 1, width, 3, padding=1)),
            nn.GroupNorm(8, width),
            nn.LeakyReLU(SLOPE),
        )
        self.logits = LogitHead(width, condition_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.logits(self.last(with_deviation(self.layers(x))))


class DownBlock(nn.Module):
    """Residual: two convolutions and a halving, beside a 1x1 convolution and a halving."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.first = spectral_norm(nn.Conv2d(c_in, c_in, 3, padding=1))
        self.second = spectral_norm(nn.Conv2d(c_in, c_out, 3, padding=1))
        self.skip = spectral_norm(nn.Conv2d(c_in, c_out, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, s, s) -> (B, c_out, s/2, s/2)"""
        y = F.leaky_relu(self.first(x), SLOPE)
        y = F.leaky_relu(F.avg_pool2d(self.second(y), 2), SLOPE)
        return (y + self.skip(F.avg_pool2d(x, 2))) * 0.5**0.5


class ImageHead(nn.Module):
    """Logits of Haar bands, all learned."""

    def __init__(self, c_in: int, side: int, channels: int, condition_dim: int) -> None:
        super().__init__()
        self.stem = spectral_norm(nn.Conv2d(c_in, channels, 3, padding=1))
        blocks, width = [], channels
        while side > LAST_SIDE:
            out = min(2 * width, 4 * channels)
            blocks.append(DownBlock(width, out))
            width, side = out, side // 2
        self.blocks = nn.Sequential(*blocks)
        self.last = spectral_norm(nn.Conv2d(width + 1, width, 3, padding=1))
        self.logits = LogitHead(width, condition_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.blocks(F.leaky_relu(self.stem(x), SLOPE))
        return self.logits(F.leaky_relu(self.last(with_deviation(x)), SLOPE))


def with_deviation(x: Tensor, group: int = 4) -> Tensor:
    """(B, C, s, s) -> (B, C + 1, s, s): a map with the mean deviation over `group` samples (Karras et al. 2018,
    arXiv:1710.10196, section 3); groups are of neighbours, as many as the batch allows."""
    size = next(n for n in range(min(group, len(x)), 0, -1) if len(x) % n == 0)
    y = x.float().view(-1, size, *x.shape[1:])  # (G, n, C, s, s)
    deviation = (y.var(1, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))  # (G,)
    rows = deviation.repeat_interleave(size).view(-1, 1, 1, 1)
    return torch.cat([x, rows.expand(-1, 1, *x.shape[2:]).to(x.dtype)], dim=1)


class Logits(NamedTuple):
    """Each (B, P), high for real."""

    real: Tensor
    fake: Tensor
    mismatched: Tensor
    """Of real images with captions and categories of others."""


class Discriminator(nn.Module):
    """Heads over the inputs of a trunk, and the text tower where it is trained along."""

    def __init__(self, config: DiscriminatorConfig, trunk: Trunk, text: TextTower, num_labels: int) -> None:
        super().__init__()
        self.text = text
        width = config.condition_dim
        inputs = list(zip(trunk.widths, trunk.sides, strict=True))
        heads: list[nn.Module] = [ImageHead(*inputs[0], config.channels, width)]
        heads += [FeatureHead(c, side, width) for c, side in inputs[1:]]
        self.heads = nn.ModuleList(heads)
        self.null_text = nn.Parameter(torch.zeros(text.embed_dim))
        self.register_buffer("text_mean", torch.zeros(text.embed_dim))  # of the captions' vectors
        self.condition = nn.Linear(text.embed_dim, width * len(heads))
        self.labels = nn.Embedding(num_labels + 1, width * len(heads)) if num_labels else None
        if self.labels:
            nn.init.normal_(self.labels.weight, std=0.1)

    def forward(
        self,
        real: Sequence[Tensor],
        fake: Sequence[Tensor],
        text_ids: Tensor,
        labels: Tensor,
        has_text: Tensor,
        others: Tensor,
    ) -> Logits:
        """Inputs of B real and B generated images, their captions (B, T), categories (B,), and for each sample the
        place `others` (B,) of one with another condition."""
        condition = self.embed(self.text(text_ids), labels, has_text)  # (B, K, D)
        size = len(labels)
        maps = self.maps([torch.cat([r, f]) for r, f in zip(real, fake, strict=True)])
        halves = [((own[:size], q[:size]), (own[size:], q[size:])) for own, q in maps]
        reals, fakes = [h[0] for h in halves], [h[1] for h in halves]
        return Logits(
            conditioned(reals, condition),
            conditioned(fakes, condition),
            conditioned(reals, condition[others]),
        )

    def score(self, inputs: Sequence[Tensor], condition: Tensor) -> Tensor:
        """Logits (B, P) of inputs under `condition` (B, K, D), which `embed` gives."""
        return conditioned(self.maps(inputs), condition)

    def maps(self, inputs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Of each head: logits (B, P_k), and what the condition is multiplied with (B, P_k, D)."""
        return [head(x) for head, x in zip(self.heads, inputs, strict=True)]

    def embed(self, text: Tensor, labels: Tensor, has_text: Tensor) -> Tensor:
        """Text vectors (B, W), categories (B,) -> (B, K, D) of about unit variance, K heads."""
        text = torch.where(has_text[:, None], text - self.text_mean, self.null_text)
        found = self.condition(text).float()
        if self.labels is not None:
            found = found + self.labels(labels)
        return found.view(len(text), len(self.heads), -1)


def conditioned(maps: Sequence[tuple[Tensor, Tensor]], condition: Tensor) -> Tensor:
    """Logits (B, P) of all heads: own ones and the projection on the condition (B, K, D)."""
    scale = condition.shape[-1] ** -0.5
    parts = [own + (q @ condition[:, k, :, None]).squeeze(-1) * scale for k, (own, q) in enumerate(maps)]
    return torch.cat(parts, dim=1)


def others_of(conditions: Sequence[object]) -> tuple[Tensor, Tensor]:
    """For each sample the next one with another condition, and whether there is one: (B,) long, (B,) bool."""
    size = len(conditions)
    found = [
        next((j % size for j in range(i + 1, i + size) if conditions[j % size] != conditions[i]), i)
        for i in range(size)
    ]
    return torch.tensor(found), torch.tensor([j != i for i, j in enumerate(found)])


def r1_penalty(logits: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Mean over samples of the squared gradient of their summed logits by their inputs (Mescheder et al. 2018,
    arXiv:1801.04406, equation 9). `logits` (B, P) must come from `inputs` in float32."""
    gradients = torch.autograd.grad(logits.mean(1).sum(), list(inputs), create_graph=True)
    return torch.stack([g.square().sum((1, 2, 3)) for g in gradients]).sum(0).mean()
