"""What choosing the best of n is worth: curves over n, chosen by a ranker, judged by another network.

A prompt with N images gives floor(N / n) choices among n different ones; their mean is its value at width n. So
width 1 is the mean of all N, the expectation of a random image, and all widths see the same images.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.compare.parts import Networks, Part
from evaluation.metrics.attributes import SlotHits, SlotWords, judged_categories, judged_colors, pixel_colors
from evaluation.metrics.features import RankerTower
from evaluation.metrics.pixel_colors import ColorHistogram, PixelColors
from evaluation.metrics.resampling import Resampling, difference, mean_estimate
from evaluation.metrics.statistics import Interval
from evaluation.sets import LIKELIHOOD, SampleSet
from rankers.base import identities

ALL_NAMED = "all that is named right"


@dataclass(frozen=True)
class Point:
    """One width of a curve."""

    width: int
    value: Interval
    gain: Interval
    """Value minus that of width 1 on the same prompts."""
    prompts: int

    def to_json(self) -> dict[str, Any]:
        return {
            "width": self.width,
            "prompts": self.prompts,
            **{name: vars(getattr(self, name)) for name in ("value", "gain")},
        }


@dataclass(frozen=True)
class Curve:
    """One measure over widths."""

    name: str
    """What the judge looks for."""
    scorer: str
    """Who chose."""
    points: tuple[Point, ...]
    by_prompt: NDArray = field(repr=False, compare=False)
    """(widths, prompts), NaN where the prompt does not count."""


def score_images(samples: SampleSet, ranker: Any, part: Part) -> SampleSet:
    """Scores of every image by `ranker`, from kept features where it has towers."""
    if not hasattr(ranker, "image_features"):
        return samples.scored(ranker.name, ranker.score)
    images = part.features(RankerTower(ranker))  # (N, D)
    texts = samples.texts
    features = dict(zip(texts, ranker.text_features(texts).numpy(), strict=True))
    scores = [float(features[s.text] @ row) for s, row in zip(samples.samples, images, strict=True)]
    return samples.with_scores(ranker.name, scores)


def scorer_of(samples: SampleSet, ranker: Any | None) -> str:
    """Whose scores choose: the ranker's, else the generator's own likelihoods; "" where there are none."""
    if ranker is not None:
        return ranker.name
    return LIKELIHOOD if all(LIKELIHOOD in s.scores for s in samples.samples) else ""


def check_independent(ranker: Any, networks: Networks) -> None:
    """Raises ValueError when a network that measures would also choose."""
    for name, identity in networks.identities.items():
        if identity in identities(ranker):
            raise ValueError(
                f"{ranker.name} chooses the images, so {name} cannot judge them too: name another network, or "
                "another --ranker"
            )


def judged(
    networks: Networks, lexicon: SlotWords, part: Part, measured: PixelColors | None = None
) -> dict[str, NDArray]:
    """(N,) values by name: whether category, colour, and all of these that a text names are right by the judge, and
    whether the pixels have the colour by `measured`.

    NaN where the text names none of them.
    """
    found: dict[str, SlotHits | None] = {}
    if networks.judge is not None:
        features = part.features(networks.judge.network)
        found["category right"] = judged_categories(networks.judge, part.texts, features)
        found["colour right"] = judged_colors(networks.judge, lexicon, part.texts, features)
    values = {name: hits.hits for name, hits in found.items() if hits is not None}
    if len(values) == 2:
        both = np.stack(list(values.values()))
        named = np.isfinite(both)
        values[ALL_NAMED] = np.where(named.any(0), np.where(named, both, 1.0).min(0), np.nan)
    if measured is not None:
        hits = pixel_colors(measured, lexicon, part.texts, part.features(ColorHistogram()))
        values |= {} if hits is None else {"colour right, pixels": hits.hits}
    return values


def values_by_prompt(samples: SampleSet, values: Sequence[float], scorer: str, width: int) -> NDArray:
    """(prompts,) in the order of `samples.texts`: the mean value of the chosen ones at `width`."""
    value_of = dict(zip((s.path for s in samples.samples), values, strict=True))
    found = []
    for group in samples.by_prompt().values():
        runs = [group[i : i + width] for i in range(0, len(group) - width + 1, width)]
        best = [max(run, key=lambda s: s.scores[scorer]) if width > 1 else run[0] for run in runs]
        found.append(np.mean([value_of[sample.path] for sample in best]) if best else np.nan)
    return np.array(found, np.float64)


def curve(
    samples: SampleSet,
    name: str,
    values: Sequence[float],
    scorer: str,
    widths: Sequence[int],
    replicates: int = 2000,
    seed: int = 0,
) -> Curve | None:
    """The curve of (N,) values; None where no prompt counts. Widths beyond the images of a prompt are left out.

    Raises ValueError for an image without the scorer's score.
    """
    unscored = [s.path for s in samples.samples if scorer not in s.scores]
    if unscored and max(widths) > 1:
        raise ValueError(f"{unscored[0]} has no score {scorer!r}: nothing to choose by")
    fewest = min(len(group) for group in samples.by_prompt().values())
    widths = sorted({1, *(w for w in widths if w <= fewest)})
    rows = np.stack([values_by_prompt(samples, values, scorer, width) for width in widths])
    resampling = Resampling(samples.texts, replicates, seed)
    found = np.asarray(values, np.float64)
    is_share = bool(np.isin(found[np.isfinite(found)], (0.0, 1.0)).all())
    estimates = [mean_estimate(row, resampling, is_share) for row in rows]
    if estimates[0] is None:
        return None
    single = estimates[0]
    points = []
    for width, estimate in zip(widths, estimates, strict=True):
        gain = difference(
            estimate.interval.value, estimate.replicates, single.interval.value, single.replicates
        )
        points.append(Point(width, estimate.interval, gain, estimate.count))
    return Curve(name, scorer, tuple(points), rows)


def chosen_set(samples: SampleSet, ranker: Any | None, width: int) -> SampleSet:
    """The best of the first `width` of every text, marked with who chose, so that it cannot judge them."""
    scorer = scorer_of(samples, ranker)
    best = samples.best_of(width, scorer)
    if ranker is not None and width > 1:
        best.settings["encoders"] = identities(ranker)
    return best
