"""Where a product stands in its image, from the image alone: what no flood from the border reaches.

Product photographs stand on plain backgrounds, so the background is whatever the border's colour, a smooth change of
light or a soft shadow joins to the border; edges stop the flood. Openings, as in the handle of a bag, are background
where their colour is the background's. No weights, 10 ms at 256 pixels on one core.
"""

import functools

import numpy as np
from PIL import Image

WORK_SIDE = 256  # the flood runs at this longer side at most: more pixels would cost time and show grain
RING = 0.02  # of the shorter side: the border that the background's colour is read from
HUE_SPREAD, HUE_NOISE = (
    0.01,
    2.0,
)  # of a background pixel: how far the ratios of its channels to the background's
# may differ, at least and as a multiple of what they do at the border
DARKEST, LIGHTEST = 0.5, 1.05  # of the background's light: shadows, highlights
STEP, SHADOW_STEP = 1.0, 0.35  # levels between neighbours in full light, and more for each level of shadow
MOST_STEP = 9.0  # no soft shadow rises faster
NOISE_STEPS = 2.5  # of the border's own differences between neighbours: grain and JPEG do not stop the flood
LEAST_CONTRAST = 4.0  # levels between background and product that a mixture is measured by
LEAST_ALPHA = 0.25  # weaker mixtures are background, those as close to the product are product
OPENING = (
    2.0  # levels: how far the mean colour of an opening may lie from the background's where it is not shaded
)
LEAST_SHADE = 1.5  # levels of standard deviation: a shaded opening is no flat print of the same grey
MOST_ALIKE = 0.4  # of what the flood leaves: a product of the background's colour, whose panels would pass for openings
PLAUSIBLE = (0.02, 0.95)  # share of the image that a product takes; outside of it the flood has failed
SMALLEST_SHARE = 0.001  # of the image: fewer joined pixels are dust


def border_matte(image: Image.Image) -> np.ndarray:
    """RGB image (W, H) -> (H, W) float32 in [0, 1], the share of each pixel that the product covers."""
    import cv2

    pixels = np.asarray(image.convert("RGB"))
    height, width = pixels.shape[:2]
    scale = WORK_SIDE / max(height, width)
    if scale < 1:
        shape = (max(1, round(width * scale)), max(1, round(height * scale)))
        pixels = cv2.resize(pixels, shape, interpolation=cv2.INTER_AREA)
    if min(pixels.shape[:2]) < 8:
        return np.ones((height, width), np.float32)  # too small to have a border
    pixels = pixels.astype(np.float32)
    matte = _without_dust(_soft(pixels, background_mask(pixels)))
    return matte if scale >= 1 else cv2.resize(matte, (width, height), interpolation=cv2.INTER_LINEAR)


def is_plausible(matte: np.ndarray) -> bool:
    """Whether a matte (H, W) marks a product: neither nothing nor all of the image."""
    return PLAUSIBLE[0] <= float(matte.mean()) <= PLAUSIBLE[1]


def background_mask(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) float32 in 0..255 -> (H, W) bool: what the flood reaches, and openings of the background's colour."""
    import cv2

    light = background_light(pixels)  # (H, W, 3)
    ratio = (pixels + 4.0) / (light + 4.0)  # + 4: on black a level is no change of hue
    low, high = _extremes(ratio)
    spread = high - low
    hue_limit = max(HUE_SPREAD, HUE_NOISE * float(np.quantile(spread[_plane_basis(*low.shape)[1]], 0.8)))
    like = (spread < hue_limit) & (low > DARKEST) & (high < LIGHTEST)
    shade = (1 - low).clip(0, 1) * 255
    like &= _steps(pixels) < (_border_step(pixels) + SHADOW_STEP * shade).clip(max=MOST_STEP)
    framed = np.pad(like, 1, constant_values=True).astype(np.uint8)
    count, labels = cv2.connectedComponents(framed, connectivity=4)
    outside, labels = labels[0, 0], labels[1:-1, 1:-1]
    is_background = np.zeros(count, bool)
    is_background[outside] = True
    product = labels != outside
    alike = (spread < hue_limit) & product & (low > DARKEST)
    if count > 2 and alike.sum() < MOST_ALIKE * product.sum():
        is_background |= _openings(pixels - light, labels, count)
    return is_background[labels] & like


