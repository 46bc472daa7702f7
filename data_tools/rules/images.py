"""Three faults that a header does not show: blur, a blank image, a repeated overlay. Measured on 256 pixels.

Thresholds were set on 989 images of the embedded product set and their damaged copies:
- sharpness: the 1st percentile of the originals is 0.26; the 99th of those blurred with sigma 2 is 0.10, the 95th of
  those enlarged four times 0.12. The plain variance of the Laplacian (Pech-Pacheco et al., 2000) overlaps between
  sharp images of little contrast and blurred ones of much; dividing by the range of brightness separates them.
- tiling: autocorrelation of the clipped local contrast. Textiles repeat too, but in ridges: a lattice of text has
  peaks that stand out from the ring around them. Over 0.06 are 0 of 170 web photos and 0.6 % of 330 goods, 77-96 %
  of those with tiled text of opacity 0.35 and 94-100 % at 0.6. Single logos and banners are not found by it.
"""

import math

import numpy as np
from PIL import Image

from data_tools.rules import ImageRules

SIDE = 256
_CLIP = 12.0  # levels: strong edges of the product weigh no more than faint strokes of an overlay
_MIN_LAG = 16  # pixels: nearer repeats are weave
_RING = (6, 9)  # radii in pixels


def thumbnail_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """The size that `PIL.Image.thumbnail((side, side))` gives an image, without its pixels."""
    width, height = size
    if width <= side and height <= side:
        return size
    aspect = width / height
    if aspect < 1:
        return _nearest(side * aspect, lambda n: abs(aspect - n / side)), side
    return side, _nearest(side / aspect, lambda n: abs(aspect - side / n) if n else 0)


def _nearest(value: float, error) -> int:
    return max(min(math.floor(value), math.ceil(value), key=error), 1)


def check_shape(size: tuple[int, int], rules: ImageRules) -> tuple[str, str] | None:
    """Reason and detail if the size (W, H) in pixels breaks a rule."""
    what = f"{size[0]} x {size[1]} pixels"
    if min(size) < rules.min_side:
        return "image_too_small", f"{what}, the shorter side must have {rules.min_side}"
    if rules.max_aspect:
        judged = thumbnail_size(size, rules.aspect_thumbnail) if rules.aspect_thumbnail else size
        if min(judged) < max(judged) / rules.max_aspect:
            return "aspect_ratio", f"{what}, the sides may differ by a factor of {rules.max_aspect:g}"
    return None


def grey256(image: Image.Image) -> np.ndarray:
    """Brightness at no more than 256 pixels, float32 (H, W) in 0..255; never enlarged."""
    grey = image.convert("L")
    scale = SIDE / max(grey.size)
    if scale < 1:
        shape = (max(1, round(grey.width * scale)), max(1, round(grey.height * scale)))
        grey = grey.resize(shape, Image.Resampling.BOX)
    return np.asarray(grey, np.float32)


def measure_flags(image: Image.Image, rules: ImageRules) -> list[str]:
    """The flags of `rules` that the image earns, in a fixed order."""
    if not (rules.min_sharpness or rules.min_contrast or rules.max_tiling):
        return []
    grey = grey256(image)
    if rules.min_contrast and float(grey.std()) < rules.min_contrast:
        return ["near_constant"]  # the other two mean nothing on a blank image
    flags = []
    if rules.min_sharpness and sharpness(grey) < rules.min_sharpness:
        flags.append("blurred")
    if rules.max_tiling and tiling(grey) > rules.max_tiling:
        flags.append("watermark")
    return flags


def sharpness(grey: np.ndarray) -> float:
    """99.5th percentile of |Laplacian| over the range of brightness, both robust; (H, W), 0 for under 3 pixels."""
    if min(grey.shape) < 3:
        return 0.0
    inner = grey[1:-1, 1:-1]
    laplacian = 4 * inner - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]
    low, high = np.percentile(grey, (0.5, 99.5))
    return float(np.percentile(np.abs(laplacian), 99.5) / max(high - low, 1.0))


def tiling(grey: np.ndarray) -> float:
    """How far the second highest peak of the autocorrelation stands out of its surroundings, 0 to 1; (H, W).

    The second, because a lattice has several peaks and two like parts of a product have one.
    """
    height, width = grey.shape
    if min(height, width) < 4 * _MIN_LAG:
        return 0.0
    correlation = _autocorrelation(_local_contrast(grey))
    tall, wide = int(0.65 * height), int(0.65 * width)
    half = correlation[
        height - tall : height + tall + 1, width : width + wide + 1
    ]  # the other half mirrors it
    peaks = _peaks(half, tall)
    if len(peaks) < 2:
        return 0.0
    return max(0.0, float(np.partition(_prominences(half, peaks), -2)[-2]))


def _local_contrast(grey: np.ndarray) -> np.ndarray:
    """Brightness minus the mean of 7 x 7 pixels, clipped, of mean 0."""
    from scipy.ndimage import uniform_filter

    contrast = np.clip(grey - uniform_filter(grey, 7, mode="nearest"), -_CLIP, _CLIP)
    return contrast - contrast.mean()


def _autocorrelation(contrast: np.ndarray) -> np.ndarray:
    """Normalised by overlap and variance, (2H, 2W) with lag 0 at (H, W)."""
    from scipy import fft

    height, width = contrast.shape
    spectrum = fft.rfft2(contrast, (2 * height, 2 * width))
    raw = fft.fftshift(fft.irfft2(np.abs(spectrum) ** 2, (2 * height, 2 * width)))
    rows = height - np.abs(np.arange(2 * height) - height)
    columns = width - np.abs(np.arange(2 * width) - width)
    overlap = np.maximum(rows[:, None] * columns[None, :], height * width / 8)
    return raw / overlap / (contrast.var() + 1.0)  # + 1: on a flat background noise of a level is no signal


def _peaks(half: np.ndarray, centre: int, count: int = 60) -> np.ndarray:
    """The highest local maxima (n, 2) beyond the shortest lag."""
    from scipy.ndimage import maximum_filter

    y, x = np.ogrid[: half.shape[0], : half.shape[1]]
    far = (y - centre) ** 2 + x**2 > _MIN_LAG**2
    found = np.argwhere((half == maximum_filter(half, 5)) & far & (half > 0.03))
    order = np.argsort(-half[found[:, 0], found[:, 1]], kind="stable")
    return found[order[:count]]


def _prominences(half: np.ndarray, peaks: np.ndarray) -> np.ndarray:
    """Height of each peak (n, 2) above the highest point of two rings around it: 0 on the ridge of a stripe pattern."""
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    radius = np.repeat(_RING, len(angle))
    angle = np.tile(angle, len(_RING))
    rows = np.clip(np.rint(peaks[:, :1] + radius * np.sin(angle)).astype(int), 0, half.shape[0] - 1)
    columns = np.clip(np.rint(peaks[:, 1:] + radius * np.cos(angle)).astype(int), 0, half.shape[1] - 1)
    return half[peaks[:, 0], peaks[:, 1]] - half[rows, columns].max(axis=1)  # (n,)
