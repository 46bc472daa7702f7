"""A line of the table of evaluation, and what two lines differ by."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics.features import FeatureNetwork
from evaluation.metrics.resampling import Estimate, difference
from evaluation.metrics.statistics import Interval

PUBLISHED = "inception-v3"
PLAIN = {"frechet_distance": "FID", "kernel_distance": "KID", "inception_score": "IS"}


@dataclass(frozen=True)
class Pair:
    """A sample beside its nearest training image."""

    sample: int
    """Place in the sample set."""
    row: int
    """Place in the training images: `reference.train.open(row)`."""
    key: str
    caption: str
    distance: float
    is_copy: bool
    """Nearer than the threshold."""


@dataclass(frozen=True)
class Metric:
    """One line of the table."""

    name: str
    value: Interval
    higher_is_better: bool | None
    """None where neither is: too much diversity is no merit."""
    network: str
    """What computed the features or judged."""
    count: int
    """Images that it is over."""
    note: str = ""
    real: float | None = None
    """The same metric of real images; None where there is none."""
    by_prompt: dict[str, float] = field(default_factory=dict, repr=False)
    """Means over the images of each prompt, for metrics that are means."""
    replicates: NDArray | None = field(default=None, repr=False, compare=False)
    """The metric on each replicate of the prompts; see `paired_difference`."""
    pairs: tuple[Pair, ...] = field(default=(), repr=False)
    """Of memorisation metrics: the nearest pairs."""

    def to_json(self) -> dict[str, Any]:
        """Without drawings; an unknown end of the interval is null."""
        ends = {"low": self.value.low, "high": self.value.high}
        values = {name: None if np.isnan(end) else end for name, end in ends.items()}
        names = ("name", "higher_is_better", "network", "count", "note", "real")
        return {n: getattr(self, n) for n in names} | {"value": self.value.value} | values


def paired_difference(a: Metric, b: Metric) -> Interval:
    """a - b with a 95 % interval over the prompts, which both sets share.

    Raises ValueError for different metrics, or metrics that were measured with other drawings.
    """
    if (
        a.name != b.name
        or a.replicates is None
        or b.replicates is None
        or set(a.by_prompt) != set(b.by_prompt)
    ):
        raise ValueError(
            f"{a.name} and {b.name}, or their prompts, are not the same: they have no paired difference"
        )
    return difference(a.value.value, a.replicates, b.value.value, b.replicates)


def name_on(name: str, network: FeatureNetwork) -> str:
    """FID, KID, IS on the published Inception; the statistic with the network's name on any other."""
    if network.name == PUBLISHED and name in PLAIN:
        return PLAIN[name]
    return f"{name}[{network.name}]"


def metric_of(
    name: str,
    estimate: Estimate,
    higher: bool | None,
    network: str,
    note: str = "",
    real: Estimate | None = None,
) -> Metric:
    value = None if real is None else real.interval.value
    interval, count = estimate.interval, estimate.count
    return Metric(
        name, interval, higher, network, count, note, value, estimate.by_prompt, estimate.replicates
    )
