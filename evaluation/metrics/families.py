"""The families of metrics: how images lie among real ones, fit their texts, show what is named, vary, repeat."""

from collections.abc import Callable

from numpy.typing import NDArray

from evaluation.compare.parts import Bench, MeasureOptions, Part
from evaluation.metrics import agreement
from evaluation.metrics.distribution import (
    Frechet,
    diversity_values,
    inception_estimate,
    kernel_estimate,
    manifold_estimates,
)
from evaluation.metrics.features import FeatureNetwork, PerceptualHash
from evaluation.metrics.memorisation import (
    Nearest,
    Neighbour,
    nearest_by_cosine,
    nearest_by_hash,
    nearest_training,
)
from evaluation.metrics.resampling import Estimate, interval_of, mean_estimate
from evaluation.metrics.rows import Metric, Pair, metric_of, name_on
from evaluation.metrics.statistics import inception_score

HIGHER = {
    "frechet_distance": False, "kernel_distance": False, "inception_score": True, "precision": True, "recall": True,
    "density": True, "coverage": True,
}  # fmt: skip
IS_PARTS, IS_PART_SIZE = 10, 500

Family = tuple[list[Metric], list[str]]
"""Metrics, and what is left out with the reason."""


def distribution_metrics(bench: Bench) -> Family:
    """How the images lie among the real ones, on each network."""
    metrics, left_out = [], []
    perfect = bench.train_like_generated()
    for network in bench.networks.statistics:
        real = bench.real.features(network)
        found, reasons = _statistics(network, bench.generated, real, bench.options)
        best = _statistics(network, perfect, real, bench.options)[0] if perfect else {}
        left_out += reasons
        for name, estimate in found.items():
            note = _statistic_note(name, estimate.count, *real.shape)
            metrics.append(
                metric_of(name_on(name, network), estimate, HIGHER[name], network.name, note, best.get(name))
            )
    return metrics, left_out


def _statistic_note(name: str, count: int, num_real: int, dim: int) -> str:
    if name == "inception_score":
        parts = IS_PARTS if count >= IS_PARTS * IS_PART_SIZE else 1
        return f"mean of {parts} parts" if parts > 1 else "over the whole set in one part"
    note = f"against {num_real} real images"
    if name == "frechet_distance" and min(count, num_real) <= dim:
        note += f"; no more images than the {dim} features: compare only with the same number of images"
    return note


def _statistics(
    network: FeatureNetwork, part: Part, real: NDArray, options: MeasureOptions
) -> tuple[dict[str, Estimate], list[str]]:
    features, resampling = part.features(network), part.resampling
    replicates = min(options.set_replicates, resampling.replicates)
    steps: list[tuple[str, Callable[[], dict[str, Estimate]]]] = [
        (
            "frechet_distance",
            lambda: {"frechet_distance": Frechet(real).estimate(features, resampling, replicates)},
        ),
        ("kernel_distance", lambda: {"kernel_distance": kernel_estimate(features, real, resampling)}),
        ("precision and recall", lambda: manifold_estimates(features, real, resampling, options.neighbours)),
    ]
    found: dict[str, Estimate] = {}
    left_out = []
    for name, step in steps:
        try:
            found |= step()
        except ValueError as error:  # too few images for this one
            left_out.append(f"{name} on {network.name}: {error}")
    probabilities = network.probabilities(features)
    if probabilities is not None:
        found["inception_score"] = _inception(probabilities, part)
    return found, left_out


def _inception(probabilities: NDArray, part: Part) -> Estimate:
    """As published, the mean of ten parts, where there are enough images for that."""
    whole = inception_estimate(probabilities, part.resampling)
    if len(probabilities) < IS_PARTS * IS_PART_SIZE:
        return whole
    value = inception_score(probabilities, IS_PARTS).value
    return Estimate(interval_of(value, whole.replicates, 1.0), whole.count, whole.replicates)


def agreement_metrics(bench: Bench) -> Family:
    """Whether the images fit their texts, by the scorer."""
    scorer, options = bench.networks.scorer, bench.options
    if scorer is None:
        return [], ["CLIP score, R-precision and recall: no ranker was named (--clip)"]
    how = (options.top, options.among, options.seed)
    found = agreement.metrics(scorer, bench.generated, *how)
    real = agreement.metrics(scorer, bench.captioned, *how) if bench.captioned else {}
    rows = []
    for name, (estimate, note) in found.items():
        best = real[name][0] if name in real else None
        rows.append(metric_of(f"{name}[{scorer.name}]", estimate, True, scorer.name, note, best))
    alone = len(set(bench.generated.texts)) == 1
    return rows, ["R-precision and recall: they need at least 2 texts"] if alone else []


