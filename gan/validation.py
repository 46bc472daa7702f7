"""What an evaluation of the GAN computes: distances between sets of images, on features of efficientnet_lite0.

The network may be the one that the discriminator's features come from, so these numbers compare checkpoints of one run
and nothing else. The judge of evaluation/ has a network of its own, which never trains anything.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Features (N, D), (M, D) -> squared Frechet distance of their Gaussians (Heusel et al. 2017, arXiv:1706.08500).

    tr (C_a C_b)^(1/2) is the nuclear norm of A B^T / sqrt((N - 1)(M - 1)), A and B the centred features: for fewer
    samples than dimensions this is small and exact where a root of covariances is neither.
    Raises ValueError for fewer than two rows.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a Frechet distance needs at least 2 images a side, not {len(a)} and {len(b)}")
    a, b = a.double(), b.double()
    mean_a, mean_b = a.mean(0), b.mean(0)
    a, b = (a - mean_a) / (len(a) - 1) ** 0.5, (b - mean_b) / (len(b) - 1) ** 0.5
    cross = torch.linalg.svdvals(a @ b.T if min(len(a), len(b)) <= a.shape[1] else _small(a, b)).sum()
    return float((mean_a - mean_b).square().sum() + a.square().sum() + b.square().sum() - 2 * cross)


def _small(a: Tensor, b: Tensor) -> Tensor:
    """(D, D) with the singular values of A B^T."""
    return torch.linalg.qr(a, mode="r").R @ torch.linalg.qr(b, mode="r").R.T


def mean_pair_distance(features: Tensor, center: Tensor) -> float:
    """(N, D), (D,) -> mean of 1 - cosine over pairs, seen from `center`. Raises ValueError for fewer than two rows."""
    size = len(features)
    if size < 2:
        raise ValueError(f"diversity needs at least 2 images, not {size}")
    rows = F.normalize(features.double() - center.double(), dim=1)
    return float(1 - (rows.sum(0).square().sum() - rows.square().sum()) / (size * (size - 1)))
