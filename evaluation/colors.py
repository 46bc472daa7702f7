"""The colour of the goods in a picture, measured in its pixels and named.

The ground is what is connected to the border and looks like it; the rest is the goods. Each of their pixels
votes for the colour name whose tone is nearest in CIELAB. Outlines, shadows and pale patterns vote for
nothing, or for black and white, and these two win only where there is no colour: stripes and dots on
coloured goods are white. The limits below were set on synthetic pictures of another seed than the tests
use.
"""

import numpy as np
from PIL import Image

from data_tools.synthetic import COLOR_RGB

_SIDE = 64
_GROUND_DISTANCE = 7.0  # CIELAB distance up to which a pixel may be ground
_COLORED_SHARE = 0.07  # of the goods' pixels that must vote for colours before black and white are out
_BLACK_TO_WHITE = 0.6  # votes for black over votes for white above which goods are black: soles are dark too
_BRIGHT_TO_BROWN = 0.2  # votes for orange or red over votes for brown above which brown is only their shade
_TONE_WIDTH = 18.0  # CIELAB distance at which a vote counts for 60 %


def dominant_color(image: Image.Image) -> str:
    """Name of the goods' colour, a key of COLOR_RGB, in an RGB picture of any size."""
    votes = color_votes(image)
    colored = {name: share for name, share in votes.items() if name not in ("black", "white")}
    if sum(colored.values()) < _COLORED_SHARE:
        return "black" if votes["black"] > _BLACK_TO_WHITE * votes["white"] else "white"
    best = max(colored, key=colored.get)
    if best == "brown":  # shaded orange and red look brown, brown never looks like bright orange or red
        bright = max(("orange", "red"), key=votes.get)
        return bright if votes[bright] > _BRIGHT_TO_BROWN * votes["brown"] else "brown"
    return best


def color_votes(image: Image.Image) -> dict[str, float]:
    """Share of the goods' pixels that vote for each name; the rest of 1 votes for nothing."""
    small = image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    rgb = np.asarray(small, dtype=np.float32) / 255.0
    lab = _lab(rgb)
    goods = goods_mask(rgb)
    if goods.mean() < 0.01:  # nothing stands out: white on white
        return {name: float(name == "white") for name in COLOR_RGB}
    names = list(COLOR_RGB)
    tones = _lab(np.asarray(list(COLOR_RGB.values()), dtype=np.float32)[None] / 255.0)[0]
    distance = np.linalg.norm(lab[goods][:, None] - tones, axis=2)  # (P, names)
    nearest = distance.argmin(axis=1)
    weight = np.exp(-0.5 * (distance.min(axis=1) / _TONE_WIDTH) ** 2)
    sums = np.bincount(nearest, weights=weight, minlength=len(names)) / len(nearest)
    return dict(zip(names, sums.tolist(), strict=True))


def goods_mask(rgb: np.ndarray) -> np.ndarray:
    """(S, S) bool from (S, S, 3) in [0, 1]: pixels that no path of ground-like pixels joins to the border."""
    import cv2

    border = [rgb[:2], rgb[-2:], rgb[:, :2], rgb[:, -2:]]
    ground = np.median(np.concatenate([side.reshape(-1, 3) for side in border]), axis=0)
    like = np.linalg.norm(_lab(rgb) - _lab(ground[None, None]), axis=2) < _GROUND_DISTANCE
    if np.ptp(ground) > 0.1:  # wood: darker planks and shadows keep its hue, brown goods do not
        ratio = rgb / np.maximum(ground, 1e-3)
        like |= (np.ptp(ratio, axis=2) < 0.12) & (ratio.mean(axis=2) > 0.5) & (ratio.mean(axis=2) < 1.12)
    framed = np.pad(like, 1, constant_values=True).astype(np.uint8)
    _, labels = cv2.connectedComponents(framed, connectivity=4)
    return labels[1:-1, 1:-1] != labels[0, 0]


def _lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of (H, W, 3) sRGB in [0, 1]: lightness 0..100, a and b about -100..100."""
    import cv2

    return cv2.cvtColor(np.ascontiguousarray(rgb, dtype=np.float32), cv2.COLOR_RGB2LAB)
