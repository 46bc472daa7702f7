"""How a set of images lies among real ones: statistics with weights, for bootstrap replicates.

A weight says how often an image counts; with ones they are the plain statistics. The real images stay as they are:
intervals are over the generated ones. Frechet distance: Heusel et al. 2017 (arXiv:1706.08500, equation 6). KID:
Binkowski et al. 2018 (arXiv:1801.01401). Precision and recall: Kynkaanniemi et al. 2019 (arXiv:1904.06991). Density and
coverage: Naeem et al. 2020 (arXiv:2002.09797).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics.resampling import Estimate, Resampling, interval_of, mean_estimate, set_estimate
from evaluation.metrics.statistics import mean_pair_distance, pairwise_distances

Floats = NDArray[np.float64]
_BLOCK = 512  # rows of a kernel matrix held at a time
MOST_NEIGHBOURS = 5000  # images a side whose neighbours are looked for


class Frechet:
    """Distance of weighted sets to one set of real features: |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    The eigenvalues of C_a C_b are those of R^T C_a R with C_b = R R^T, which is symmetric and has the rank of the
    smaller of images and widths.
    """

    def __init__(self, real: NDArray) -> None:
        """real (M, D). Raises ValueError for fewer than two rows."""
        if len(real) < 2:
            raise ValueError(f"a covariance needs at least 2 real images, not {len(real)}")
        real = np.asarray(real, np.float64)
        self.mean = real.mean(0)
        centred = (real - self.mean) / np.sqrt(len(real) - 1)  # (M, D)
        self.trace = float((centred**2).sum())
        _, scales, axes = np.linalg.svd(centred, full_matrices=False)
        self.root = axes.T * scales  # (D, r)

    def estimate(self, features: NDArray, resampling: Resampling, replicates: int) -> Estimate:
        """Of (N, D) features. Raises ValueError for fewer than two."""
        if len(features) < 2:
            raise ValueError(f"a covariance needs at least 2 images, not {len(features)}")
        features = np.asarray(features, np.float64)
        projected = features @ self.root  # (N, r)

        def distance(weights: Floats) -> float:
            total = weights.sum()
            mean = weights @ features / total
            spread = float((weights @ (features - mean) ** 2).sum() / (total - 1))
            rows = np.sqrt(weights)[:, None] * (projected - weights @ projected / total)
            roots = np.sqrt(np.clip(np.linalg.eigvalsh(rows.T @ rows / (total - 1)), 0, None))
            return float(((mean - self.mean) ** 2).sum() + spread + self.trace - 2 * roots.sum())

        return set_estimate(distance, resampling, replicates, least=0.0)


def kernel_estimate(features: NDArray, real: NDArray, resampling: Resampling) -> Estimate:
    """Unbiased squared MMD under (x.y / D + 1)^3 of (N, D) against (M, D), all pairs: what KID estimates by subsets.

    An image that a drawing holds twice makes no pair with itself. Raises ValueError for fewer than two a side.
    """
    if min(len(features), len(real)) < 2:
        raise ValueError(
            f"a kernel distance needs at least 2 images a side, not {len(features)} and {len(real)}"
        )
    a, b = np.asarray(features, np.float64), np.asarray(real, np.float64)
    weights = np.concatenate(
        [np.ones((1, len(a))), resampling.weights()]
    )  # the set itself, then its drawings
    with_self, cross = np.zeros(len(weights)), np.zeros(len(a))
    for start in range(0, len(a), _BLOCK):
        rows = slice(start, start + _BLOCK)
        with_self += ((weights @ _kernel(a, a[rows])) * weights[:, rows]).sum(1)
        cross[rows] = _kernel(a[rows], b).mean(1)
    own = ((a**2).sum(1) / a.shape[1] + 1) ** 3
    total, squares = weights.sum(1), (weights**2).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        same_a = (with_self - weights**2 @ own) / (total**2 - squares)
        values = same_a + _same(b) - 2 * weights @ cross / total
    return Estimate(interval_of(float(values[0]), values[1:]), len(a), values[1:])


def _kernel(x: Floats, y: Floats) -> Floats:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _same(b: Floats) -> float:
    """Mean of the kernel over pairs of different rows."""
    total = sum(_kernel(b[i : i + _BLOCK], b).sum() for i in range(0, len(b), _BLOCK))
    own = (((b**2).sum(1) / b.shape[1] + 1) ** 3).sum()
    return float((total - own) / (len(b) * (len(b) - 1)))


def inception_estimate(probabilities: NDArray, resampling: Resampling) -> Estimate:
    """exp(mean KL(p(y|x) || p(y))) of (N, C) over the whole set, in one part."""
    p = np.asarray(probabilities, np.float64)
    negative_entropy = (p * np.log(np.clip(p, 1e-16, None))).sum(1)  # (N,)

    def score(weights: Floats) -> float:
        total = weights.sum()
        marginal = weights @ p / total
        mean = weights @ negative_entropy / total
        return float(np.exp(mean - (marginal * np.log(np.clip(marginal, 1e-16, None))).sum()))

    return set_estimate(score, resampling, resampling.replicates, least=1.0, most=p.shape[1])


def manifold_estimates(
    features: NDArray, real: NDArray, resampling: Resampling, k: int = 5
) -> dict[str, Estimate]:
    """precision, recall, density, coverage with k-nearest-neighbour balls.

    More than MOST_NEIGHBOURS images a side are thinned evenly. Raises ValueError when a side has not more than k.
    """
    if k >= min(len(real), len(features)):
        raise ValueError(f"k {k} needs more than {k} images a side, not {len(real)} and {len(features)}")
    rows = _thinned(len(features))
    real = np.asarray(real, np.float64)[_thinned(len(real))]
    fake = np.asarray(features, np.float64)[rows]
    real_radius = np.partition(pairwise_distances(real, real), k, axis=1)[
        :, k
    ]  # the nearest is the image itself
    fake_radius = np.partition(pairwise_distances(fake, fake), k, axis=1)[:, k]
    distances = pairwise_distances(real, fake)  # (R, F)
    in_real, in_fake = distances <= real_radius[:, None], distances <= fake_radius[None, :]
    values = np.full((2, len(features)), np.nan)
    values[:, rows] = in_real.any(0), in_real.sum(0) / k
    found = {
        "precision": mean_estimate(values[0], resampling, is_share=True),
        "density": mean_estimate(values[1], resampling),
    }
    for name, inside in (("recall", in_fake), ("coverage", in_real)):
        reached = inside.astype(np.float32)

        def share(weights: Floats, reached: NDArray = reached) -> float:
            return float((reached @ (weights > 0).astype(np.float32) > 0).mean())

        found[name] = set_estimate(share, resampling, resampling.replicates, 0.0, 1.0, rows)
    return found


def _thinned(count: int) -> NDArray[np.int64]:
    return np.linspace(0, count - 1, min(count, MOST_NEIGHBOURS)).round().astype(np.int64)


def diversity_values(features: NDArray, texts: Sequence[str]) -> Floats:
    """(N,): for every image the mean of 1 - cosine over pairs of images of its text, NaN for a single image."""
    rows = np.asarray(features, np.float64)
    rows = rows / np.clip(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12, None)
    values = np.full(len(rows), np.nan)
    indices: dict[str, list[int]] = {}
    for i, text in enumerate(texts):
        indices.setdefault(text, []).append(i)
    for group in indices.values():
        if len(group) > 1:
            values[group] = mean_pair_distance(rows[group])
    return values
