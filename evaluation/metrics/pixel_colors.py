"""The colour of real goods, measured in the pixels and named as the reference's captions name it.

No network: a histogram of CIELAB colours over the goods (the middle of the image, and what is not joined to the
border), compared with those of reference images whose colour is known (k nearest neighbours, Hellinger affinity).
Shops have twenty names for colours, and where navy ends is theirs to say.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.files import sha256_file

_SIDE = 64
_LIGHT_CELLS, _TONE_CELLS = 7, 9
_CENTRE_WIDTH = 0.45  # of half a side: the deviation of the weight of the middle
_BACKGROUND_DISTANCE = 7.0  # CIELAB distance up to which a pixel may be background
_MIN_MASK = 0.03  # a mask of less than this share of the image has missed the goods
NEIGHBOURS = 7
MIN_PER_COLOR = 5


class PixelColors:
    """Names colours by the nearest reference images."""

    name = "pixels"

    def __init__(self, histograms: NDArray, names: Sequence[str]) -> None:
        """Histograms (R, H) of reference images and their colours. Colours of fewer than MIN_PER_COLOR are left out.

        Raises ValueError when fewer than two colours are left.
        """
        self.colors = _frequent(names)
        if len(self.colors) < 2:
            raise ValueError(f"fewer than two colours have {MIN_PER_COLOR} reference images each")
        kept = [i for i, name in enumerate(names) if name in self.colors]
        self.histograms = np.asarray(histograms)[kept]
        self.labels = np.array([self.colors.index(names[i]) for i in kept])

    @staticmethod
    def enough(names: Sequence[str]) -> bool:
        """Whether images of these colours can name colours."""
        return len(_frequent(names)) >= 2

    def votes(self, histograms: NDArray) -> NDArray[np.float64]:
        """(N, H) -> (N, C): the share that each colour has among the nearest, near ones counting more."""
        affinity = histograms @ self.histograms.T  # (N, R) in [0, 1]
        count = min(NEIGHBOURS, len(self.labels))
        nearest = np.argpartition(-affinity, count - 1, axis=1)[:, :count]  # (N, k)
        weight = np.take_along_axis(affinity, nearest, 1) ** 8 + 1e-12
        votes = np.zeros((len(histograms), len(self.colors)))
        for color in range(len(self.colors)):
            votes[:, color] = (weight * (self.labels[nearest] == color)).sum(1)
        return votes / votes.sum(1, keepdims=True)

    def named(self, histograms: NDArray) -> list[str]:
        """(N, H) -> the likeliest colour of each."""
        return [self.colors[i] for i in self.votes(histograms).argmax(1)]


def _frequent(names: Sequence[str]) -> tuple[str, ...]:
    counts = Counter(names)
    return tuple(sorted(name for name, count in counts.items() if count >= MIN_PER_COLOR))


class ColorHistogram:
    """A `FeatureNetwork` of evaluation.metrics.features: (N, H) roots of the shares of colours, unit vectors."""

    name = "color-histogram"

    @functools.cached_property
    def identity(self) -> str:
        """Of the code: any change of it asks for new histograms."""
        return sha256_file(Path(__file__))

    def features(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        return np.stack([_histogram(image) for image in images]).astype(np.float32)

    def probabilities(self, features: NDArray) -> None:
        return None


def _histogram(image: Image.Image) -> NDArray:
    """(7 * 9 * 9,): a pixel's vote is shared by the eight cells around its colour; near grey the cells are finer."""
    small = image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    rgb = np.asarray(small, dtype=np.float32) / 255.0
    lab = lab_of(rgb).reshape(-1, 3)
    weight = _weight(rgb).reshape(-1)
    tones = np.sign(lab[:, 1:]) * np.sqrt(np.abs(lab[:, 1:]) / 80.0)  # -1 .. 1
    light = lab[:, :1] / 100 * (_LIGHT_CELLS - 1)
    position = np.concatenate([light, (tones + 1) / 2 * (_TONE_CELLS - 1)], axis=1)
    position = np.clip(position, 0, np.array([_LIGHT_CELLS, _TONE_CELLS, _TONE_CELLS]) - 1.001)
    cell, part = np.floor(position).astype(np.int64), position % 1
    size = _LIGHT_CELLS * _TONE_CELLS * _TONE_CELLS
    histogram = np.zeros(size)
    for corner in np.ndindex(2, 2, 2):
        share = np.prod(np.where(corner, part, 1 - part), axis=1) * weight
        row = cell + np.array(corner)
        flat = (row[:, 0] * _TONE_CELLS + row[:, 1]) * _TONE_CELLS + row[:, 2]
        histogram += np.bincount(flat, share, minlength=size)
    return np.sqrt(histogram / histogram.sum())


def _weight(rgb: NDArray) -> NDArray:
    """(S, S): how much each pixel is likely to be of the goods."""
    y, x = np.mgrid[:_SIDE, :_SIDE]
    middle = (_SIDE - 1) / 2
    squared = ((x - middle) ** 2 + (y - middle) ** 2) / (_SIDE / 2) ** 2
    weight = np.exp(-squared / (2 * _CENTRE_WIDTH**2))
    mask = goods_mask(rgb)
    return weight * (0.05 + mask) if mask.mean() > _MIN_MASK else weight


def goods_mask(rgb: np.ndarray) -> np.ndarray:
    """(S, S) bool from (S, S, 3) in [0, 1]: pixels that no path of background-like pixels joins to the border."""
    import cv2

    border = [rgb[:2], rgb[-2:], rgb[:, :2], rgb[:, -2:]]
    background = np.median(np.concatenate([side.reshape(-1, 3) for side in border]), axis=0)
    like = np.linalg.norm(lab_of(rgb) - lab_of(background[None, None]), axis=2) < _BACKGROUND_DISTANCE
    if np.ptp(background) > 0.1:  # wood: darker planks and shadows keep its hue, brown goods do not
        ratio = rgb / np.maximum(background, 1e-3)
        like |= (np.ptp(ratio, axis=2) < 0.12) & (ratio.mean(axis=2) > 0.5) & (ratio.mean(axis=2) < 1.12)
    framed = np.pad(like, 1, constant_values=True).astype(np.uint8)
    _, labels = cv2.connectedComponents(framed, connectivity=4)
    return labels[1:-1, 1:-1] != labels[0, 0]


def lab_of(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of (H, W, 3) sRGB in [0, 1]: lightness 0..100, a and b about -100..100."""
    import cv2

    return cv2.cvtColor(np.ascontiguousarray(rgb, dtype=np.float32), cv2.COLOR_RGB2LAB)
