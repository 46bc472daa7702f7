"""Is an image generated anew, or a training image again: the nearest training image of every sample.

Two measures: the perceptual hash (bits that differ, 0 to 64, plus the mean difference of the colour grid below 1; also
of the mirrored sample), and 1 - cosine of a network's features. "Near" is what is rare among real images: the
threshold is the distance below which only 1 % of the validation images have a training image. Whole images are
compared. Carlini et al. 2023 (arXiv:2301.13188) on what such copies mean.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 22  # similarities held at a time


@dataclass(frozen=True)
class Neighbour:
    """A sample and its nearest training image."""

    sample: int
    """Place in the sample set."""
    row: int
    """Place in the training images, for `ReferenceImages.open`."""
    distance: float


@dataclass(frozen=True)
class Nearest:
    """Nearest training images by one measure."""

    measure: str
    distances: NDArray = field(repr=False)
    """(N,) of the samples."""
    rows: NDArray = field(repr=False)
    """(N,) indices of the training images."""
    threshold: float
    """Below it lies `quantile` of the real validation images."""
    quantile: float
    real_mean: float
    """Mean distance of validation images to their nearest training image."""

    @property
    def copies(self) -> NDArray:
        """(N,) 1.0 where the sample is nearer than the threshold."""
        return (self.distances < self.threshold).astype(np.float64)

    def closest(self, count: int = 24) -> list[Neighbour]:
        """The samples that are nearest to a training image, nearest first, each training image once."""
        found, seen = [], set()
        for i in np.argsort(self.distances, kind="stable"):
            row = int(self.rows[i])
            if row not in seen:
                seen.add(row)
                found.append(Neighbour(int(i), row, float(self.distances[i])))
            if len(found) == count:
                break
        return found


Search = Callable[[NDArray, NDArray], tuple[NDArray, NDArray]]


def nearest_by_cosine(samples: NDArray, training: NDArray) -> tuple[NDArray, NDArray]:
    """(N, D), (M, D) features of any length -> distances 1 - cosine (N,) and rows (N,) of the nearest."""
    a, b = _unit(samples), _unit(training)
    distances, rows = np.empty(len(a)), np.empty(len(a), np.int64)
    step = max(1, _BLOCK // len(b))
    for start in range(0, len(a), step):
        block = slice(start, start + step)
        similarity = a[block] @ b.T
        rows[block] = similarity.argmax(1)
        distances[block] = 1 - similarity.max(1)
    return np.clip(distances, 0, None), rows


def _unit(rows: NDArray) -> NDArray:
    rows = np.asarray(rows, np.float32)
    return rows / np.clip(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12, None)


def nearest_by_hash(samples: NDArray, training: NDArray) -> tuple[NDArray, NDArray]:
    """(N, 112), (M, 112) of `PerceptualHash` -> distances (N,) and rows (N,) of the nearest.

    A distance is the bits that differ plus the mean difference of the colour grids, which is below 1 and decides among
    equal bits. Exact, by comparing all: a thousand samples and a million images take seconds.
    """
    bits = _packed(training)
    distances, rows = np.empty(len(samples)), np.empty(len(samples), np.int64)
    for i, (row, own) in enumerate(zip(samples, _packed(samples), strict=True)):
        different = np.bitwise_count(bits ^ own)
        tied = np.flatnonzero(different == different.min())
        grids = np.minimum(np.abs(training[tied, 64:] - row[64:]).mean(1), 0.999)
        rows[i] = tied[grids.argmin()]
        distances[i] = different.min() + grids.min()
    return distances, rows


def _packed(rows: NDArray) -> NDArray[np.uint64]:
    return np.packbits(np.asarray(rows)[:, :64].astype(np.uint8), axis=1).view(np.uint64)[:, 0]


def nearest_training(
    measure: str,
    search: Search,
    samples: tuple[NDArray, ...],
    validation: tuple[NDArray, ...],
    training: NDArray,
    quantile: float = 0.01,
) -> Nearest:
    """Nearest training images of the samples, and the threshold from the validation images.

    `samples`, `validation`: one or several views of the same images (N, D), of which the nearest counts.
    Raises ValueError for a quantile outside (0, 1).
    """
    if not 0 < quantile < 1:
        raise ValueError(f"quantile must lie between 0 and 1, not {quantile}")
    real, _ = _nearest_view(search, validation, training)
    distances, rows = _nearest_view(search, samples, training)
    threshold = float(np.quantile(real, quantile))
    return Nearest(measure, distances, rows, threshold, quantile, float(real.mean()))


def _nearest_view(search: Search, views: tuple[NDArray, ...], training: NDArray) -> tuple[NDArray, NDArray]:
    found = [search(view, training) for view in views]
    distances = np.stack([d for d, _ in found])  # (views, N)
    best = distances.argmin(0)
    columns = np.arange(distances.shape[1])
    return distances[best, columns], np.stack([r for _, r in found])[best, columns]
