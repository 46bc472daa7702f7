"""Several rankers on the same images and captions: one command, one table.

    python -m rankers.compare --data ../shared/data/goods --rankers runs/goods_128_ranker \\
        OFA-Sys/chinese-clip-vit-base-patch16 "brivl:brivl-with-roberta-base.pth?vocab=vocab.txt"

Recall of text to image over distinct captions (an image counts when its caption is equal), with the chance level and
95 % intervals by bootstrap over captions; categories told right among all labels; colours told right among all colours.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.config import command, parse_options
from common.console.tables import plain_console
from common.files import write_json
from common.log import say
from common.outputs.record import require_replaceable, writing_file
from data_tools.shards.index import ShardIndex
from rankers import default_ranker, load_ranker
from rankers.retrieval import (
    KS,
    Pairs,
    caption_matches,
    chance_recall,
    hits_at,
    load_pairs,
    retrieval_metrics,
)
from rankers.training.pairs import AttributeConfig, scan_names


@dataclass(frozen=True)
class Options:
    """Compare rankers."""

    rankers: tuple[str, ...] = ()
    """Names, see rankers; empty: the newest one trained here, else the one that ships."""
    data: str = "../shared/data/goods"
    """Folder of image shards."""
    split: str = "val"
    """Split of the shards."""
    limit: int = 1000
    """Images at most."""
    attributes: AttributeConfig = field(default_factory=AttributeConfig)
    out: Path | None = None
    """Also write the metrics to this JSON file."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        if self.limit < 2:
            raise ValueError(f"limit must be at least 2, not {self.limit}")


def bootstrap_interval(hits: Tensor, replicates: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of hits (Q,), by resampling queries."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(hits), (replicates, len(hits)), generator=generator)
    means = hits.float()[rows].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def measure(ranker: Any, pairs: Pairs, labels: Sequence[str], colors: Sequence[str]) -> dict[str, Any]:
    """Metrics of one ranker, intervals of its recalls, and images a second in the first pass."""
    started = time.perf_counter()
    ranker.image_features(pairs.images)
    rate = len(pairs.images) / (time.perf_counter() - started)
    metrics = retrieval_metrics(ranker, pairs, labels, colors)
    distinct = sorted(set(pairs.captions))
    hits = hits_at(ranker.score_matrix(distinct, pairs.images), caption_matches(pairs.captions, distinct), KS)
    intervals = {f"recall@{k}": bootstrap_interval(hit) for k, hit in hits.items()}
    return {"figures": metrics, "intervals": intervals, "pictures_per_second": rate}


def show(results: dict[str, dict[str, Any]], title: str) -> None:
    from rich.table import Table

    columns = sorted({name for result in results.values() for name in result["figures"]}, key=_place)
    table = Table("ranker", *columns, "images/s", title=title)
    for name, result in results.items():
        cells = []
        for column in columns:
            value, interval = result["figures"].get(column), result["intervals"].get(column)
            text = "-" if value is None else f"{value:.1%}"
            cells.append(text + (f"\n{interval[0]:.1%}..{interval[1]:.1%}" if interval else ""))
        rate = result["pictures_per_second"]
        table.add_row(name, *cells, "-" if rate is None else f"{rate:.0f}")
    plain_console().print(table)


def _place(column: str) -> tuple[int, int, str]:
    at = column.rpartition("@")[2]
    return (0 if column.startswith("recall") else 1, int(at) if at.isdigit() else 99, column)


@command
def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    options = parse_options(Options, argv, description=__doc__)
    if options.out:
        require_replaceable(options.out)
    index = ShardIndex.open(options.data, options.split)
    pairs = load_pairs(index, options.attributes, options.limit)
    names = scan_names(index, options.attributes)
    distinct = sorted(set(pairs.captions))
    chance = chance_recall(caption_matches(pairs.captions, distinct))
    if len(names.labels) > 1:
        chance["kind_accuracy"] = 1 / len(names.labels)
    if len(names.colors) > 1:
        chance["color_accuracy"] = 1 / len(names.colors)
    results = {"chance": {"figures": chance, "intervals": {}, "pictures_per_second": None}}
    for name in options.rankers or (str(default_ranker()),):
        ranker = load_ranker(name, options.device)
        if not hasattr(ranker, "score_matrix"):
            raise ValueError(f"the ranker {name} cannot score any text with any image: nothing to compare")
        results[name] = measure(ranker, pairs, names.labels, names.colors)
    show(
        results,
        f"{len(pairs.images)} images, {len(distinct)} captions, {len(names.labels)} categories of {options.data}",
    )
    if options.out:
        with writing_file(options.out) as temporary:
            write_json(temporary, results)
        say(f"wrote {options.out}")
    return results


if __name__ == "__main__":
    main()
