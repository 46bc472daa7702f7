"""One HTML report on a source: captions, attributes, labels, images, backgrounds, duplicates, with plots.

    python -m data_tools.stats data/clean
    python -m data_tools.stats data/clean --out report.html --tokenizer hfl/chinese-roberta-wwm-ext --max-text-len 32
    python -m data_tools.stats huge/ --image-share 0.02

The page holds everything it shows and loads nothing; the counts are written beside it as JSON. Text is measured on all
rows, images on the share that is asked for, drawn by the hash of the key.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import tyro

from common.config import command, parse_options
from common.console.progress import progress
from common.files import write_json
from common.outputs.record import require_replaceable, writing_file
from common.text.language import Language, words_of
from data_tools.engine import EngineOptions
from data_tools.images.decode import ImageLimits
from data_tools.ingest.records import Problem, Record, problem
from data_tools.ingest.shard_run import announce
from data_tools.parallel import ordered_map
from data_tools.readers.base import Meter, ReaderOptions
from data_tools.readers.detect import Source, open_source
from data_tools.report.facts import Facts, MeasureImage
from data_tools.report.likeness import Row, examples, flag_counts, likeness
from data_tools.report.stats_page import Report, page
from data_tools.report.token_count import token_counter
from data_tools.rules.lexicon import load_lexicon
from data_tools.split import fraction

BATCH = 16


@dataclass(frozen=True)
class StatsConfig:
    """Describe a source on one page."""

    EARLIER_NAMES: ClassVar = {"picture_share": "image_share"}
    src: tyro.conf.Positional[str]
    """File or folder in any recognised format, or URL of shards or of a list."""
    out: Path = Path("stats.html")
    """Page to write; its numbers go beside it with the suffix .json."""
    tokenizer: str = ""
    """Folder, hub id or .model file of the text tokenizer, to count tokens; empty: tokens are not counted."""
    max_text_len: int = 32
    """Text length of the training, begin and end marks included; drawn as a line."""
    language: Language = "auto"
    """Of the page: zh, en, or auto, which follows the locale."""
    fields: tuple[str, ...] = ("label", "label_zh", "coarse", "source", "license")
    """Fields of the meta whose values are counted."""
    image_share: float = 1.0
    """Share of the images that are decoded, above 0 to 1."""
    watermarks: bool = True
    """Look for repeated overlays, the slowest measurement."""
    max_pixels: int = 64_000_000
    """Most pixels of an image; more are refused before they are allocated."""
    workers: int = -1
    """Processes that decode; -1: one a processor; 0: none but this one."""
    reader: tyro.conf.OmitArgPrefixes[ReaderOptions] = field(
        default_factory=lambda: ReaderOptions(captions="optional")
    )
    work: tyro.conf.OmitArgPrefixes[EngineOptions] = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        if not 0 < self.image_share <= 1:
            raise ValueError(f"--image-share must be above 0 and at most 1, not {self.image_share}")
        if self.max_text_len < 3:
            raise ValueError(f"--max-text-len must be at least 3, not {self.max_text_len}")


def collect(config: StatsConfig, source: Source) -> list[Facts]:
    """Read every row once; Facts by split."""
    facts = [Facts(part.split) for part in source.parts]
    lexicon = load_lexicon()
    counter = token_counter(config.tokenizer) if config.tokenizer else None
    measure = MeasureImage(ImageLimits(config.reader.max_image_bytes, config.max_pixels), config.watermarks)
    workers = config.work.workers(config.workers)
    meter = Meter(total=source.num_bytes)
    with progress(unit="B", unit_scale=True) as bar:
        for items, results in ordered_map(measure, _batches(config, source, meter), workers, _crashed):
            measured = iter(results)
            for split, row, item, is_measured in items:
                found = next(measured) if is_measured else None
                lost = next((x for x in (item, found) if isinstance(x, Problem)), None)
                if lost:
                    facts[split].reasons[lost.reason] += 1
                    continue
                if found:
                    facts[split].add_image(row, found)
                facts[split].add_record(item, lexicon, counter, config.fields)
            bar.total = meter.total
            bar.update(meter.done - bar.n)
    return facts


def _crashed(record: Record) -> Problem:
    return problem(record.where, record.key, "decoder_crashed")


def _batches(config: StatsConfig, source: Source, meter: Meter) -> Iterator[tuple[list[tuple], list[Record]]]:
    """((split, row, item, is it measured?), ...) and the records to measure."""
    items: list[tuple] = []
    for split, part in enumerate(source.parts):
        for row, item in enumerate(source.read(part, meter)):
            wanted = isinstance(item, Record) and bool(item.image) and fraction(item.key) < config.image_share
            items.append((split, row, item, wanted))
            if len(items) == BATCH:
                yield items, [entry[2] for entry in items if entry[3]]
                items = []
    if items:
        yield items, [entry[2] for entry in items if entry[3]]


def fetch_rows(source: Source, wanted: set[Row]) -> dict[Row, Record]:
    """The records at the given rows, in a second reading that stops at the last of them."""
    found: dict[Row, Record] = {}
    for split, part in enumerate(source.parts):
        rows = {row for s, row in wanted if s == split}
        for row, item in enumerate(source.read(part)):
            if not rows:
                break
            if row in rows and isinstance(item, Record):
                found[split, row] = item
            rows.discard(row)
    return found


def stats(config: StatsConfig) -> dict[str, Any]:
    """Write the page and its numbers; returns the numbers. Raises ValueError if no row can be read."""
    pages = [config.out, config.out.with_suffix(".json")]
    require_replaceable(*pages)
    source = open_source(config.src, config.reader, exclude=pages)
    announce(source)
    facts = collect(config, source)
    if not sum(fact.kept for fact in facts):
        reasons = sum((fact.reasons for fact in facts), Counter())
        raise ValueError(f"no row of {config.src} can be read: {dict(reasons) or 'it is empty'}")
    alike, shown = likeness(facts), examples(facts)
    wanted = {row for _, one, other in alike.nearest for row in (one, other)}
    records = fetch_rows(source, wanted.union(*shown.values()))
    numbers = {
        "source": str(config.src),
        "format": source.format,
        "picture_share": config.image_share,
        "splits": {fact.split: fact.numbers() for fact in facts},
        "same_pictures": alike.exact,
        "near_pairs": alike.near,
        "pairs_across_splits": alike.across,
        "flags": flag_counts(facts),
    }
    report = Report(
        Path(config.src).name or config.src, facts, alike, shown, records, numbers, config.max_text_len
    )
    with writing_file(config.out) as temporary:
        temporary.write_text(page(report, words_of(config.language, "stats")), "utf-8")
    with writing_file(config.out.with_suffix(".json")) as temporary:
        write_json(temporary, numbers)
    return numbers


@command
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command of this module."""
    config = parse_options(StatsConfig, argv, description=__doc__)
    numbers = stats(config)
    for name, split in numbers["splits"].items():
        lost = sum(split["dropped"].values())
        print(
            f"{name}: {split['kept']} samples, {lost} unreadable, {split['pictures']} images measured",
            file=sys.stderr,
        )
    print(f"page: {config.out}, numbers: {config.out.with_suffix('.json')}", file=sys.stderr)
    return numbers


if __name__ == "__main__":
    main()
