"""Formulas without intervals: pure functions, tested against closed forms and against torchmetrics.

Inception score: Salimans et al. 2016 (arXiv:1606.03498). Of sets, with intervals: evaluation.metrics.distribution.
"""

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


def r_precision_all(similarity: Floats, own_text: NDArray, top: int = 5) -> NDArray:
    """(N images, T texts), own text's column of each image -> (N,) 1.0 where it is among the `top` best.

    The form of the e-commerce plan: against all texts. Ties count against the image.
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
        chosen = rng.choice(others, min(among - 1, len(others)), replace=False)
        hits.append(float(row[own] > row[chosen].max()))
    return np.array(hits)


def mean_pair_distance(features: Floats) -> float:
    """(N, D) unit vectors -> mean of 1 - cosine over pairs: how different the samples of one prompt are."""
    if len(features) < 2:
        raise ValueError("diversity needs at least 2 images of a prompt")
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