def attributes_metrics(bench: Bench) -> Family:
    """Whether the images show what the titles name."""
    found = agreement.attribute_hits(bench, bench.generated)
    real = agreement.attribute_hits(bench, bench.captioned) if bench.captioned else {}
    metrics = []
    for name, (hits, network, note) in found.items():
        estimate = mean_estimate(hits.hits, bench.generated.resampling, is_share=True)
        best = None
        if name in real:
            best = mean_estimate(real[name][0].hits, bench.captioned.resampling, is_share=True)
        text = f"a blind guess: {hits.chance:.1%}" + (f"; {note}" if note else "")
        metrics.append(metric_of(name, estimate, True, network, text, best))
    return metrics, [] if found else ["attributes: no title names a category or a colour that can be checked"]


def diversity_metrics(bench: Bench) -> Family:
    """How different the images of one text are."""
    metrics = []
    for network in bench.networks.statistics:
        parts = [bench.generated, *([bench.captioned] if bench.captioned else [])]
        estimates = [
            mean_estimate(diversity_values(part.features(network), part.texts), part.resampling)
            for part in parts
        ]
        if estimates[0]:
            note = "mean 1 - cosine over pairs of images of one text"
            best = estimates[1] if len(estimates) > 1 else None
            name = name_on("diversity", network)
            metrics.append(metric_of(name, estimates[0], None, network.name, note, best))
    return metrics, [] if metrics else ["diversity: no text has two images"]


def memorisation_metrics(bench: Bench) -> Family:
    """Whether images repeat training images."""
    if bench.train is None:
        return [], ["memorisation: no training images were named (--train-split)"]
    metrics = []
    hashes, main = PerceptualHash(), bench.networks.statistics[0]
    sample_views, real_views = (
        (part.features(hashes), part.features(hashes, mirrored=True))
        for part in (bench.generated, bench.real)
    )
    near = bench.options.near
    found = [
        nearest_training(
            hashes.name, nearest_by_hash, sample_views, real_views, bench.train.features(hashes), near
        ),
        nearest_training(
            main.name,
            nearest_by_cosine,
            (bench.generated.features(main),),
            (bench.real.features(main),),
            bench.train.features(main),
            near,
        ),
    ]
    for nearest in found:
        metrics += _nearest_metrics(bench, nearest)
    return metrics, []


def _nearest_metrics(bench: Bench, nearest: Nearest) -> list[Metric]:
    copies = mean_estimate(nearest.copies, bench.generated.resampling, is_share=True)
    distance = mean_estimate(nearest.distances, bench.generated.resampling)
    note = (
        f"nearer to one of {len(bench.train)} training images than {nearest.threshold:.4g}, as "
        f"{nearest.quantile:.1%} of the real held-out images are"
    )
    pairs = tuple(_pair(bench, nearest, found) for found in nearest.closest(bench.options.pairs))
    share = Metric(
        f"memorised[{nearest.measure}]", copies.interval, False, nearest.measure, copies.count, note,
        nearest.quantile, copies.by_prompt, copies.replicates, pairs,
    )  # fmt: skip
    mean = Metric(
        f"nearest_distance[{nearest.measure}]", distance.interval, None, nearest.measure, distance.count,
        "mean distance to the nearest training image", nearest.real_mean, distance.by_prompt, distance.replicates,
    )  # fmt: skip
    return [share, mean]


def _pair(bench: Bench, nearest: Nearest, found: Neighbour) -> Pair:
    index = found.row if bench.train.rows is None else int(bench.train.rows[found.row])
    facts, distance = bench.reference.train.facts(index), found.distance
    return Pair(found.sample, index, facts.key, facts.caption, distance, distance < nearest.threshold)


FAMILIES: tuple[Callable[[Bench], Family], ...] = (
    distribution_metrics,
    agreement_metrics,
    attributes_metrics,
    diversity_metrics,
    memorisation_metrics,
)
