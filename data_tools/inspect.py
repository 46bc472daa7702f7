"""Look before training: recognise any source, show ten of its rows with their images, and say what is wrong.

    python -m data_tools.inspect catalogue/
    python -m data_tools.inspect T2I/ --split train --out t2i.html --limit 0

Writes one HTML page that needs nothing beside it, and prints the same counts. Nothing of the source is run or fetched:
urls are shown as text, images are decoded here and drawn small.
"""

import heapq
import json
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from common.config import command, parse_options
from common.console.html import data_url, render
from common.console.progress import progress
from common.outputs.record import require_replaceable, writing_file
from common.text.language import Language, Words, words_of
from data_tools.images.decode import SUFFIXES, BadImage, ImageLimits, decode, encode, image_size, resize
from data_tools.ingest.records import HINTS, Problem, Record, problem
from data_tools.readers.base import Meter, ReaderOptions
from data_tools.readers.detect import Source, open_source
from data_tools.split import fraction

THUMBNAIL = 160  # pixels, longest side
EXAMPLES = 5  # of each kind of problem


@dataclass(frozen=True)
class InspectConfig:
    """Show what a source holds."""

    src: tyro.conf.Positional[Path]
    """File or folder of any format."""
    out: Path = Path("inspect.html")
    """Page to write."""
    rows: int = 10
    """Rows to show, drawn by the hash of their keys."""
    limit: int = 2000
    """Rows of each split to read and decode; 0: all."""
    language: Language = "auto"
    """Of the page: zh, en, or auto, which follows the locale."""
    reader: tyro.conf.OmitArgPrefixes[ReaderOptions] = field(default_factory=ReaderOptions)

    def __post_init__(self):
        if self.rows < 0 or self.limit < 0:
            raise ValueError("--rows and --limit must be 0 or more")


@dataclass
class Findings:
    """What was found in one split."""

    split: str
    files: list[str]
    read: int = 0
    kept: int = 0
    without_image: int = 0
    complete: bool = True
    """False where `limit` ended the reading."""
    reasons: Counter = field(default_factory=Counter)
    examples: dict[str, list[Problem]] = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """Characters of the first caption of each row."""
    shown: list[tuple[float, int, Record]] = field(default_factory=list)
    """The rows drawn: minus the hash of the key, number, record; a heap."""

    @property
    def bad(self) -> int:
        return self.read - self.kept

    def lose(self, item: Problem) -> None:
        """Count a problem and keep the first few of its kind."""
        self.reasons[item.reason] += 1
        known = self.examples.setdefault(item.reason, [])
        if len(known) < EXAMPLES:
            known.append(item)

    def keep(self, record: Record, rows: int) -> None:
        """Count a record, and show it if its hash is among the smallest so far."""
        self.kept += 1
        if record.captions:
            self.lengths.append(len(record.captions[0]))
        heapq.heappush(self.shown, (-fraction(record.key), self.kept, record))
        if len(self.shown) > rows:
            heapq.heappop(self.shown)


def examine(source: Source, rows: int, limit: int) -> list[Findings]:
    """Read each split up to `limit` rows (0: all) and decode every image."""
    found = []
    meter = Meter(total=source.num_bytes)
    with progress(unit="B", unit_scale=True) as bar:
        for part in source.parts:
            names = [path.name for path in (*part.files, part.texts) if path]
            findings = Findings(part.split, names)
            found.append(findings)
            for item in source.read(part, meter):
                if limit and findings.read == limit:
                    findings.complete = False
                    break
                findings.read += 1
                _examine_one(item, findings, rows, source.options.max_image_bytes)
                bar.total = meter.total
                bar.update(meter.done - bar.n)
    return found


