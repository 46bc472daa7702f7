"""Line drawings of images, and drawings of any origin in one form: white lines on black, uint8 (H, W).

`canny`: as ControlNet's own annotator, thresholds 100 and 200 (Zhang et al. 2023). `xdog`: extended difference of
Gaussians (Winnemoeller et al. 2012, equations 5 to 7), soft strokes. `contour`: the product's outline
(data_tools.images.border) with the strong edges inside, as a designer's sketch has them. None of them needs weights.
"""

import io
import math
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from data_tools.images import LineMethod
from data_tools.images.border import border_matte, is_plausible
from data_tools.images.decode import BadImage, ImageLimits, decode, encode

LINE_MEMBER = "line.png"  # of a sample in a shard
METHODS: tuple[LineMethod, ...] = ("canny", "xdog", "contour")
Polarity = Literal["dark_on_light", "light_on_dark"]
CANNY = (100, 200)  # as published
INNER_CANNY = (120, 280)  # of a contour drawing: strong edges alone
SHORTEST_EDGE = 1 / 16  # of the longer side: joined inner edges with fewer pixels are texture
XDOG_SIGMA, XDOG_RATIO, XDOG_SHARPNESS = 0.8, 1.6, 20.0
XDOG_LEVEL, XDOG_SLOPE = 0.75, 2.5
VISIBLE = 32  # levels: weaker strokes are none
LEAST_SHARE, MOST_SHARE = 0.0005, 0.65  # of the pixels that are lines: an empty drawing, and no line drawing
PAPER_SHARE = 0.6  # of the pixels that have about the median colour: it is the paper's
MOST_STRETCH = 0.02  # difference of aspect between a drawing and its image that is passed over


class Drawing(NamedTuple):
    """A drawing as the project keeps it, and how it came."""

    lines: np.ndarray
    """(H, W) uint8, white on black."""
    polarity: Polarity
    is_coloured: bool
    """Its strokes or its paper had a hue."""


def extract(image: Image.Image, method: LineMethod) -> np.ndarray:
    """RGB image (W, H) -> (H, W) uint8, white lines on black."""
    if method == "canny":
        return canny(np.asarray(image.convert("RGB")))
    if method == "xdog":
        return xdog(np.asarray(image.convert("L")))
    if method == "contour":
        return contour(image)
    raise ValueError(f"unknown method {method!r}: choose {', '.join(METHODS)}")


def canny(pixels: np.ndarray, thresholds: tuple[int, int] = CANNY) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (H, W) uint8, 0 or 255."""
    import cv2

    return cv2.Canny(np.ascontiguousarray(pixels), *thresholds)


def xdog(grey: np.ndarray) -> np.ndarray:
    """(H, W) uint8 -> (H, W) uint8; dark sides of edges and dark regions become strokes."""
    import cv2

    grey = grey.astype(np.float32) / 255
    narrow = cv2.GaussianBlur(grey, (0, 0), XDOG_SIGMA)
    wide = cv2.GaussianBlur(grey, (0, 0), XDOG_SIGMA * XDOG_RATIO)
    # a flat region has the value 1 whatever its tone: lines alone stay, no hatching of dark products
    sharpened = 1 + XDOG_SHARPNESS * (narrow - wide)
    ink = np.tanh(XDOG_SLOPE * np.maximum(XDOG_LEVEL - sharpened, 0))
    return np.round(255 * ink).astype(np.uint8)


def contour(image: Image.Image) -> np.ndarray:
    """RGB image -> (H, W) uint8, 0 or 255: one pixel of outline, and long strong edges inside of it.

    Where no plain background is found there is no outline, and the long strong edges of the whole image are it.
    """
    import cv2

    pixels = np.asarray(image.convert("RGB"))
    matte = border_matte(image)
    product = (matte > 0.5).astype(np.uint8) if is_plausible(matte) else np.ones(pixels.shape[:2], np.uint8)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    outline = product - cv2.erode(product, cross)  # the frame is no outline: the product goes on behind it
    smooth = cv2.bilateralFilter(pixels, 5, 40, 3)
    edges = cv2.Canny(smooth, *INNER_CANNY)
    # the image's own edge along the outline would double it
    inside = cv2.erode(product, np.ones((5, 5), np.uint8))
    edges = np.where(inside > 0, edges, 0).astype(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(edges, connectivity=8)
    is_long = stats[:, cv2.CC_STAT_AREA] >= SHORTEST_EDGE * max(edges.shape)
    is_long[0] = False
    return np.where((outline > 0) | is_long[labels], 255, 0).astype(np.uint8)


# --- drawings that are given ----------------------------------------------------------------------------------


def read_drawing(data: bytes, limits: ImageLimits | None = None) -> Drawing:
    """Any image file of a drawing: its strokes in white on black, their levels kept.

    Raises BadImage for bytes that are no image; ValueError for an empty drawing, or for what is no line drawing.
    """
    image = decode(data, limits)
    drawing = normalise(image)
    if _share(drawing.lines) < LEAST_SHARE:  # white strokes on nothing: on white paper they cannot be seen
        drawing = normalise(decode(data, limits, background="black"))
    return require_lines(drawing)


def normalise(image: Image.Image) -> Drawing:
    """RGB image -> its strokes: how far a pixel is from the paper, in the channel where it is farthest.

    The paper is white where the mean is above a half, else black; or the median colour, where most pixels are of about
    that: grey, cream and blueprint paper, scans and photographs of paper.
    """
    pixels = np.asarray(image.convert("RGB")).astype(np.int16)
    step = max(1, max(pixels.shape) // 512)
    some = pixels[::step, ::step]
    paper = np.median(some, (0, 1)).astype(np.int16)
    if (np.abs(some - paper).max(2) <= VISIBLE).mean() < PAPER_SHARE:
        paper = np.full(3, 255 if pixels.mean() > 127.5 else 0, np.int16)
    is_dark_on_light = bool(pixels.mean() <= paper.mean())
    farther = paper - pixels if is_dark_on_light else pixels - paper
    most = (
        int(paper.max()) if is_dark_on_light else 255 - int(paper.min())
    )  # of the strongest stroke on such paper
    lines = (farther.max(2).clip(0, most) * (255 / max(1, most))).round().astype(np.uint8)
    is_coloured = bool(((pixels.max(2) - pixels.min(2)) > VISIBLE).mean() > LEAST_SHARE / 2)
    return Drawing(lines, "dark_on_light" if is_dark_on_light else "light_on_dark", is_coloured)


def require_lines(drawing: Drawing) -> Drawing:
    """Raises ValueError for an empty drawing, or where too much is inked for a line drawing."""
    share = _share(drawing.lines)
    if share < LEAST_SHARE:
        raise ValueError("the drawing is empty")
    if share > MOST_SHARE:
        raise ValueError(
            f"{share:.0%} of it is inked, so it is no line drawing: make one of it with canny, xdog or contour"
        )
    return drawing


def line_density(lines: np.ndarray) -> float:
    """Mean ink of (H, W) uint8, 0 to 1."""
    return float(lines.mean()) / 255


def _share(lines: np.ndarray) -> float:
    return float((lines > VISIBLE).mean())


def same_aspect(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Whether two sizes (W, H) have the same shape but for rounding."""
    return abs(first[0] * second[1] - second[0] * first[1]) <= MOST_STRETCH * first[0] * second[1]


