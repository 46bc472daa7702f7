"""What a score means: its place among the scores of real images with their own captions and with others'.

A bare cosine says little (0.4 is a match for one ranker and a mismatch for another), so reports show the share of real
matched pairs that score lower, and the margin over hard negatives: the same title with another colour or another
category. `rankers.train` writes `calibration.json` beside the weights; rankers.calibrate makes one for any ranker.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from common.config import from_mapping, to_mapping
from common.files import read_json, write_json
from data_tools.rules.colors import find_color

FILE = "calibration.json"
CACHE = Path("runs/calibration")
NUM_QUANTILES = 101


@dataclass(frozen=True)
class NegativeWords:
    """Words that make hard negatives."""

    EARLIER_NAMES: ClassVar = {"kinds": "categories"}
    colors: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()


@functools.cache
def default_lexicon() -> NegativeWords:
    return from_mapping(
        NegativeWords, read_json(Path(__file__).parent / "lexicon.json"), where="lexicon.json"
    )


@dataclass(frozen=True)
class Calibration:
    """Quantiles 0, 0.01 ... 1 of the scores of real images, and the words of their captions."""

    EARLIER_NAMES: ClassVar = {"num_pictures": "num_images"}
    ranker: str
    data: str
    num_images: int
    matched: tuple[float, ...]
    """Scores of images with their own captions."""
    mismatched: tuple[float, ...]
    """Scores of images with captions of others that are not true of them."""
    margin: tuple[float, ...]
    """Own caption minus the best hard negative; empty when the captions hold no known word."""
    lexicon: NegativeWords = field(default_factory=NegativeWords)

    def percentile(self, score: float) -> float:
        """Share of real matched pairs that score lower, in percent."""
        return place_among(self.matched, score)

    def mismatched_percentile(self, score: float) -> float:
        """Share of real mismatched pairs that score lower, in percent."""
        return place_among(self.mismatched, score)

    def save(self, path: Path) -> None:
        write_json(path, to_mapping(self))

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Raises FileNotFoundError or ValueError naming the file."""
        if not path.is_file():
            raise FileNotFoundError(f"no calibration file {path}")
        values = read_json(path)
        names = ("ranker", "data", "matched", "mismatched", "margin", "lexicon")
        missing = [n for n in names if not isinstance(values, dict) or n not in values]
        if missing:
            raise ValueError(f"{path} is no calibration file: it lacks {', '.join(missing)}")
        return from_mapping(cls, values, where=str(path))


def place_among(quantiles: Sequence[float], score: float) -> float:
    """Percent of the distribution below `score`, between quantiles by interpolation."""
    return float(np.interp(score, quantiles, np.linspace(0.0, 100.0, len(quantiles))))


def quantiles(values: Any) -> tuple[float, ...]:
    """Of any number of values; () of none. Rounded to 6 places and strictly rising, so that they can be inverted."""
    if not len(values):
        return ()
    found = np.quantile(np.asarray(values, dtype=np.float64), np.linspace(0, 1, NUM_QUANTILES))
    steps = np.round(found, 6) + np.arange(NUM_QUANTILES) * 1e-9
    return tuple(float(v) for v in steps)


def find_calibration(name: str, directory: Path | None = None) -> Calibration | None:
    """Beside the weights, else what `python -m rankers.calibrate` left for that name, else None."""
    beside = directory / FILE if directory else None
    for path in (beside, cache_path(name)):
        if path and path.is_file():
            return Calibration.load(path)
    return None


def cache_path(name: str) -> Path:
    return CACHE / ("".join(c if c.isalnum() or c in "-_." else "_" for c in name) + ".json")


# --- hard negatives ------------------------------------------------------------------------------------------------


def hard_negatives(text: str, lexicon: NegativeWords) -> list[str]:
    """The text with another colour, then with another category of goods; [] where it names neither.

    The longest known word counts, and a colour inside the category's name ("red grapefruit") is left alone.
    """
    category = longest_word(text, lexicon.categories)
    start = text.find(category) if category else -1
    outside = text if start < 0 else text[:start] + "\0" * len(category) + text[start + len(category) :]
    color, at = find_color(outside, lexicon.colors)
    found = []
    if color:
        found += [text[:at] + c + text[at + len(color) :] for c in lexicon.colors if c != color]
    if category:
        others = (k for k in lexicon.categories if k not in category and category not in k)
        found += [text[:start] + k + text[start + len(category) :] for k in others]
    return found


def longest_word(text: str, words: Sequence[str]) -> str:
    return max((w for w in words if w in text), key=len, default="")


# --- making one ----------------------------------------------------------------------------------------------------


def require_mismatches(pairs: Any, data: str) -> None:
    """Raises ValueError where every caption is true of every image: a training checks it before its first step."""
    if bool(pairs.describes().all()):
        raise ValueError(
            f"the validation images of {data} have no two different captions: nothing to calibrate on; give each "
            "image its own caption, or hold out more images (data_tools.shard --val-share)"
        )


def calibrate(
    ranker: Any, pairs: Any, lexicon: NegativeWords, data: str, mismatched_each: int = 20, seed: int = 0
) -> Calibration:
    """From real images with captions (`rankers.retrieval.Pairs`) and a ranker that scores matrices.

    Raises ValueError as `require_mismatches`.
    """
    require_mismatches(pairs, data)
    captions = sorted(set(pairs.captions))
    row = {caption: i for i, caption in enumerate(captions)}
    scores = ranker.score_matrix(captions, pairs.images).numpy()  # (T, N)
    own = np.array([row[c] for c in pairs.captions])
    matched = scores[own, np.arange(len(own))]
    true = pairs.describes().numpy()[:, [pairs.captions.index(c) for c in captions]].T  # (T, N)
    rng = np.random.default_rng(seed)
    columns = rng.integers(0, len(own), (len(captions), mismatched_each))
    rows = np.repeat(np.arange(len(captions))[:, None], mismatched_each, axis=1)
    mismatched = scores[rows, columns][~true[rows, columns]]
    if not len(mismatched):  # true ones were drawn by chance
        mismatched = scores[~true]
    margins = _margins(ranker, pairs, lexicon, matched)
    return Calibration(
        ranker.name, data, len(own), quantiles(matched), quantiles(mismatched), quantiles(margins), lexicon
    )


def _margins(
    ranker: Any, pairs: Any, lexicon: NegativeWords, matched: np.ndarray, limit: int = 100
) -> list[float]:
    """Over the first `limit` images."""
    margins = []
    for i in range(min(limit, len(pairs.captions))):
        wrong = hard_negatives(pairs.captions[i], lexicon)
        if wrong:
            scores = ranker.score_matrix(wrong, [pairs.images[i]])
            margins.append(float(matched[i] - scores.max()))
    return margins
