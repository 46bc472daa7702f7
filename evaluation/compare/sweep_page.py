"""The page and the table of evaluation.sweep."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.config import to_mapping
from common.console.tables import plain_console
from data_tools.report import svg
from evaluation import report
from evaluation.compare.sweep_results import Stage, Sweep, Trial, mean_ranks, objective_metric
from evaluation.metrics.rows import Metric

SHOWN = 16  # prompts whose images stand on the page
PER_PROMPT = 4


def show(sweep: Sweep) -> None:
    """Objectives of every setting that was tried, in the terminal."""
    from rich.table import Table

    for stage in sweep.stages:
        objectives = _objectives(sweep, stage.winner)
        table = Table(title=f"{stage.knob or 'all combinations'}: {sweep.num_texts[0]} prompts of the search")
        table.add_column("setting")
        for metric in objectives:
            table.add_column(metric.name, justify="right", overflow="fold")
        table.add_column("mean rank", justify="right")
        for trial, rank in zip(stage.trials, _ranks(sweep, stage), strict=True):
            values = [str(trial.metrics[f.name].value) for f in objectives]
            mark = "*" if trial is stage.winner else ""
            table.add_row(f"{trial.name} {mark}", *values, f"{rank:.2f}")
        plain_console().print(table)
    for found in sweep.differences:
        if found.is_sure:
            value = found.value
            print(
                f"{found.metric}: {value.value:+.4g} [{value.low:+.4g}, {value.high:+.4g}] against the defaults"
            )


def write_sweep_page(path: Path, sweep: Sweep) -> Path:
    """One self-contained file."""
    options = sweep.options
    settings = {
        "winner": ", ".join(f"{k} {v}" for k, v in to_mapping(sweep.winner).items()),
        "objectives": ", ".join(options.objectives),
        "search": f"{sweep.num_texts[0]} prompts, {options.num_images} images each, seed {options.seed}",
        "report": f"{sweep.num_texts[1]} other prompts",
        "generator": options.checkpoint or "the one that was trained last",
        "real images": f"{options.reference}, split {options.split}",
    }
    sets = [samples for _, samples, _ in sweep.report]
    texts = report.spread(sets[0].texts, SHOWN)
    sections = [
        report.section("What was found", report.facts(settings)),
        *(_stage(sweep, stage) for stage in sweep.stages),
        report.section("On prompts that the search has not seen", _compared(sweep)),
        report.section("Images of these prompts", report.prompt_grids(sets, texts, PER_PROMPT)),
    ]
    return report.write_page(path, "Sweep of sampling options", sections, report.ENGLISH)


def _objectives(sweep: Sweep, trial: Trial) -> list[Metric]:
    return [objective_metric(trial.metrics, name) for name in sweep.options.objectives]


def _ranks(sweep: Sweep, stage: Stage) -> list[float]:
    return mean_ranks(stage.trials, sweep.options.objectives)


def _stage(sweep: Sweep, stage: Stage) -> str:
    objectives = _objectives(sweep, stage.winner)
    charts = []
    for metric in objectives:
        for knob in [stage.knob] if stage.knob else ["cfg_scale"]:
            charts.append(("", svg.curves(_series(stage.trials, knob, metric.name), knob, metric.name)))
    rows = []
    for trial, rank in zip(stage.trials, _ranks(sweep, stage), strict=True):
        won = trial is stage.winner
        cells = [report.interval(trial.metrics[f.name].value, won) for f in objectives]
        others = [f for f in trial.metrics.values() if f.name not in {o.name for o in objectives}]
        rest = ", ".join(f"{f.name} {report.number(f.value.value)}" for f in others)
        rows.append((trial.name + (" wins" if won else ""), *cells, f"{rank:.2f}", rest))
    names = [f"{f.name}, {report.better(f.higher_is_better)} is better" for f in objectives]
    table = report.table(("setting", *names, "mean rank", "other metrics"), rows, (0, len(names) + 2))
    title = stage.knob.replace("_", " ") if stage.knob else "All combinations"
    return report.section(f"Search: {title}", report.side_by_side(charts), table)


def _series(trials: Sequence[Trial], knob: str, name: str) -> list[tuple[str, list[tuple[float, ...]]]]:
    """Curves over `knob`, one for each setting of the others."""
    series: dict[str, list[tuple[float, ...]]] = {}
    for trial in sorted(trials, key=lambda t: getattr(t.sampling, knob)):
        others = {k: v for k, v in to_mapping(trial.sampling).items() if k != knob}
        label = ", ".join(f"{k} {v:g}" for k, v in others.items() if isinstance(v, (int, float)))
        value = trial.metrics[name].value
        ends = [end if np.isfinite(end) else value.value for end in (value.low, value.high)]
        series.setdefault(label, []).append((getattr(trial.sampling, knob), value.value, *ends))
    return list(series.items())


def _compared(sweep: Sweep) -> str:
    if len(sweep.report) == 1:
        text = "The defaults win: there is nothing to compare them with."
        return report.note(text) + report.metric_table(sweep.report[0][2])
    by_name = {d.metric: d for d in sweep.differences}
    (default, _, before), (winner, _, after) = sweep.report
    values = {metric.name: metric for metric in after}
    rows = []
    for metric in before:
        if metric.name in values:
            found = by_name.get(metric.name)
            rows.append(
                (
                    metric.name,
                    report.interval(metric.value),
                    report.interval(values[metric.name].value),
                    report.difference(found.value, found.higher_is_better) if found else "-",
                    report.real(metric.real),
                    report.better(metric.higher_is_better),
                )
            )
    header = ("metric", f"defaults: {default}", f"winner: {winner}", "difference", "real images", "better")
    text = "Green: better beyond doubt at 95 %; red: worse; grey: the interval holds zero."
    return report.note(text) + report.table(header, rows)