def resize_lines(lines: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) uint8 to `size` (W, H). Strokes that would fade below a pixel are made one pixel wide first."""
    import cv2

    height, width = lines.shape
    if (width, height) == size:
        return lines
    shrink = max(width / size[0], height / size[1])
    if shrink <= 1:
        return cv2.resize(lines, size, interpolation=cv2.INTER_LINEAR)
    if (missing := shrink - stroke_width(lines)) > 0:
        side = math.ceil(missing) + 1
        lines = cv2.dilate(lines, np.ones((side, side), np.uint8))
    return cv2.resize(lines, size, interpolation=cv2.INTER_AREA)


def stroke_width(lines: np.ndarray) -> float:
    """Mean width of the strokes in pixels: a long stroke has twice its length in boundary pixels."""
    import cv2

    ink = (lines > 127).astype(np.uint8)
    area = int(ink.sum())
    inside = int(cv2.erode(ink, np.ones((3, 3), np.uint8)).sum())
    return 1.0 if area == inside else max(1.0, 2 * area / (area - inside)) if inside else 1.0


def fit_lines(lines: np.ndarray, size: int) -> np.ndarray:
    """A drawing of any shape on a square of `size` pixels: black bars, nothing cut off or stretched: (size, size)."""
    height, width = lines.shape
    scale = size / max(height, width)
    inner = resize_lines(lines, (max(1, round(width * scale)), max(1, round(height * scale))))
    square = np.zeros((size, size), np.uint8)
    top, left = (size - inner.shape[0]) // 2, (size - inner.shape[1]) // 2
    square[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
    return square


def open_drawing(data: bytes, size: int) -> tuple[np.ndarray, str]:
    """A drawing from a user's file on a square of `size` pixels (size, size), and a note of what was done to it.

    Raises ValueError saying what is wrong with it.
    """
    try:
        drawing = read_drawing(data)
    except BadImage as error:
        raise ValueError(f"no readable image: {error}") from error
    height, width = drawing.lines.shape
    notes = [] if same_aspect((width, height), (1, 1)) else [f"{width} x {height}, so bars were added"]
    notes += ["its colours were left out"] if drawing.is_coloured else []
    return fit_lines(drawing.lines, size), "; ".join(notes)


# --- in shards -------------------------------------------------------------------------------------------------


def encode_lines(lines: np.ndarray) -> bytes:
    """(H, W) uint8 as a PNG; one bit a pixel where there are no levels between black and white."""
    is_binary = bool(((lines == 0) | (lines == 255)).all())
    image = Image.fromarray(lines)
    return encode(image.convert("1", dither=Image.Dither.NONE) if is_binary else image, "png")


def decode_lines(data: bytes) -> np.ndarray:
    """The inverse: (H, W) uint8. Raises ValueError for bytes that are no PNG of one channel."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.mode not in ("1", "L"):
                raise ValueError(f"line.png is a PNG of mode {image.mode}, not of one channel")
            return np.asarray(image.convert("L"))
    except (OSError, SyntaxError) as error:
        raise ValueError("line.png is damaged") from error
