"""The page of evaluation.arena: summary, plots, metrics, differences, what choosing is worth, images, nearest training
images; in English or Chinese."""

import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common.text.language import Words, words_of
from data_tools.report import svg
from evaluation import report
from evaluation.arena_table import best_of, header_of, hours_notes, summary
from evaluation.compare.arena_plots import Plot
from evaluation.compare.arena_results import Match, SystemResult
from evaluation.compare.choice import ALL_NAMED
from evaluation.metrics.statistics import Interval
from evaluation.sets import LIKELIHOOD

PER_PROMPT = 4  # images of a system that stand beside a prompt
MOST_APART = 12  # prompts on which the systems differ most
NEIGHBOURS = 10  # pairs of each measure of memorisation


def write_arena_page(path: Path, match: Match, plots: Mapping[str, Plot]) -> Path:
    """One self-contained file."""
    words = words_of(match.options.language, "arena")
    shown = report.spread(match.texts, match.options.show_prompts)
    parts = {
        "Summary": (_summary(match, words), report.note(match.winners(words))),
        "Quality against cost": (_plots(plots, words),),
        "What was compared": (
            _settings(match, words),
            _systems(match, words),
            *map(report.note, (*match.judges, *_remarks(match, words))),
        ),
        "Metrics": (_metrics(match, words), _left_out(match, words)),
        "Differences": (_differences(match, words),),
        "Choosing the best of n": (_curves(match, words),),
        "Seconds an image": (_seconds(match, words),),
        "Where the systems differ most": (_apart(match, words),),
        "Images of the same prompts": (_grids(match, shown, words),),
        "Nearest training images": (_neighbours(match, words),),
        "Left out": tuple(map(report.note, _lost(match, words))),
    }
    sections = [report.section(words(title), *found) for title, found in parts.items()]
    names = ", ".join(system.spec.name for system in match.systems)
    return report.write_page(path, f"{words('Arena')}: {names}", sections, words)


def _summary(match: Match, words: Words) -> str:
    found = match.to_json()
    rows = []
    for row in summary(found, words):
        cells = [report.marked(cell or "-", i in row.best) for i, cell in enumerate(row.cells)]
        rows.append((row.name, *cells, row.real or ""))
    text = words("Bold: the best of the systems. Behind each value its 95 % interval over prompts.")
    notes = hours_notes(found)
    hours = words("Hours: {notes}.").format(notes="; ".join(notes)) if notes else ""
    return report.note(text) + report.table(header_of(found, words), rows, (0,)) + report.note(hours)


def _plots(plots: Mapping[str, Plot], words: Words) -> str:
    if not plots:
        return ""
    parts = []
    for plot in plots.values():
        missing = words("Not shown, since it is not recorded: {names}.").format(names=", ".join(plot.missing))
        parts += [report.plot(plot.path), report.note(missing if plot.missing else "")]
    text = words(
        "Ringed: on the Pareto front, no other system is both better and cheaper. Bars: 95 % intervals over prompts."
    )
    return report.group("", report.note(text), *parts)


def _settings(match: Match, words: Words) -> str:
    options = match.options
    values = {
        "prompts": f"{len(match.texts)} {words('of')} {options.prompts or options.reference}",
        "images of each prompt": options.num_images,
        "seed": options.seed,
        "real images": f"{len(match.reference.real)} {words('of')} {options.reference}, {options.split}",
        "judged by": ", ".join(f"{name} ({identity[:12]})" for name, identity in match.networks.items()),
        "chosen by": options.ranker or words("the generators' own likelihoods"),
        "written": time.strftime("%Y-%m-%d %H:%M"),
    }
    return report.facts({words(name): value for name, value in values.items()})


