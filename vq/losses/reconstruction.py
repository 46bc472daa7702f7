"""What a reconstruction is compared by: pixels, and the terms of the adversary.

Images are (B, 3, H, W) in [-1, 1]; every loss is a float32 scalar.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PixelLoss = Literal["multiscale_l1", "l1", "l2", "smooth_l1"]
AdversarialLoss = Literal["hinge", "non_saturating"]


@dataclass(frozen=True)
class LossConfig:
    """What the autoencoder minimises, apart from the adversary and the quantizer's own term."""

    pixel: PixelLoss = "multiscale_l1"
    """Distance of pixels; multiscale_l1 adds L1 of the images averaged over 4 and 16 pixels, which holds colours."""
    perceptual: str = "none"
    """none, efficientnet_lite0, lpips, a directory made by vq.train_perceptual, or auto: lpips if its weights are on
    this machine, else efficientnet_lite0 if its package is installed, else runs/perceptual."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual distance."""
    perceptual_side: int = 0
    """Side in pixels of what the perceptual network sees of larger images in training: at even steps the whole image
    shrunk to it, at odd steps a crop, so that a step costs what it costs at that side; 0: the image as it is."""
    foreground_weight: float = 1.0
    """How much more a pixel of the goods counts than one of the background (from {key}.mask.png, else from the
    colour of the border); 1: the same."""

    grid_weight: float = 4.0
    """Weight of the error that repeats from patch to patch, where a perceptual or an adversarial loss is in use."""
    jitter: int = 8
    """The perceptual network and the adversary see each batch shifted by 0 to jitter - 1 pixels either way: a strided
    network that always stands alike on the images is fitted at its own places, not between them; 1: no shift."""

    def __post_init__(self) -> None:
        if self.grid_weight < 0:
            raise ValueError(f"grid_weight must not be negative, not {self.grid_weight}")
        if self.jitter < 1:
            raise ValueError(f"jitter must be at least 1, not {self.jitter}")
        if self.perceptual_side and self.perceptual_side < 32:
            raise ValueError(f"perceptual_side must be 0 or at least 32, not {self.perceptual_side}")
        if self.perceptual_weight <= 0:
            raise ValueError(
                f"perceptual_weight must be above 0, not {self.perceptual_weight}: use perceptual none"
            )
        if self.foreground_weight < 1:
            raise ValueError(f"foreground_weight must be at least 1, not {self.foreground_weight}")


def multiscale_l1(
    reconstruction: Tensor, images: Tensor, weight: Tensor | None = None, scales: tuple[int, ...] = (4, 16)
) -> Tensor:
    """Mean absolute error, plus that of the images averaged over `scales` x `scales` blocks.

    The coarse terms hold the colours of areas, which L1 on pixels alone lets drift towards a median. Blocks larger
    than the image are left out.
    """
    difference = reconstruction.float() - images.float()  # (B, 3, S, S)
    loss = _weighted_mean(difference.abs(), weight)
    for scale in scales:
        if min(images.shape[-2:]) < scale:
            continue
        coarse = None if weight is None else F.avg_pool2d(weight, scale)
        loss = loss + _weighted_mean(F.avg_pool2d(difference, scale).abs(), coarse)
    return loss


