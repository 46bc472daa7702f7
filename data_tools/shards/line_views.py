"""Line drawings of the views of an image: what token shards keep beside the codes of each view.

`given` moves the drawing of the sample as its image is moved; the others draw each view anew, at the size in which it
is encoded, so that lines and codes lie on each other exactly.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from PIL import Image

from data_tools.augment import Chain, ImageAugment
from data_tools.images.line_drawings import METHODS, extract, resize_lines

LineSource = Literal["none", "given", "canny", "xdog", "contour", "mixed"]
Augment = Callable[[Image.Image, np.random.Generator], Image.Image]


def extract_views(source: LineSource, views: Sequence[Image.Image]) -> np.ndarray:
    """A views (S, S) RGB -> their drawings below each other (A S, S) uint8; mixed: the methods in turn, canny first."""
    methods = METHODS if source == "mixed" else (source,)
    return np.concatenate([extract(view, methods[i % len(methods)]) for i, view in enumerate(views)])


def move_lines(
    lines: np.ndarray,
    image_size: tuple[int, int],
    augment: Augment,
    generators: Iterator[np.random.Generator],
    side: int,
) -> np.ndarray:
    """The plain view, then one a generator, of a drawing (H, W) of an image of `image_size` (W, H): (A S, S) uint8.

    The generators are those of the image's own views, in the same state.
    """
    drawing = Image.fromarray(resize_lines(lines, image_size)).convert(
        "RGB"
    )  # augmentations know images in colour
    augment = without_light(augment)
    views = [drawing, *(augment(drawing, rng) for rng in generators)]
    return np.concatenate([_square(view, side) for view in views])


def without_light(augment: Augment) -> Augment:
    """The same movements; lines keep their levels. What it draws from a generator stays the same."""
    if isinstance(augment, Chain):
        return Chain(tuple(without_light(step) for step in augment.steps))
    return replace(augment, brightness=0.0) if isinstance(augment, ImageAugment) else augment


def _square(view: Image.Image, side: int) -> np.ndarray:
    """The centre square, scaled so that thin lines stay visible: (S, S) uint8"""
    short = min(view.size)
    left, top = (view.width - short) // 2, (view.height - short) // 2
    square = view.crop((left, top, left + short, top + short))
    return resize_lines(np.ascontiguousarray(np.asarray(square)[..., 0]), (side, side))
