"""The discriminator's loss over right and wrong captions, and the generator's against images of one caption that are
alike; the terms of a pair: vq.losses.reconstruction."""

import torch.nn.functional as F
from torch import Tensor

from gan.discriminator import Logits
from vq.losses.reconstruction import AdversarialLoss, discriminator_loss


def matching_aware_loss(kind: AdversarialLoss, logits: Logits, has_other: Tensor, weight: float) -> Tensor:
    """Real against generated images, and `weight` times real images with captions of others, which count as fake.

    Reed et al. 2016 (arXiv:1605.05396, algorithm 1). `has_other` (B,): which samples have such a caption. Scalar.
    """
    loss = discriminator_loss(kind, logits.real, logits.fake)
    if not weight or not bool(has_other.any()):
        return loss
    return loss + 0.5 * weight * fake_term(kind, logits.mismatched[has_other])


def fake_term(kind: AdversarialLoss, logits: Tensor) -> Tensor:
    """What the discriminator pays for logits that should be low. Scalar."""
    if kind == "hinge":
        return F.relu(1.0 + logits.float()).mean()
    if kind == "non_saturating":
        return F.softplus(logits.float()).mean()
    raise ValueError(f"unknown adversarial loss {kind!r}")


COARSE_SIDE = 16  # of the images that `sameness` compares: composition and colour, no grain


def sameness(images: Tensor, again: Tensor, real: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """By how much two images of one caption differ less than `least` times what real images differ by.

    images, again (P, 3, S, S): pairs of one caption and different noise; real (B, 3, S, S). Differences are means of
    absolute values at 16 x 16 pixels, an even change of brightness or colour not counted, which is the cheapest way to
    differ; real images are compared with their neighbours in the batch. A bounded form of the diversity-sensitive loss
    (Yang et al. 2019, arXiv:1901.09024, equation 3).
    -> mean of max(0, 1 - difference / (least * that of real images)), a scalar; mean difference over that of real ones.
    """
    between_real = coarse_difference(real, real.roll(1, 0)).mean().clamp(min=1e-3)
    difference = coarse_difference(images, again) / between_real  # (P,)
    return F.relu(1.0 - difference / least).mean(), difference.detach().mean()


def coarse_difference(a: Tensor, b: Tensor) -> Tensor:
    """(B, 3, S, S), twice -> (B,)"""
    difference = F.adaptive_avg_pool2d(a.float() - b.float(), COARSE_SIDE)
    return (difference - difference.mean((2, 3), keepdim=True)).abs().mean((1, 2, 3))
