"""The discriminator's loss over right and wrong captions; the terms of a pair: vq.losses.reconstruction."""

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
