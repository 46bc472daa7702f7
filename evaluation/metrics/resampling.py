"""Intervals by bootstrap over prompts: the images of one prompt are no independent trials, the prompts are.

Every metric is computed on the same drawings of prompts, which depend on the set of prompts and the seed alone, so the
difference of two systems on the same prompts has a paired interval, whatever the metric. Efron and Tibshirani 1993,
chapters 8 (units that are resampled) and 10 (bias).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics.statistics import Interval, wilson

Floats = NDArray[np.float64]


class Resampling:
    """How often every image counts in each of `replicates` resamplings of the prompts, with replacement.

    A set with a single prompt resamples images instead.
    """

    def __init__(self, texts: Sequence[str], replicates: int = 1000, seed: int = 0) -> None:
        """`texts` (N,): the prompt of every image."""
        if not len(texts):
            raise ValueError("no images to measure")
        self.texts, self.replicates, self.seed = list(texts), replicates, seed
        self.prompts = sorted(set(texts))  # the order of the images does not matter
        index_of = {text: i for i, text in enumerate(self.prompts)}
        self.prompt_of = np.array([index_of[text] for text in texts])
        if len(self.prompts) == 1:
            self.unit_of, units = np.arange(len(texts)), len(texts)
        else:
            self.unit_of, units = self.prompt_of, len(self.prompts)
        rng = np.random.default_rng([seed, units])
        chosen = rng.integers(0, units, (replicates, units))
        counts = np.zeros((replicates, units), np.int64)
        np.add.at(counts, (np.arange(replicates)[:, None], chosen), 1)
        self.counts = counts  # (replicates, units)

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def unit(self) -> str:
        return "images" if len(self.prompts) == 1 else "prompts"

    def weights(self, rows: NDArray | None = None, replicates: int | None = None) -> Floats:
        """(replicates, N): how often each image counts; `rows`: of these images only."""
        units = self.unit_of if rows is None else self.unit_of[rows]
        return self.counts[: replicates or self.replicates][:, units].astype(np.float64)

    def by_prompt(self, values: Floats) -> dict[str, float]:
        """Mean of the finite values (N,) of every prompt that has one."""
        known = np.isfinite(values)
        sums = np.bincount(self.prompt_of[known], values[known], len(self.prompts))
        counts = np.bincount(self.prompt_of[known], minlength=len(self.prompts))
        return {p: float(s / c) for p, s, c in zip(self.prompts, sums, counts, strict=True) if c}


@dataclass(frozen=True)
class Estimate:
    """A metric before it has a name."""

    interval: Interval
    count: int
    """Images that it is over."""
    replicates: Floats = field(repr=False, compare=False)
    """The metric on each replicate; NaN where a replicate has no image that counts."""
    by_prompt: dict[str, float] = field(default_factory=dict, repr=False)
    """Its mean over the images of each prompt, for metrics that are means."""


def interval_of(value: float, replicates: Floats, least: float = -np.inf, most: float = np.inf) -> Interval:
    """95 %: the quantiles of the drawings moved so that their mean is the value, within [least, most].

    The move takes the bias out: a drawing holds fewer different images than the set, which makes a Frechet distance
    larger and a coverage smaller; for means it does nothing.
    """
    known = replicates[np.isfinite(replicates)]
    if len(known) < 2:
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(known, [0.025, 0.975]) + (value - known.mean())
    return Interval(value, float(np.clip(low, least, most)), float(np.clip(high, least, most)))


def mean_estimate(values: Floats, resampling: Resampling, is_share: bool = False) -> Estimate | None:
    """Mean of the finite ones of (N,) values, None where there is none.

    `is_share`: values are 0 or 1, and where all are equal, so that drawings differ in nothing, the interval is
    Wilson's over the units.
    """
    values = np.asarray(values, np.float64)
    rows = np.flatnonzero(np.isfinite(values))
    if not len(rows):
        return None
    weights, known = resampling.weights(rows), values[rows]
    totals = weights.sum(1)
    with np.errstate(invalid="ignore"):
        replicates = np.where(totals > 0, weights @ known / totals, np.nan)
    value = float(known.mean())
    interval = interval_of(value, replicates, *((0.0, 1.0) if is_share else ()))
    units = len(set(resampling.unit_of[rows].tolist()))
    if units == 1 and not is_share:
        interval = Interval(value, float("nan"), float("nan"))
    elif is_share and (value in (0.0, 1.0) or units == 1):
        found = wilson(round(value * units), units)
        interval = Interval(value, max(0.0, min(found.low, value)), min(1.0, max(found.high, value)))
    return Estimate(interval, len(rows), replicates, resampling.by_prompt(values))


def set_estimate(
    statistic: Callable[[Floats], float],
    resampling: Resampling,
    replicates: int,
    least: float = -np.inf,
    most: float = np.inf,
    rows: NDArray | None = None,
) -> Estimate:
    """A statistic of a whole set, `statistic(weights (N,)) -> float`, on the first `replicates` resamplings.

    `rows`: the images that it looks at; all where None.
    """
    count = len(resampling) if rows is None else len(rows)
    value = statistic(np.ones(count))
    found = np.array([statistic(weights) for weights in resampling.weights(rows, replicates)])
    return Estimate(interval_of(value, found, least, most), count, found)


def difference(value_a: float, replicates_a: Floats, value_b: float, replicates_b: Floats) -> Interval:
    """a - b over the same drawings of the same prompts. Raises ValueError for other numbers of drawings."""
    if len(replicates_a) != len(replicates_b):
        raise ValueError(
            f"{len(replicates_a)} and {len(replicates_b)} replicates do not pair: measure both with the same options"
        )
    return interval_of(value_a - value_b, replicates_a - replicates_b)
