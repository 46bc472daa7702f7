"""The page of evaluation.arena: figures, differences, what choosing is worth, pictures, nearest training pictures."""

import html
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_tools import svg
from evaluation import report
from evaluation.choice import ALL_NAMED
from evaluation.sets import LIKELIHOOD
from evaluation.statistics import Interval

if TYPE_CHECKING:
    from evaluation.arena import ArmResult, Match

PER_PROMPT = 4  # pictures of an arm that stand beside a prompt
MOST_APART = 12  # prompts on which the arms differ most
NEIGHBOURS = 10  # pairs of each measure of memorisation


def write_arena_page(path: Path, match: "Match") -> Path:
    """One self-contained file."""
    shown = report.spread(match.texts, match.options.show_prompts)
    sections = [
        report.section("What was compared", _settings(match), _arms(match), *map(report.note, match.judges)),
        report.section("Figures", _figures(match), _left_out(match)),
        report.section("Differences", _differences(match)),
        report.section("Choosing the best of n", _curves(match)),
        report.section("Seconds a picture", _seconds(match)),
        report.section("Where the arms differ most", _apart(match)),
        report.section("Pictures of the same prompts", _grids(match, shown)),
        report.section("Nearest training pictures", _neighbours(match)),
        report.section("Left out", *map(report.note, _lost(match))),
    ]
    return report.write_page(path, f"Arena: {', '.join(arm.spec.name for arm in match.arms)}", sections)


def _settings(match: "Match") -> str:
    options = match.options
    return report.facts(
        {
            "prompts": f"{len(match.texts)} of {options.prompts or options.reference}",
            "pictures of each prompt": options.num_images,
            "seed": options.seed,
            "real pictures": f"{len(match.reference.real)} of {options.reference}, split {options.split}",
            "judged by": ", ".join(f"{name} ({identity[:12]})" for name, identity in match.networks.items()),
            "chosen by": options.ranker or "the generators' own likelihoods",
            "written": time.strftime("%Y-%m-%d %H:%M"),
        }
    )


def _arms(match: "Match") -> str:
    rows = []
    for arm in match.arms:
        settings = arm.samples.settings
        sampling = settings.get("sampling") or {}
        told = ", ".join(f"{name} {value}" for name, value in sampling.items()) or "-"
        weights = str(settings.get("checkpoint", "-"))[:16]
        seed = settings.get("seed", "-")
        rows.append((arm.spec.name, arm.spec.what, weights, told, seed, len(arm.samples)))
    return report.table(("arm", "from", "weights", "sampling", "seed", "pictures"), rows, (0, 1, 2, 3))


# --- figures -------------------------------------------------------------------------------------------------------


def _figures(match: "Match") -> str:
    names = list(dict.fromkeys(f.name for arm in match.arms for f in arm.figures))
    rows = []
    for name in names:
        found = [next((f for f in arm.figures if f.name == name), None) for arm in match.arms]
        first = next(f for f in found if f)
        best = _best([f.value.value if f else None for f in found], first.higher_is_better)
        cells = [report.interval(f.value, i in best) if f else "-" for i, f in enumerate(found)]
        better = report.better(first.higher_is_better)
        rows.append((name, *cells, report.real(first.real), better, first.count, first.network, first.note))
    arms = [arm.spec.name for arm in match.arms]
    header = ("figure", *arms, "real pictures", "better", "pictures", "by", "remarks")
    last = len(header) - 1
    text = (
        "Below each value the 95 % interval by bootstrap over prompts; bold: the best of the arms; real pictures: what "
        "a perfect generator would get."
    )
    return report.note(text) + report.table(header, rows, (0, last - 1, last))


def _best(values: Sequence[float | None], higher: bool | None) -> set[int]:
    """Places of the best value; none where all are equal, or no direction is better."""
    known = {value for value in values if value is not None}
    if higher is None or len(known) < 2:
        return set()
    best = max(known) if higher else min(known)
    return {i for i, value in enumerate(values) if value == best}


def _differences(match: "Match") -> str:
    pairs = list(itertools.combinations([arm.spec.name for arm in match.arms], 2))
    if not pairs:
        return ""
    by_place = {(d.figure, d.first, d.second): d for d in match.differences}
    rows = []
    for name in dict.fromkeys(d.figure for d in match.differences):
        found = [by_place.get((name, *pair)) for pair in pairs]
        higher = next(d.higher_is_better for d in found if d)
        cells = [report.difference(d.value, higher) if d else "-" for d in found]
        rows.append((name, *cells, report.better(higher)))
    text = (
        "The later arm minus the earlier one, both on the same prompts, so intervals are those of the difference. "
        "Green: better beyond doubt at 95 %; red: worse; grey: the interval holds zero."
    )
    header = ("figure", *(f"{second} - {first}" for first, second in pairs), "better")
    return report.note(text) + report.table(header, rows, (0,))


