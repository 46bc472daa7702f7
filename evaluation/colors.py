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
_NUM_COLORED = len(COLOR_RGB) - 2  # black and white stand last
_GROUND_DISTANCE = 7.0  # CIELAB distance up to which a pixel may be ground
_COLORED_SHARE = 0.07  # of the goods' pixels that must vote for colours before black and white are out
_BLACK_TO_WHITE = 0.6  # votes for black over votes for white above which goods are black: soles are dark too
_BRIGHT_TO_BROWN = 0.2  # votes for orange or red over votes for brown above which brown is only their shade
_VIVID = 0.75  # of the 90th percentile of chroma: paler pixels do not say which colour it is
_TONE_WIDTH = 18.0  # CIELAB distance at which a vote counts for 60 %


def dominant_color(image: Image.Image) -> str:
    """Name of the goods' colour, a key of COLOR_RGB, in an RGB picture of any size."""
    lab = goods_lab(image)
    votes = tone_votes(lab)
    if sum(votes[:_NUM_COLORED]) < _COLORED_SHARE:
        black, white = votes[_NUM_COLORED:]
        return "black" if black > _BLACK_TO_WHITE * white else "white"
    vivid = dict(zip(list(COLOR_RGB)[:_NUM_COLORED], tone_votes(_most_vivid(lab), _NUM_COLORED), strict=True))
    best = max(vivid, key=vivid.get)
    if best == "brown":  # shaded orange and red look brown, brown never looks like bright orange or red
        bright = max(("orange", "red"), key=vivid.get)
        return bright if vivid[bright] > _BRIGHT_TO_BROWN * vivid["brown"] else "brown"
    return best


def goods_lab(image: Image.Image) -> np.ndarray:
    """(P, 3): the goods' pixels in CIELAB; one white pixel where nothing stands out, white on white."""
    small = image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    rgb = np.asarray(small, dtype=np.float32) / 255.0
    goods = goods_mask(rgb)
    return lab_of(rgb)[goods] if goods.mean() >= 0.01 else _tones()[-1:]


def tone_votes(lab: np.ndarray, num_tones: int = len(COLOR_RGB)) -> list[float]:
    """Share of the pixels (P, 3) that vote for each of the first tones; the rest of 1 votes for nothing."""
    distance = np.linalg.norm(lab[:, None] - _tones()[:num_tones], axis=2)  # (P, tones)
    weight = np.exp(-0.5 * (distance.min(axis=1) / _TONE_WIDTH) ** 2)
    return (np.bincount(distance.argmin(axis=1), weight, num_tones) / len(lab)).tolist()


def _most_vivid(lab: np.ndarray) -> np.ndarray:
    """Blurred stripes mix with what is between them, but not everywhere: the purest of the coloured pixels."""
    distance = np.linalg.norm(lab[:, None] - _tones(), axis=2)
    colored = lab[distance.argmin(axis=1) < _NUM_COLORED]
    chroma = np.hypot(colored[:, 1], colored[:, 2])
    return colored[chroma >= _VIVID * np.percentile(chroma, 90)]


def _tones() -> np.ndarray:
    """(10, 3): COLOR_RGB in CIELAB, black and white last."""
    return lab_of(np.asarray([list(COLOR_RGB.values())], dtype=np.float32) / 255.0)[0]


def goods_mask(rgb: np.ndarray) -> np.ndarray:
    """(S, S) bool from (S, S, 3) in [0, 1]: pixels that no path of ground-like pixels joins to the border."""
    import cv2

    border = [rgb[:2], rgb[-2:], rgb[:, :2], rgb[:, -2:]]
    ground = np.median(np.concatenate([side.reshape(-1, 3) for side in border]), axis=0)
    like = np.linalg.norm(lab_of(rgb) - lab_of(ground[None, None]), axis=2) < _GROUND_DISTANCE
    if np.ptp(ground) > 0.1:  # wood: darker planks and shadows keep its hue, brown goods do not
        ratio = rgb / np.maximum(ground, 1e-3)
        like |= (np.ptp(ratio, axis=2) < 0.12) & (ratio.mean(axis=2) > 0.5) & (ratio.mean(axis=2) < 1.12)
    framed = np.pad(like, 1, constant_values=True).astype(np.uint8)
    _, labels = cv2.connectedComponents(framed, connectivity=4)
    return labels[1:-1, 1:-1] != labels[0, 0]


def lab_of(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of (H, W, 3) sRGB in [0, 1]: lightness 0..100, a and b about -100..100."""
    import cv2

    return cv2.cvtColor(np.ascontiguousarray(rgb, dtype=np.float32), cv2.COLOR_RGB2LAB)
