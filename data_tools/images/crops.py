"""The augmentation products bear: a mild random crop and a mirror image. Colour is never touched, it is a label."""

from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class CropFlip:
    """A square crop of at least `min_scale` of the short side, flipped left to right half of the time."""

    min_scale: float = 0.8
    """Smallest crop side as a share of the image's short side, in (0, 1]; 1 takes the centre crop."""
    flip: bool = True
    """Mirror half of the images; off where text on the goods matters."""

    def __post_init__(self) -> None:
        if not 0 < self.min_scale <= 1:
            raise ValueError(f"min_scale must lie in (0, 1], not {self.min_scale}")

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        short = min(image.size)
        side = max(1, round(short * rng.uniform(self.min_scale, 1.0))) if self.min_scale < 1 else short
        left = _offset(image.width - side, short - side, rng)
        top = _offset(image.height - side, short - side, rng)
        image = image.crop((left, top, left + side, top + side))
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image


def _offset(room: int, play: int, rng: np.random.Generator) -> int:
    """Around the centre of `room`, moved by at most half of `play`: the goods stand in the middle."""
    low = max(0, (room - play) // 2)
    return low + int(rng.integers(0, min(play, room) + 1))
