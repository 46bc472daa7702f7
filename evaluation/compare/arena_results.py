"""What an arena found: systems that were measured, what they differ by, and all of it as one record."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from common.config import to_mapping
from common.text.language import Words
from evaluation.compare.choice import Curve
from evaluation.compare.costs import Costs
from evaluation.compare.systems import SystemSpec
from evaluation.metrics.compute import Metric, Reference, settings_of
from evaluation.metrics.statistics import Interval
from evaluation.sets import SampleSet


@dataclass(frozen=True)
class SystemResult:
    """One system, measured."""

    spec: SystemSpec
    samples: SampleSet
    metrics: tuple[Metric, ...]
    curves: tuple[Curve, ...]
    left_out: tuple[str, ...]
    values: dict[str, Any]
    """What the judge says of each image, by name, in the order of the samples."""
    costs: Costs

    @property
    def seconds(self) -> float | None:
        """Median seconds an image; None where they were not recorded."""
        found = [s.seconds for s in self.samples.samples if s.seconds is not None]
        return float(np.median(found)) if found else None

    def to_json(self) -> dict[str, Any]:
        return {
            "what": self.spec.what,
            "settings": settings_of(self.samples) | {"drawn": self.samples.settings},
            "seconds_per_image": self.seconds,
            "costs": self.costs.to_json(),
            "metrics": [metric.to_json() for metric in self.metrics],
            "best_of": {
                c.name: {"scorer": c.scorer, "points": [p.to_json() for p in c.points]} for c in self.curves
            },
            "left_out": list(self.left_out),
        }


@dataclass(frozen=True)
class Difference:
    """One metric of two systems on the same prompts."""

    metric: str
    first: str
    second: str
    value: Interval
    """Of the second minus that of the first."""
    higher_is_better: bool | None

    @property
    def is_sure(self) -> bool:
        """Whether the 95 % interval leaves out zero."""
        return self.value.low > 0 or self.value.high < 0

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "value": vars(self.value), "is_sure": self.is_sure}


@dataclass(frozen=True)
class Match:
    """All that the page and metrics.json are made of."""

    options: Any
    """Of evaluation.arena."""
    texts: tuple[str, ...]
    unusable: tuple[str, ...]
    """Why prompts were left out."""
    systems: tuple[SystemResult, ...]
    differences: tuple[Difference, ...]
    reference: Reference
    judges: tuple[str, ...]
    """What is known of those who judge."""
    networks: dict[str, str]

    def winners(self, words: Words) -> str:
        """Which system wins at what beyond doubt (95 % intervals of paired differences), and which is fastest."""
        won: dict[str, list[str]] = {}
        for name in dict.fromkeys(d.metric for d in self.differences if d.higher_is_better is not None):
            beaten, best = set(), set()
            for d in (d for d in self.differences if d.metric == name and d.is_sure):
                second_wins = (d.value.low > 0) == d.higher_is_better
                best.add(d.second if second_wins else d.first)
                beaten.add(d.first if second_wins else d.second)
            for system in sorted(best - beaten):
                won.setdefault(system, []).append(name.split("[")[0])
        timed = {s.spec.name: s.seconds for s in self.systems if s.seconds is not None}
        if len(timed) > 1:
            won.setdefault(min(timed, key=timed.get), []).append(words("seconds an image"))
        form = words("{system} wins at {names}")
        parts = [form.format(system=s, names=", ".join(dict.fromkeys(n))) for s, n in won.items()]
        return "; ".join(parts) or words("no system wins at anything beyond doubt")

    def to_json(self) -> dict[str, Any]:
        return {
            "prompts": len(self.texts),
            "unusable_prompts": list(self.unusable),
            "systems": {system.spec.name: system.to_json() for system in self.systems},
            "differences": [difference.to_json() for difference in self.differences],
            "judges": list(self.judges),
            "networks": self.networks,
            "options": to_mapping(self.options),
        }
