"""The formulas: pure functions of features, tested against closed forms and against torchmetrics.

Frechet distance: Heusel et al. 2017 (arXiv:1706.08500, equation 6). KID: Binkowski et al. 2018 (arXiv:1801.01401).
Inception score: Salimans et al. 2016 (arXiv:1606.03498). Precision and recall: Kynkaanniemi et al. 2019
(arXiv:1904.06991). Density and coverage: Naeem et al. 2020 (arXiv:2002.09797).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate with a bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def bootstrap(
    statistic: Callable[[NDArray], float],
    num_items: int,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap of `statistic(indices)`, indices drawn with replacement from range(num_items).

    Raises ValueError for fewer than two items.
    """
    if num_items < 2:
        raise ValueError(f"an interval needs at least 2 items, not {num_items}")
    rng = np.random.default_rng(seed)
    drawn = [statistic(rng.integers(0, num_items, num_items)) for _ in range(draws)]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(np.arange(num_items))), float(low), float(high))


def bootstrap_mean(values: NDArray, draws: int = 2000, seed: int = 0) -> Interval:
    """Mean of (N,) values with its interval."""
    values = np.asarray(values, dtype=np.float64)
    return bootstrap(lambda i: float(values[i].mean()), len(values), draws, seed)


def frechet_distance(mean_a: Floats, cov_a: Floats, mean_b: Floats, cov_b: Floats) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), means (D,), covariances (D, D).

    The trace of the root is the sum of the roots of the eigenvalues of C_a C_b, which are real and not negative.
    """
    eigenvalues = np.linalg.eigvals(cov_a @ cov_b)
    root_trace = np.sqrt(np.clip(eigenvalues.real, 0, None)).sum()
    difference = mean_a - mean_b
    return float(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * root_trace)


def frechet_from_features(a: Floats, b: Floats) -> float:
    """(N, D), (M, D) -> Frechet distance of their Gaussians. Raises ValueError for fewer than two rows."""
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a covariance needs at least 2 pictures a side, not {len(a)} and {len(b)}")
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))


def polynomial_mmd(a: Floats, b: Floats) -> float:
    """Unbiased squared MMD of (n, D) and (m, D) under k(x, y) = (x.y / D + 1)^3."""
    dim = a.shape[1]

    def kernel(x: Floats, y: Floats) -> Floats:
        return (x @ y.T / dim + 1) ** 3

    k_aa, k_bb, k_ab = kernel(a, a), kernel(b, b), kernel(a, b)
    n, m = len(a), len(b)
    same_a = (k_aa.sum() - np.trace(k_aa)) / (n * (n - 1))
    same_b = (k_bb.sum() - np.trace(k_bb)) / (m * (m - 1))
    return float(same_a + same_b - 2 * k_ab.mean())


def kernel_distance(
    a: Floats, b: Floats, subset_size: int = 1000, subsets: int = 100, seed: int = 0
) -> Interval:
    """Mean of `polynomial_mmd` over random subsets without replacement; the interval is over subsets (KID)."""
    size = min(subset_size, len(a), len(b))
    if size < 2:
        raise ValueError(f"a kernel distance needs at least 2 pictures a side, not {len(a)} and {len(b)}")
    rng = np.random.default_rng(seed)
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    drawn = [
        polynomial_mmd(a[rng.choice(len(a), size, replace=False)], b[rng.choice(len(b), size, replace=False)])
        for _ in range(subsets)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(np.mean(drawn)), float(low), float(high))


def inception_score(probabilities: Floats, splits: int = 10, seed: int = 0) -> Interval:
    """exp(mean KL(p(y|x) || p(y))) of (N, K) rows, the mean over `splits` random parts; low and high: its extremes."""
    splits = min(splits, len(probabilities))
    order = np.random.default_rng(seed).permutation(len(probabilities))
    scores = []
    for part in np.array_split(np.asarray(probabilities, np.float64)[order], splits):
        marginal = part.mean(0, keepdims=True)
        safe = np.clip(part, 1e-16, None)
        divergence = (part * (np.log(safe) - np.log(np.clip(marginal, 1e-16, None)))).sum(1)
        scores.append(float(np.exp(divergence.mean())))
    return Interval(float(np.mean(scores)), min(scores), max(scores))


def pairwise_distances(a: Floats, b: Floats) -> Floats:
    """(N, D), (M, D) -> (N, M) Euclidean."""
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None, :] - 2 * a @ b.T
    return np.sqrt(np.clip(squared, 0, None))


@dataclass(frozen=True)
class Manifold:
    """How two sets of pictures cover each other, each in [0, 1] but density."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold(real: Floats, fake: Floats, k: int = 5) -> Manifold:
    """Precision, recall, density, coverage with k-nearest-neighbour balls. Raises ValueError when k >= a set's size."""
    if k >= min(len(real), len(fake)):
        raise ValueError(f"k {k} needs more than {k} pictures a side, not {len(real)} and {len(fake)}")
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    real_radius = np.sort(pairwise_distances(real, real), axis=1)[:, k]  # column 0 is the picture itself
    fake_radius = np.sort(pairwise_distances(fake, fake), axis=1)[:, k]
    distances = pairwise_distances(real, fake)  # (R, F)
    in_real = distances <= real_radius[:, None]
    in_fake = distances <= fake_radius[None, :]
    return Manifold(
        precision=float(in_real.any(0).mean()),
        recall=float(in_fake.any(1).mean()),
        density=float(in_real.sum(0).mean() / k),
        coverage=float((distances.min(1) <= real_radius).mean()),
    )


def r_precision_all(similarity: Floats, own_text: NDArray, top: int = 5) -> NDArray:
    """(N pictures, T texts), own text's column of each picture -> (N,) 1.0 where it is among the `top` best.

    The form of the e-commerce plan: against all texts. Ties count against the picture.
    """
    own = np.take_along_axis(similarity, np.asarray(own_text)[:, None], axis=1)
    better = (similarity >= own).sum(1) - 1
    return (better < min(top, similarity.shape[1])).astype(np.float64)


def r_precision_sampled(similarity: Floats, own_text: NDArray, among: int = 100, seed: int = 0) -> NDArray:
    """The classic form (AttnGAN): own text against `among` - 1 random others, first place counts.

    Raises ValueError when there are fewer than two texts.
    """
    num_texts = similarity.shape[1]
    if num_texts < 2:
        raise ValueError("R-precision needs at least 2 texts")
    rng = np.random.default_rng(seed)
    hits = []
    for row, own in zip(similarity, own_text, strict=True):
        others = np.delete(np.arange(num_texts), own)
        drawn = rng.choice(others, min(among - 1, len(others)), replace=False)
        hits.append(float(row[own] > row[drawn].max()))
    return np.array(hits)


def mean_pair_distance(features: Floats) -> float:
    """(N, D) unit vectors -> mean of 1 - cosine over pairs: how different the samples of one prompt are."""
    if len(features) < 2:
        raise ValueError("diversity needs at least 2 pictures of a prompt")
    similarity = features @ features.T
    n = len(features)
    return float(1 - (similarity.sum() - np.trace(similarity)) / (n * (n - 1)))


def wilson(hits: int, total: int, z: float = 1.96) -> Interval:
    """Share of hits with Wilson's interval. Raises ValueError when total is 0."""
    if total < 1:
        raise ValueError("a share needs at least one trial")
    share = hits / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * np.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return Interval(share, float(centre - half), float(centre + half))