def background_light(pixels: np.ndarray) -> np.ndarray:
    """The border's colour continued over the image as a plane in x and y: (H, W, 3) -> (H, W, 3) float32.

    Least squares, twice without the third of the border that fits worst: a product may touch it.
    """
    basis, ring = _plane_basis(*pixels.shape[:2])
    points, colours = basis[ring], pixels[ring]  # (P, 3), (P, 3)
    error = np.abs(colours - np.median(colours, axis=0)).max(1)
    for _ in range(2):
        kept = error <= np.quantile(error, 2 / 3)
        near = points[kept]
        plane = np.linalg.solve(near.T @ near, near.T @ colours[kept])  # (3, 3)
        error = np.abs(colours - points @ plane).max(1)
    return (basis @ plane).clip(1, 255)


@functools.lru_cache(maxsize=8)
def _plane_basis(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """1, x and y of every pixel (H, W, 3), and which pixels are the border (H, W)."""
    edge = max(1, round(min(height, width) * RING))
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    ring = np.ones((height, width), bool)
    ring[edge:-edge, edge:-edge] = False
    return np.stack([np.ones_like(x), x / width - 0.5, y / height - 0.5], 2), ring


def _extremes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest of three channels; NumPy's own reduction of a short axis takes ten times as long."""
    a, b, c = (values[..., i] for i in range(3))
    return np.minimum(np.minimum(a, b), c), np.maximum(np.maximum(a, b), c)


def _steps(pixels: np.ndarray) -> np.ndarray:
    """Half of the difference between the neighbours left and right, or above and below, whichever is larger: (H, W)."""
    import cv2

    down = np.abs(cv2.Sobel(pixels, cv2.CV_32F, 0, 1, ksize=1))
    right = np.abs(cv2.Sobel(pixels, cv2.CV_32F, 1, 0, ksize=1))
    return _extremes(np.maximum(down, right))[1] / 2


def _border_step(pixels: np.ndarray) -> float:
    """The largest step that is none, from the grain of the border: levels."""
    _, ring = _plane_basis(*pixels.shape[:2])
    return max(STEP, NOISE_STEPS * float(np.quantile(_steps(pixels)[ring], 0.6)))


def _openings(difference: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """(count,) bool: pieces whose mean colour is the background's in its own light or in a soft shadow."""
    flat = labels.ravel()
    size = np.maximum(np.bincount(flat, minlength=count), 1)
    channels = [np.bincount(flat, difference[..., i].ravel(), count) / size for i in range(3)]
    low, high = _extremes(np.stack(channels, 1))
    squares = np.bincount(flat, np.square(difference[..., 1]).ravel(), count) / size
    deviation = np.sqrt(np.maximum(squares - channels[1] ** 2, 0))
    is_lit = np.maximum(np.abs(low), np.abs(high)) < OPENING
    is_shaded = (high < -OPENING) & (deviation > LEAST_SHADE)
    return (is_lit | is_shaded) & (size > SMALLEST_SHARE / 4 * flat.size)


def _soft(pixels: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Pixels beside the background by how far their colour lies from it: (H, W) float32 in [0, 1]."""
    import cv2

    weight = background.astype(np.float32)
    beside = cv2.blur(weight, (5, 5))
    back = cv2.blur(pixels * weight[..., None], (5, 5)) / np.maximum(beside, 1e-4)[..., None]
    front = cv2.blur(pixels * (1 - weight)[..., None], (7, 7))
    front /= np.maximum(1 - cv2.blur(weight, (7, 7)), 1e-4)[..., None]
    contrast = _extremes(np.abs(front - back))[1].clip(min=LEAST_CONTRAST)
    alpha = (_extremes(np.abs(pixels - back))[1] / contrast - LEAST_ALPHA) / (1 - 2 * LEAST_ALPHA)
    return np.where(background, 0, np.where(beside > 0, alpha.clip(0, 1), 1)).astype(np.float32)


def _without_dust(matte: np.ndarray) -> np.ndarray:
    """Without pieces smaller than SMALLEST_SHARE."""
    import cv2

    _, labels, stats, _ = cv2.connectedComponentsWithStats((matte > 0).astype(np.uint8), connectivity=8)
    small = stats[:, cv2.CC_STAT_AREA] < SMALLEST_SHARE * matte.size
    return np.where(small[labels], 0, matte).astype(np.float32)