def _systems(match: Match, words: Words) -> str:
    rows = []
    for system in match.systems:
        settings = system.samples.settings
        sampling = settings.get("sampling") or {}
        told = ", ".join(f"{name} {value}" for name, value in sampling.items()) or "-"
        weights = str(settings.get("checkpoint", "-"))[:16]
        seed = settings.get("seed", "-")
        rows.append((system.spec.name, system.spec.what, weights, told, seed, len(system.samples)))
    header = ("system", "from", "weights", "sampling", "seed", "images")
    return report.table(tuple(map(words, header)), rows, (0, 1, 2, 3))


def _remarks(match: Match, words: Words) -> list[str]:
    has_lines = any("lines" in (s.samples.settings.get("source") or {}) for s in match.systems)
    text = (
        "A system with drawings is told more than the others are: the outline of a real image of the prompt."
    )
    return [words(text)] if has_lines else []


# --- metrics -------------------------------------------------------------------------------------------------------


def _better(higher_is_better: bool | None, words: Words) -> str:
    return words(report.better(higher_is_better))


def _metrics(match: Match, words: Words) -> str:
    names = list(dict.fromkeys(f.name for system in match.systems for f in system.metrics))
    rows = []
    for name in names:
        found = [next((f for f in system.metrics if f.name == name), None) for system in match.systems]
        first = next(f for f in found if f)
        best = best_of([f.value.value if f else None for f in found], first.higher_is_better)
        cells = [report.interval(f.value, i in best) if f else "-" for i, f in enumerate(found)]
        better = _better(first.higher_is_better, words)
        rows.append((name, *cells, report.real(first.real), better, first.count, first.network, first.note))
    systems = [system.spec.name for system in match.systems]
    header = (words("metric"), *systems, *map(words, ("real images", "better", "images", "by", "remarks")))
    last = len(header) - 1
    text = (
        "Below each value the 95 % interval by bootstrap over prompts; bold: the best of the systems; real images: "
        "what a perfect generator would get."
    )
    return report.note(words(text)) + report.table(header, rows, (0, last - 1, last))


def _differences(match: Match, words: Words) -> str:
    pairs = list(itertools.combinations([system.spec.name for system in match.systems], 2))
    if not pairs:
        return ""
    by_place = {(d.metric, d.first, d.second): d for d in match.differences}
    rows = []
    for name in dict.fromkeys(d.metric for d in match.differences):
        found = [by_place.get((name, *pair)) for pair in pairs]
        higher = next(d.higher_is_better for d in found if d)
        cells = [report.difference(d.value, higher) if d else "-" for d in found]
        rows.append((name, *cells, _better(higher, words)))
    text = (
        "The later system minus the earlier one, both on the same prompts, so intervals are those of the difference. "
        "Green: better beyond doubt at 95 %; red: worse; grey: the interval holds zero."
    )
    header = (words("metric"), *(f"{second} - {first}" for first, second in pairs), words("better"))
    return report.note(words(text)) + report.table(header, rows, (0,))


def _left_out(match: Match, words: Words) -> str:
    reasons = dict.fromkeys(reason for system in match.systems for reason in system.left_out)
    return report.group("", *(report.note(f"{words('Left out')}: {reason}") for reason in reasons))


# --- choosing and time ---------------------------------------------------------------------------------------------


def _curves(match: Match, words: Words) -> str:
    names = list(dict.fromkeys(c.name for system in match.systems for c in system.curves))
    charts, rows = [], []
    for name in names:
        series = []
        for system in match.systems:
            found = next((c for c in system.curves if c.name == name), None)
            if found is None:
                continue
            points = [(p.width, *_ends(p.value)) for p in found.points]
            series.append((system.spec.name, points))
            for p in found.points[1:]:
                gain = report.difference(p.gain, True)
                chosen = words("likelihood") if found.scorer == LIKELIHOOD else found.scorer
                shown = (words(name), system.spec.name, p.width, report.interval(p.value))
                rows.append((*shown, gain, p.prompts, chosen))
        charts.append((words(name), svg.curves(series, words("best of"), words("share"), log_x=True)))
    if not rows:
        return report.side_by_side(charts)
    header = ("by the judge", "system", "best of", "value", "gain over random", "prompts", "chosen by")
    text = (
        "Width 1 is the mean of all images of a prompt, which a random choice would get; the others are means over "
        "choices among different images of the prompt."
    )
    table = report.table(tuple(map(words, header)), rows, (0, 1, 6))
    return report.note(words(text)) + report.side_by_side(charts) + table