def _examine_one(item: Record | Problem, findings: Findings, rows: int, max_image_bytes: int) -> None:
    if isinstance(item, Problem):
        findings.lose(item)
        return
    if not item.image:
        findings.without_image += 1
        findings.keep(item, rows)
        return
    try:
        image = decode(item.image, ImageLimits(max_image_bytes))
    except BadImage as error:
        findings.lose(problem(item.where, item.key, error.reason, error.what))
        return
    findings.sizes.append(image.size)
    findings.keep(item, rows)


def summary(source: Source, found: Sequence[Findings]) -> list[str]:
    """The counts as lines of text."""
    lines = source.describe()
    for part in found:
        first = "" if part.complete else "the first "
        line = f"  {part.split}: {first}{part.read} rows, {part.kept} good, {part.bad} bad"
        if part.without_image:
            line += f", {part.without_image} without an image in the source (urls or a test split)"
        lines.append(line)
        for reason, count in part.reasons.most_common():
            lines.append(f"    {count} x {reason}, first {part.examples[reason][0].where}: {HINTS[reason]}")
        if part.sizes:
            lines.append(f"    images {size_text(part.sizes)}")
        if part.lengths:
            lines.append(f"    captions {spread(part.lengths)} characters")
    return lines


def spread(values: Sequence[float]) -> str:
    """Smallest, median and largest."""
    return f"{min(values):g} / {statistics.median(values):g} / {max(values):g}"


def size_text(sizes: Sequence[tuple[int, int]]) -> str:
    """Sizes in words: one size, or the spread of the shorter side and of the aspect."""
    if len(set(sizes)) == 1:
        return f"all {sizes[0][0]} x {sizes[0][1]}"
    shorter = spread([min(size) for size in sizes])
    aspects = spread([round(max(size) / min(size), 2) for size in sizes])
    return f"shorter side {shorter} pixels, aspect {aspects} (smallest / median / largest)"


# --- the page --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Thumbnail:
    """An image of the page: its address, "" where it cannot be decoded for `reason`."""

    url: str = ""
    width: int = 0
    height: int = 0
    reason: str = ""
    size: tuple[int, int] = (0, 0)
    """Of the image itself."""


def page(source: Source, found: Sequence[Findings], words: Words) -> str:
    """The whole page."""
    return render(
        "data_tools/templates/inspect.html",
        words,
        title=Path(source.path).name or str(source.path),
        source=source,
        found=found,
        hints=HINTS,
        rows=_rows,
        meta=lambda record: json.dumps(record.meta, ensure_ascii=False, sort_keys=True)[:2000],
        size_text=size_text,
        spread=spread,
    )


def _rows(part: Findings) -> list[tuple[Record, list[Thumbnail]]]:
    """The rows to show, each with its images, small."""
    shown = [record for _, _, record in sorted(part.shown, reverse=True, key=lambda entry: entry[:2])]
    return [(record, [_thumbnail(data) for data in _images(record)]) for record in shown]


def _images(record: Record) -> list[bytes]:
    extra = [data for name, data in sorted(record.extra.items()) if name.rpartition(".")[2] in SUFFIXES]
    return ([record.image] if record.image else []) + extra


def _thumbnail(data: bytes) -> Thumbnail:
    try:
        small = resize(decode(data, near=THUMBNAIL), "longest", THUMBNAIL)
    except BadImage as error:
        return Thumbnail(reason=error.reason)
    return Thumbnail(data_url(encode(small, "webp", 80)), *small.size, size=image_size(data))


@command
def main(argv: Sequence[str] | None = None) -> list[Findings]:
    """The command of this module."""
    config = parse_options(InspectConfig, argv, description=__doc__.splitlines()[0])
    require_replaceable(config.out)
    source = open_source(config.src, config.reader, exclude=[config.out])
    found = examine(source, config.rows, config.limit)
    with writing_file(config.out) as temporary:
        temporary.write_text(page(source, found, words_of(config.language, "inspect")), "utf-8")
    print("\n".join(summary(source, found)), file=sys.stderr)
    print(f"page: {config.out}", file=sys.stderr)
    return found


if __name__ == "__main__":
    main()
