"""Cross-entropy over text and image tokens, computed once a logit in float32.

The weighted mean of the two follows DALL-E (Ramesh et al. 2021, section 2.2: text 1/8, image 7/8); the z-loss keeps
log-partitions near zero (Chowdhery et al. 2022, PaLM, section 5).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.model import DalleOutput


class CrossEntropy(nn.Module):
    """Of each row, computed in float32: logits (M, V), targets (M,) long -> (M,) float32"""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets, reduction="none")


PLAIN_CROSS_ENTROPY = CrossEntropy()


@dataclass(frozen=True)
class LossConfig:
    """What is minimised."""

    text_weight: float = 1.0
    """Weight of the text loss; 0 trains no text head."""
    image_weight: float = 7.0
    """Weight of the image loss; the two are divided by their sum."""
    label_smoothing: float = 0.0
    """Share of an image target spread evenly over the codebook."""
    z_loss: float = 0.0
    """Weight of the squared log-partition of the image logits; 1e-4 is usual."""

    def __post_init__(self) -> None:
        if self.text_weight < 0 or self.image_weight <= 0:
            raise ValueError(
                f"text_weight must be at least 0 and image_weight above 0, not {self.text_weight} and "
                f"{self.image_weight}"
            )
        if not 0 <= self.label_smoothing < 1 or self.z_loss < 0:
            raise ValueError("label_smoothing must lie in [0, 1) and z_loss must not be negative")


@dataclass(frozen=True)
class Losses:
    """Scalars with a gradient, and what is logged."""

    total: Tensor
    text: Tensor
    image: Tensor  # plain cross-entropy in nats a token, whatever the smoothing

    def metrics(self) -> dict[str, float]:
        """Plain numbers; bits an image token."""
        image = float(self.image.detach())
        return {
            "loss": float(self.total.detach()),
            "text_loss": float(self.text.detach()),
            "image_loss": image,
            "image_bits": image / math.log(2),
        }


def dalle_loss(
    output: DalleOutput,
    image_ids: Tensor,
    text_targets: Tensor,
    num_targets: float,
    config: LossConfig,
    cross_entropy: CrossEntropy = PLAIN_CROSS_ENTROPY,
) -> Losses:
    """image_ids: (B, N) long; text_targets: (M,) long, from `sequence.text_targets`.

    num_targets: what the summed text loss is divided by. M gives the mean over this batch; the mean of M over all
    micro-batches and processes gives the mean over the global batch, however it is split.
    """
    image, objective = image_cross_entropy(output.image, image_ids, config, cross_entropy)
    text = output.image.new_zeros((), dtype=torch.float32)
    if output.text is not None:
        # a sum: a batch of null captions alone must give 0 with a gradient, not NaN
        text = cross_entropy(output.text, text_targets).sum() / max(1.0, num_targets)
    total = config.text_weight * text + config.image_weight * objective
    return Losses(total / (config.text_weight + config.image_weight), text, image)


def image_cross_entropy(
    logits: Tensor, image_ids: Tensor, config: LossConfig, cross_entropy: CrossEntropy = PLAIN_CROSS_ENTROPY
) -> tuple[Tensor, Tensor]:
    """(B, N, V), (B, N) -> plain cross-entropy for the log, and the objective with smoothing and z-loss."""
    logits, targets = logits.flatten(0, 1), image_ids.flatten()  # (B N, V)
    plain = cross_entropy(logits, targets).mean()
    objective = plain
    if config.label_smoothing:
        smooth = F.cross_entropy(logits.float(), targets, label_smoothing=config.label_smoothing)
        plain, objective = plain.detach(), smooth
    if config.z_loss:
        objective = objective + config.z_loss * logits.float().logsumexp(-1).square().mean()
    return plain, objective


def position_losses(
    logits: Tensor, image_ids: Tensor, cross_entropy: CrossEntropy = PLAIN_CROSS_ENTROPY
) -> Tensor:
    """Summed cross-entropy of each image position over the batch: (B, N, V), (B, N) -> (N,) float32"""
    losses = cross_entropy(logits.flatten(0, 1), image_ids.flatten())
    return losses.view(image_ids.shape).sum(0)
