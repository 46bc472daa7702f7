"""Quality against training hours and against seconds an image, with the Pareto front marked, as PNG."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.outputs.record import OutputDirectory
from common.text.language import Words, words_of
from data_tools.report.svg import SERIES
from evaluation.compare.arena_results import Match

HOURS, SECONDS = "quality_hours.png", "quality_seconds.png"
PLOTS = (HOURS, SECONDS)
QUALITY = (
    "category_right",
    "color_right[",
    "frechet_distance",
)  # starts of names; those that all systems have
CHINESE_FONTS = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
    "Microsoft YaHei", "SimHei", "PingFang SC", "Heiti SC",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A system in a plot."""

    name: str
    cost: float
    quality: float
    low: float
    high: float


@dataclass(frozen=True)
class Plot:
    """A file that was written."""

    path: Path
    missing: tuple[str, ...]
    """Systems without a point: their cost is not recorded."""


def pareto(points: Sequence[Point], higher_is_better: bool) -> list[int]:
    """Places of the points that no other dominates: none costs at most as much and is at least as good, and one of the
    two strictly. By cost."""
    sign = 1 if higher_is_better else -1

    def dominates(a: Point, b: Point) -> bool:
        as_good = a.cost <= b.cost and sign * a.quality >= sign * b.quality
        return as_good and (a.cost < b.cost or sign * a.quality > sign * b.quality)

    front = [i for i, p in enumerate(points) if not any(dominates(q, p) for q in points)]
    return sorted(front, key=lambda i: points[i].cost)


def write_plots(files: OutputDirectory, match: Match) -> dict[str, Plot]:
    """The plots that can be made, by file name: two systems and more must record the cost."""
    words = words_of(match.options.language, "arena")
    costs = {
        HOURS: ("training hours", {s.spec.name: s.costs.training_hours for s in match.systems}),
        SECONDS: ("seconds an image", {s.spec.name: s.seconds for s in match.systems}),
    }
    found = {}
    for file, (label, values) in costs.items():
        known = {name: value for name, value in values.items() if value}
        metrics = shared_metrics(match)
        if len(known) < 2 or not metrics:
            continue
        figure = plot(match, metrics, known, label, words)
        with files.writing(file) as temporary:
            figure.savefig(temporary, format="png", dpi=110)
        found[file] = Plot(files.path / file, tuple(n for n in values if n not in known))
    return found


def shared_metrics(match: Match) -> list[str]:
    """Names of the metrics of QUALITY that every system has."""
    names = [{f.name for f in system.metrics} for system in match.systems]
    shared = set.intersection(*names)
    ordered = [f.name for f in match.systems[0].metrics if f.name in shared]
    return [name for start in QUALITY for name in ordered if name.startswith(start)]


def plot(match: Match, metrics: Sequence[str], costs: dict[str, float], label: str, words: Words) -> Any:
    """A matplotlib figure, one panel a metric; `costs` by system."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    font = _chinese_font()
    shown = words if font else words_of("en", "arena")
    with rc_context({"font.family": [font, "DejaVu Sans"]} if font else {}):
        figure = Figure(figsize=(5.2 * len(metrics), 4.2), layout="constrained")
        for axis, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
            _panel(axis, match, metric, costs, shown)
            axis.set_xlabel(shown(label))
        figure.draw_without_rendering()  # text is laid out while the font is set
    return figure


def _panel(axis: Any, match: Match, metric: str, costs: dict[str, float], words: Words) -> None:
    points, colors = [], []
    for i, system in enumerate(match.systems):
        if system.spec.name in costs:
            value = next(f.value for f in system.metrics if f.name == metric)
            points.append(
                Point(system.spec.name, costs[system.spec.name], value.value, value.low, value.high)
            )
            colors.append(SERIES[i % len(SERIES)])
    higher = next(f.higher_is_better for f in match.systems[0].metrics if f.name == metric)
    front = pareto(points, bool(higher))
    for i, (point, color) in enumerate(zip(points, colors, strict=True)):
        axis.vlines(point.cost, point.low, point.high, color=color, linewidth=1.2)
        ring = {"edgecolors": "black", "linewidths": 1.8} if i in front else {"linewidths": 0}
        axis.scatter([point.cost], [point.quality], s=70, color=color, zorder=3, **ring)
        axis.annotate(
            point.name, (point.cost, point.quality), xytext=(7, 5), textcoords="offset points", fontsize=9
        )
    line = [points[i] for i in front]
    axis.plot(
        [p.cost for p in line], [p.quality for p in line], color="#888", linewidth=1, linestyle="--",
        drawstyle="steps-post", zorder=1, label=words("Pareto front"),
    )  # fmt: skip
    axis.set_xscale("log")
    axis.margins(0.15)
    axis.set_title(f"{metric} ({words('higher' if higher else 'lower')})", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _chinese_font() -> str:
    """A font of this machine with Chinese characters, or ""."""
    from matplotlib import font_manager

    known = {entry.name for entry in font_manager.fontManager.ttflist}
    return next((name for name in CHINESE_FONTS if name in known), "")
