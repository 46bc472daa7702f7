"""Statistics of sets as their definitions say, without weights: what the fast ones must equal."""

import numpy as np
from scipy.linalg import sqrtm


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """(N, D), (M, D); the root of the product of covariances by Schur decomposition."""
    c_a, c_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    difference = a.mean(0) - b.mean(0)
    return float(difference @ difference + np.trace(c_a + c_b - 2 * sqrtm(c_a @ c_b).real))


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared MMD under (x.y / D + 1)^3, pair by pair."""

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return (x @ y / a.shape[1] + 1) ** 3

    own = [np.mean([k(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j]) for s in (a, b)]
    return float(sum(own) - 2 * np.mean([k(x, y) for x in a for y in b]))


def manifold(real: np.ndarray, fake: np.ndarray, k: int = 5) -> dict[str, float]:
    """precision, recall, density, coverage."""

    def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.linalg.norm(x[:, None] - y[None], axis=2)

    real_radius, fake_radius = (
        np.sort(distances(x, x), axis=1)[:, k] for x in (real, fake)
    )  # column 0 is itself
    between = distances(real, fake)
    in_real, in_fake = between <= real_radius[:, None], between <= fake_radius[None, :]
    return {
        "precision": in_real.any(0).mean(),
        "recall": in_fake.any(1).mean(),
        "density": in_real.sum(0).mean() / k,
        "coverage": (between.min(1) <= real_radius).mean(),
    }