def grid_loss(reconstruction: Tensor, images: Tensor, period: int = 8, places: int = 4) -> Tensor:
    """Mean absolute error of what repeats: the difference averaged over `places` x `places` blocks, pixel by pixel.

    A decoder that writes patches can add the same dots to each, which features of strided networks take for texture;
    such dots survive this average and detail does not. Images smaller than period * places have none to average.
    """
    height, width = (side // period * period for side in images.shape[-2:])
    if min(height, width) < period * places:
        return reconstruction.new_zeros(())
    difference = (reconstruction.float() - images.float())[..., :height, :width]
    return F.avg_pool2d(F.pixel_unshuffle(difference, period), places).abs().mean()


def pixel_loss(
    kind: PixelLoss, reconstruction: Tensor, images: Tensor, weight: Tensor | None = None
) -> Tensor:
    """`weight`: (B, 1, H, W) of mean 1, or None for the same everywhere."""
    if kind == "multiscale_l1":
        return multiscale_l1(reconstruction, images, weight)
    difference = reconstruction.float() - images.float()
    if kind == "l1":
        return _weighted_mean(difference.abs(), weight)
    if kind == "l2":
        return _weighted_mean(difference.square(), weight)
    if kind == "smooth_l1":
        zero = torch.zeros_like(difference)
        return _weighted_mean(F.smooth_l1_loss(difference, zero, reduction="none", beta=0.1), weight)
    raise ValueError(f"unknown pixel loss {kind!r}")


def _weighted_mean(values: Tensor, weight: Tensor | None) -> Tensor:
    return values.mean() if weight is None else (values * weight).mean()


def discriminator_loss(kind: AdversarialLoss, real: Tensor, fake: Tensor) -> Tensor:
    """From logits of real and of reconstructed images; taming, `hinge_d_loss` and `vanilla_d_loss`."""
    real, fake = real.float(), fake.float()
    if kind == "hinge":
        return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
    if kind == "non_saturating":
        return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
    raise ValueError(f"unknown adversarial loss {kind!r}")


def generator_loss(kind: AdversarialLoss, fake: Tensor) -> Tensor:
    """From the logits of reconstructed images."""
    if kind == "hinge":
        return -fake.float().mean()
    if kind == "non_saturating":
        return F.softplus(-fake.float()).mean()
    raise ValueError(f"unknown adversarial loss {kind!r}")


def lecam_loss(real: Tensor, fake: Tensor, real_average: float, fake_average: float) -> Tensor:
    """Keeps logits near the running averages of the other side (Tseng et al. 2021, arXiv:2104.03310, equation 6)."""
    real_side = F.relu(real.float() - fake_average).square().mean()
    fake_side = F.relu(real_average - fake.float()).square().mean()
    return real_side + fake_side


def feature_matching_loss(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """Mean over layers of |f_real - f_fake| / mean |f_real| (after Wang et al. 2018, pix2pixHD, equation 4)."""
    terms = []
    for r, f in zip(real, fake, strict=True):
        r = r.detach().float()
        terms.append((f.float() - r).abs().mean() / r.abs().mean().clamp(min=1e-6))
    return torch.stack(terms).mean()


def adaptive_weight(
    outputs: Tensor, last_layer: Tensor, rec_gradient: Tensor, gen_gradient: Tensor, cap: float
) -> Tensor:
    """|d rec / d w| / (|d gen / d w| + 1e-4), at most `cap`, with w the decoder's last layer (taming, equation 7).

    The gradients are those by the reconstruction `outputs`, so that neither loss is run backwards twice.
    """

    def norm(gradient: Tensor) -> Tensor:
        gradient = gradient.to(outputs.dtype)
        (result,) = torch.autograd.grad(outputs, last_layer, gradient, retain_graph=True)
        return result.float().norm()

    return (norm(rec_gradient) / (norm(gen_gradient) + 1e-4)).clamp(max=cap)


def shifted(images: Tensor, jitter: int, smallest: int, key: tuple[int, int]) -> Tensor:
    """(B, C, H, W) -> the same without its margins: `jitter` - 1 pixels less each way, rounded down to multiples of 8.

    The corner follows from `key` alone, so that images and their reconstructions are cut alike. What would be left
    with less than `smallest` pixels stays whole.
    """
    height, width = ((side - jitter + 1) // 8 * 8 for side in images.shape[-2:])
    if jitter == 1 or min(height, width) < smallest:
        return images
    top, left = np.random.Generator(np.random.Philox(key=list(key))).integers(jitter, size=2)
    return images[..., top : top + height, left : left + width]


def shrunk_or_cropped(images: Tensor, side: int, key: tuple[int, int]) -> Tensor:
    """(B, C, S, S) -> (B, C, side, side): averaged where key[1] is even, else a crop whose corner follows from `key`.

    Images of at most `side` pixels, and all with `side` 0, stay as they are.
    """
    if not side or max(images.shape[-2:]) <= side:
        return images
    if key[1] % 2 == 0:
        return F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    rng = np.random.Generator(np.random.Philox(key=list(key)))
    top, left = (int(rng.integers(length - side + 1)) for length in images.shape[-2:])
    return images[..., top : top + side, left : left + side]


def psnr(reconstruction: Tensor, images: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, 3, S, S) in [-1, 1], clamped -> (B,) peak signal-to-noise ratio in dB (peak to peak 2).

    `mask`: (B, 1, S, S) in [0, 1], the pixels that count; None: all.
    """
    error = (reconstruction.float().clamp(-1, 1) - images.float()).square()
    if mask is None:
        error = error.flatten(1).mean(1)
    else:
        error = (error * mask).flatten(1).mean(1) / mask.flatten(1).mean(1).clamp(min=1e-6)
    return 10.0 * (4.0 / error.clamp(min=1e-10)).log10()


def color_shift(reconstruction: Tensor, images: Tensor) -> Tensor:
    """(B, 3, S, S) in [-1, 1] -> (B, 3): difference of channel means, in levels of 0..255."""
    difference = reconstruction.float().clamp(-1, 1) - images.float()
    return difference.mean((2, 3)) * 127.5