def _left_out(match: "Match") -> str:
    reasons = dict.fromkeys(reason for arm in match.arms for reason in arm.left_out)
    return "".join(report.note(f"Left out: {reason}") for reason in reasons)


# --- choosing and time ---------------------------------------------------------------------------------------------


def _curves(match: "Match") -> str:
    names = list(dict.fromkeys(c.name for arm in match.arms for c in arm.curves))
    charts, rows = [], []
    for name in names:
        series = []
        for arm in match.arms:
            found = next((c for c in arm.curves if c.name == name), None)
            if found is None:
                continue
            points = [(p.width, *_ends(p.value)) for p in found.points]
            series.append((arm.spec.name, points))
            for p in found.points[1:]:
                gain = report.difference(p.gain, True)
                chosen = "likelihood" if found.scorer == LIKELIHOOD else found.scorer
                rows.append((name, arm.spec.name, p.width, report.interval(p.value), gain, p.prompts, chosen))
        charts.append(f"<h3>{html.escape(name)}</h3>" + svg.curves(series, "best of", "share", log_x=True))
    if not rows:
        return report.side_by_side(*charts)
    header = ("by the judge", "arm", "best of", "value", "gain over random", "prompts", "chosen by")
    text = (
        "Width 1 is the mean of all pictures of a prompt, which a random choice would get; the others are means over "
        "choices among different pictures of the prompt."
    )
    return report.note(text) + report.side_by_side(*charts) + report.table(header, rows, (0, 1, 6))


def _ends(value: Interval) -> tuple[float, float, float]:
    """Value, low, high; a single prompt has no interval, and its ends are the value."""
    low, high = (end if np.isfinite(end) else value.value for end in (value.low, value.high))
    return value.value, low, high


def _seconds(match: "Match") -> str:
    rows = []
    for arm in match.arms:
        found = np.array([s.seconds for s in arm.samples.samples if s.seconds is not None])
        if len(found):
            low, middle, high = np.quantile(found, [0.05, 0.5, 0.95])
            rows.append((arm.spec.name, *(report.number(float(v)) for v in (middle, low, high)), len(found)))
    text = f"As recorded when they were drawn, {match.options.batch_size} side by side where drawn here."
    header = ("arm", "median", "5 %", "95 %", "pictures")
    return report.table(header, rows) + report.note(text) if rows else ""


# --- pictures ------------------------------------------------------------------------------------------------------


def _grids(match: "Match", texts: Sequence[str]) -> str:
    marks = {path: mark for arm in match.arms for path, mark in _marks(arm).items()}
    sets = [arm.samples for arm in match.arms]
    return report.prompt_grids(sets, texts, PER_PROMPT, marks)


def _marks(arm: "ArmResult") -> dict[Path, str]:
    """What the judge misses in a picture."""
    marks: dict[Path, list[str]] = {}
    for name, values in arm.values.items():
        if name != ALL_NAMED:
            for sample, value in zip(arm.samples.samples, values, strict=True):
                if value == 0:
                    marks.setdefault(sample.path, []).append(f"not the {name.removesuffix(' right')}")
    return {path: ", ".join(found) for path, found in marks.items()}


def _apart(match: "Match") -> str:
    """Prompts whose means by prompt are furthest apart, on the first figure that has them."""
    if len(match.arms) < 2:
        return ""
    order = ("category_right", "clip_score", "color_right", "nearest_distance")
    names = [f.name for f in match.arms[0].figures if f.by_prompt]
    name = next((n for start in order for n in names if n.startswith(start)), None)
    found = [next((f.by_prompt for f in arm.figures if f.name == name), {}) for arm in match.arms]
    shared = set.intersection(*(set(values) for values in found)) if name else set()
    spreads = {text: max(v[text] for v in found) - min(v[text] for v in found) for text in shared}
    texts = [t for t in sorted(spreads, key=lambda t: (-spreads[t], t)) if spreads[t] > 0][:MOST_APART]
    if not texts:
        return ""
    values = [(text, *(report.number(v[text]) for v in found)) for text in texts]
    table = report.table(("prompt", *(arm.spec.name for arm in match.arms)), values, (0,))
    return report.note(f"By {name}, mean of the pictures of a prompt.") + table + _grids(match, texts)


def _neighbours(match: "Match") -> str:
    parts = []
    for arm in match.arms:
        found = report.nearest_training(arm.figures, arm.samples, match.reference, NEIGHBOURS)
        parts.append(f"<h3>{html.escape(arm.spec.name)}</h3>{found}" if found else "")
    text = "Left what was drawn, right the training picture that is nearest to it; the nearest pairs of each arm."
    return report.note(text) + "".join(parts) if any(parts) else ""


def _lost(match: "Match") -> list[str]:
    lines = [f"prompt: {reason}" for reason in match.unusable[:50]]
    return lines + [f"corrupt: {line}" for arm in match.arms for line in arm.samples.corrupt[:20]]
