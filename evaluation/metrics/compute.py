"""Every metric of a set of images, each with its interval, what real images get, and all that it depends on.

    metrics = measure(samples, Reference.open(shards, samples), Networks.load(judge, clip))

What is measured: how the images lie among real ones (FID, KID, IS, precision, recall, density, coverage), whether
they fit their texts (CLIP score, R-precision, recall), whether they show what the titles name, how different the
images of one text are, and whether they repeat training images. "Real" is the same metric of real images with
their own captions, or of training images: what a perfect generator would get.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.log import say
from evaluation.compare.parts import Bench, MeasureOptions, Networks, Reference
from evaluation.metrics.families import FAMILIES
from evaluation.metrics.features import CACHE
from evaluation.metrics.rows import Metric, Pair, paired_difference
from evaluation.sets import SampleSet

__all__ = [
    "MeasureOptions", "Metric", "Networks", "Pair", "Reference", "measure", "measure_all", "networks_note",
    "paired_difference", "settings_of",
]  # fmt: skip


def settings_of(samples: SampleSet) -> dict[str, Any]:
    """What stands beside every metric: seeds, guidance, rerank width."""
    seeds = sorted({s.seed for s in samples.samples if s.seed is not None})
    guidance = sorted({s.options["cfg_scale"] for s in samples.samples if "cfg_scale" in s.options})
    return {
        "set": samples.name,
        "pictures": len(samples),
        "prompts": len(samples.texts),
        "seeds": seeds or None,
        "guidance": guidance or None,
        "rerank_width": samples.settings.get("rerank_width", 1),
        "reranker": samples.settings.get("reranker"),
        "corrupt": len(samples.corrupt),
    }


def refuse_rerankers(samples: SampleSet, networks: Networks) -> None:
    """Raises ValueError when an encoder that ordered the images would judge them.

    Encoders are told by their weights: `encoders` in ranking.json, or in the set's settings.
    """
    ranking = samples.settings.get("ranking") or {}
    if ranking and "encoders" not in ranking and networks.scorer:
        raise ValueError(
            f"the ranking.json of {samples.name} does not say which weights ranked: run rerank.py again, or leave "
            "--clip out"
        )
    encoders = {*ranking.get("encoders", ()), *samples.settings.get("encoders", ())}
    for name, identity in networks.identities.items():
        if identity in encoders:
            raise ValueError(
                f"{name} ordered the images of {samples.name}, so it cannot judge them too: name another ranker "
                "with --clip, or leave it out"
            )


def measure(
    samples: SampleSet,
    reference: Reference,
    networks: Networks,
    options: MeasureOptions | None = None,
    cache: Path | None = CACHE,
) -> list[Metric]:
    """All metrics that these images and networks allow; what is left out is said, with the reason.

    Raises ValueError for an encoder that reranked.
    """
    metrics, left_out = measure_all(samples, reference, networks, options or MeasureOptions(), cache)
    for reason in left_out:
        say(f"left out {reason}")
    return metrics


def measure_all(
    samples: SampleSet,
    reference: Reference,
    networks: Networks,
    options: MeasureOptions,
    cache: Path | None = CACHE,
) -> tuple[list[Metric], list[str]]:
    """(metrics, what is left out and why)."""
    refuse_rerankers(samples, networks)
    bench = Bench(samples, reference, networks, options, cache)
    metrics: list[Metric] = []
    left_out: list[str] = []
    for family in FAMILIES:
        found, reasons = family(bench)
        metrics += found
        left_out += reasons
    if not metrics:
        raise ValueError(f"nothing can be measured: {'; '.join(left_out)}")
    return metrics, left_out


def networks_note(networks: Networks) -> Sequence[str]:
    """What is known of the judges themselves, a line each."""
    if networks.judge is None or "category_accuracy" not in networks.judge.validation:
        return []
    known = networks.judge.validation
    lines = []
    for slot in ("category", "color"):
        if f"{slot}_accuracy" in known:
            share, low, high = (known[f"{slot}_{n}"] for n in ("accuracy", "low", "high"))
            lines.append(
                f"{networks.judge.name} names the {slot} of {share:.1%} [{low:.1%}, {high:.1%}] of "
                f"{known[f'{slot}_count']:.0f} real held-out images right"
            )
    return lines
