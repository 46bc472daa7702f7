"""Measure a set of generated images: one table, metrics.json, report.html.

    python -m evaluation out/ --reference ../shared/data/goods --judge runs/goods_128_judge
    python -m evaluation out/ --reference DIR --judge DIR --clip OFA-Sys/chinese-clip-vit-base-patch16
    python -m evaluation out/ --reference DIR --judge DIR --best-of 8 --scorer likelihood

OUT_DIR is what generate.py wrote, or any folder of images with texts. The reference is a folder of image shards: the
held-out split is what images should look like, the training split what they should not repeat. FID, KID and IS need
the weights of Inception (--inception FILE, or torch's hub cache); on other networks the same statistics carry the
network's name. A ranker that ordered the images is refused as their judge.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from common.config import command, parse_options, to_mapping
from common.console.tables import plain_console
from common.log import say
from common.outputs.record import OutputDirectory
from common.text.language import Language, words_of
from evaluation.metrics.compute import (
    Metric,
    measure_all,
    networks_note,
    refuse_rerankers,
    settings_of,
)
from evaluation.options import MeasuringOptions
from evaluation.report import METRICS, PAGE, write_report
from evaluation.sets import LIKELIHOOD, SampleSet


@dataclass(frozen=True)
class Options(MeasuringOptions):
    """Measure the images of a directory."""

    out_dir: tyro.conf.Positional[Path] = Path("out")
    """Directory that generate.py wrote, or a folder of images, each with its text in a .txt of its name."""
    text: str = ""
    """Text of images that have none beside them."""
    best_of: int = 0
    """Measure only the best of so many images of every text; 0: all images."""
    scorer: str = LIKELIHOOD
    """What chooses them: likelihood, or the ranker of ranking.json."""
    write_to: Path | None = None
    """Directory for metrics.json and report.html; None: OUT_DIR."""
    language: Language = "auto"
    """Of report.html: zh, en, or auto, which follows the locale."""

    def __post_init__(self) -> None:
        if self.best_of < 0:
            raise ValueError(f"best_of must be 0 (all images) or more, not {self.best_of}")


def cell(value: float, digits: int) -> str:
    """- for what is unknown."""
    return "-" if math.isnan(value) else f"{value:.{digits}g}"


def show(metrics: Sequence[Metric], settings: dict[str, Any]) -> None:
    """The table: every metric with its network in brackets, what it is over, and how the images were generated.

    Seeds, guidance and rerank width are the same for all rows: they go into the title where columns are scarce.
    """
    from rich.table import Table

    console = plain_console()
    how = {name: _words(settings[name]) for name in ("seeds", "guidance", "rerank_width")}
    title = f"{settings['set']}: {settings['pictures']} images of {settings['prompts']} texts"
    beside = how if console.width >= 120 else {}
    if not beside:
        title += ", " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in how.items())
    table = Table(title=title)
    table.add_column("metric", no_wrap=True)
    columns = ["value", "95 %", "real", "N"]
    for name in (*columns, *(["better", *(name.replace("_", " ") for name in beside)] if beside else ())):
        table.add_column(name, justify="right", overflow="fold")
    digits = 4 if beside else 3
    for metric in metrics:
        value, real = metric.value, metric.real
        row = [cell(value.value, digits), f"{cell(value.low, digits)} .. {cell(value.high, digits)}"]
        row += ["" if real is None else cell(real, digits), str(metric.count)]
        better = {True: "higher", False: "lower", None: ""}[metric.higher_is_better]
        row += [better, *beside.values()] if beside else []
        table.add_row(metric.name, *row)
    console.print(table)


def _words(value: Any) -> str:
    if value is None:
        return "unknown"
    if not isinstance(value, list):
        return str(value)
    return ", ".join(map(str, value)) if len(value) < 6 else f"{value[0]} .. {value[-1]} ({len(value)})"


def chosen(options: Options) -> SampleSet:
    samples = SampleSet.from_out_dir(options.out_dir, text=options.text)
    for line in samples.corrupt[:5]:
        say(f"left out a corrupt image: {line}")
    return samples.best_of(options.best_of, options.scorer) if options.best_of else samples


@command
def main(argv: Sequence[str] | None = None) -> list[Metric]:
    """Measure; returns the metrics."""
    options = parse_options(Options, argv, description=__doc__)
    options.check_reference()
    samples = chosen(options)
    with OutputDirectory(options.write_to or options.out_dir) as files:
        files.require_ours((METRICS, PAGE))
        return report(options, samples, files)


def report(options: Options, samples: SampleSet, files: OutputDirectory) -> list[Metric]:
    """Measure, show and write."""
    networks = options.networks()
    refuse_rerankers(samples, networks)
    reference = options.real_images(samples)
    metrics, left_out = measure_all(samples, reference, networks, options.measure, options.cache)
    settings, judges = settings_of(samples), networks_note(networks)
    show(metrics, settings)
    for line in (*judges, *(f"left out {reason}" for reason in left_out)):
        say(line)
    beside = {name: settings[name] for name in ("seeds", "guidance", "rerank_width", "reranker")}
    files.write_json(
        METRICS,
        {
            "settings": settings,
            "figures": [metric.to_json() | beside for metric in metrics],
            "left_out": left_out,
            "judges": judges,
            "networks": networks.identities,
            "options": to_mapping(options),
        },
    )
    remarks = [*judges, *(f"Left out: {reason}" for reason in left_out)]
    with files.writing(PAGE) as temporary:
        words = words_of(options.language, "evaluation")
        write_report(temporary, samples, metrics, reference, settings, remarks, words=words)
    say(f"wrote {files.path / METRICS} | {files.path / PAGE}")
    return metrics


if __name__ == "__main__":
    main()