def _ends(value: Interval) -> tuple[float, float, float]:
    """Value, low, high; a single prompt has no interval, and its ends are the value."""
    low, high = (end if np.isfinite(end) else value.value for end in (value.low, value.high))
    return value.value, low, high


def _seconds(match: Match, words: Words) -> str:
    rows = []
    for system in match.systems:
        found = np.array([s.seconds for s in system.samples.samples if s.seconds is not None])
        if len(found):
            low, middle, high = np.quantile(found, [0.05, 0.5, 0.95])
            rows.append(
                (system.spec.name, *(report.number(float(v)) for v in (middle, low, high)), len(found))
            )
    text = words("As recorded when they were made, {n} side by side where made here.")
    header = (words("system"), words("median"), "5 %", "95 %", words("images"))
    note = report.note(text.format(n=match.options.batch_size))
    return report.table(header, rows) + note if rows else ""


# --- images --------------------------------------------------------------------------------------------------------


def _grids(match: Match, texts: Sequence[str], words: Words) -> str:
    marks = {path: mark for system in match.systems for path, mark in _marks(system, words).items()}
    sets = [system.samples for system in match.systems]
    return report.prompt_grids(sets, texts, PER_PROMPT, marks)


def _marks(system: SystemResult, words: Words) -> dict[Path, str]:
    """What the judge misses in an image."""
    marks: dict[Path, list[str]] = {}
    for name, values in system.values.items():
        if name != ALL_NAMED:
            for sample, value in zip(system.samples.samples, values, strict=True):
                if value == 0:
                    wrong = words("not {name}").format(name=words(name))
                    marks.setdefault(sample.path, []).append(wrong)
    return {path: ", ".join(found) for path, found in marks.items()}


def _apart(match: Match, words: Words) -> str:
    """Prompts whose means by prompt are furthest apart, on the first metric that has them."""
    if len(match.systems) < 2:
        return ""
    order = ("category_right", "clip_score", "color_right", "nearest_distance")
    names = [f.name for f in match.systems[0].metrics if f.by_prompt]
    name = next((n for start in order for n in names if n.startswith(start)), None)
    found = [next((f.by_prompt for f in s.metrics if f.name == name), {}) for s in match.systems]
    shared = set.intersection(*(set(values) for values in found)) if name else set()
    spreads = {text: max(v[text] for v in found) - min(v[text] for v in found) for text in shared}
    texts = [t for t in sorted(spreads, key=lambda t: (-spreads[t], t)) if spreads[t] > 0][:MOST_APART]
    if not texts:
        return ""
    values = [(text, *(report.number(v[text]) for v in found)) for text in texts]
    table = report.table((words("prompt"), *(s.spec.name for s in match.systems)), values, (0,))
    text = words("By {name}, mean of the images of a prompt.").format(name=name)
    return report.note(text) + table + _grids(match, texts, words)


def _neighbours(match: Match, words: Words) -> str:
    parts = []
    for system in match.systems:
        found = report.nearest_training(system.metrics, system.samples, match.reference, words, NEIGHBOURS)
        parts.append(report.group(system.spec.name, found))
    text = "Left what was generated, right the training image that is nearest to it; the nearest pairs of each system."
    return report.group("", report.note(words(text)), *parts) if any(parts) else ""


def _lost(match: Match, words: Words) -> list[str]:
    lines = [f"{words('prompt')}: {reason}" for reason in match.unusable[:50]]
    return lines + [f"{words('corrupt')}: {line}" for s in match.systems for line in s.samples.corrupt[:20]]
