"""What a sweep of sampling options found, and how its settings are named and ranked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.config import to_mapping
from dalle.sampling import SamplingOptions
from evaluation.compare.arena_results import Difference
from evaluation.metrics.compute import Metric
from evaluation.metrics.rows import PLAIN
from evaluation.sets import SampleSet

KNOBS = ("cfg_scale", "temperature", "top_k", "top_p")
FLAGS = {name: f"--{name.replace('_', '-')}" for name in KNOBS}


@dataclass(frozen=True)
class Trial:
    """One setting and its metrics by name."""

    sampling: SamplingOptions
    metrics: dict[str, Metric]

    @property
    def name(self) -> str:
        return setting_name(self.sampling)


@dataclass(frozen=True)
class Stage:
    """Settings that were compared with each other."""

    knob: str
    """What varies; "" for all combinations."""
    trials: tuple[Trial, ...]
    winner: Trial


def setting_name(sampling: SamplingOptions) -> str:
    """A directory name, such as cfg3-t1-k0-p1."""
    s = sampling
    return f"cfg{s.cfg_scale:g}-t{s.temperature:g}-k{s.top_k}-p{s.top_p:g}"


def flags(sampling: SamplingOptions) -> str:
    """As generate.py takes them."""
    return " ".join(f"{flag} {getattr(sampling, name):g}" for name, flag in FLAGS.items())


def objective_metric(metrics: dict[str, Metric], objective: str) -> Metric:
    """The first metric of that name, on whatever network. Raises ValueError for one that cannot decide."""
    found = next((f for n, f in metrics.items() if objective in (n, n.split("[")[0])), None)
    found = found or metrics.get(PLAIN.get(objective, ""))
    if found is None:
        raise ValueError(f"no metric {objective!r} was measured (there are {', '.join(metrics)})")
    if found.higher_is_better is None:
        raise ValueError(f"{found.name} is neither better high nor low: it cannot be an objective")
    return found


def mean_ranks(trials: Sequence[Trial], objectives: Sequence[str]) -> list[float]:
    """Place of every trial, 0 the best, mean over the objectives; equal metrics share theirs."""
    totals = [0.0] * len(trials)
    for objective in objectives:
        metrics = [objective_metric(trial.metrics, objective) for trial in trials]
        values = [f.value.value if f.higher_is_better else -f.value.value for f in metrics]
        for i, value in enumerate(values):
            better = sum(other > value for other in values)
            equal = sum(other == value for other in values) - 1
            totals[i] += (better + equal / 2) / len(objectives)
    return totals


@dataclass(frozen=True)
class Sweep:
    """All that the page and sweep.json are made of."""

    options: Any
    """Of evaluation.sweep."""
    stages: tuple[Stage, ...]
    winner: SamplingOptions
    report: tuple[tuple[str, SampleSet, tuple[Metric, ...]], ...]
    """Name, images and metrics of the defaults and of the winner, on prompts that the search has not seen."""
    differences: tuple[Difference, ...]
    """Winner minus defaults."""
    num_texts: tuple[int, int]
    """Prompts of the search and of the report."""

    def to_json(self) -> dict[str, Any]:
        def trial(one: Trial) -> dict[str, Any]:
            metrics = [f.to_json() for f in one.metrics.values()]
            return {"sampling": to_mapping(one.sampling), "figures": metrics}

        return {
            "winner": to_mapping(self.winner),
            "flags": flags(self.winner),
            "stages": [
                {"knob": s.knob, "winner": s.winner.name, "trials": [trial(t) for t in s.trials]}
                for s in self.stages
            ],
            "report": {name: [f.to_json() for f in metrics] for name, _, metrics in self.report},
            "differences": [d.to_json() for d in self.differences],
            "prompts": {"search": self.num_texts[0], "report": self.num_texts[1]},
            "options": to_mapping(self.options),
        }
