"""Images that grow during a training: small ones first are cheap, and a little under the size of use is best.

Touvron et al. 2019, arXiv 1906.06423.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F


def check_train_sizes(sizes: Sequence[int]) -> None:
    """Raises ValueError without sides, or for a side under 32 pixels."""
    if not sizes or min(sizes) < 32:
        raise ValueError(f"train_sizes must name sides of at least 32 pixels, not {list(sizes)}")


def train_size(sizes: Sequence[int], step: int, num_steps: int) -> int:
    """The side in pixels at that step: each of `sizes` has an equal part of the run."""
    return sizes[min(len(sizes) - 1, step * len(sizes) // num_steps)]


def at_size(images: Tensor, size: int) -> Tensor:
    """(B, 3, S, S) -> (B, 3, size, size)"""
    if size == images.shape[-1]:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
