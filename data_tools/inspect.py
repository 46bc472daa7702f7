"""Look before training: recognise any source, show ten of its rows with their pictures, and say what is wrong.

    python -m data_tools.inspect catalogue/
    python -m data_tools.inspect T2I/ --split train --out t2i.html --limit 0

Writes one HTML page that needs nothing beside it, and prints the same counts. Nothing of the source is run or fetched:
urls are shown as text, pictures are decoded here and drawn small.
"""

import base64
import heapq
import html
import json
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from common.config import command, parse_options
from common.language import Language, Words, words_of
from common.output import require_replaceable, writing_file
from common.progress import progress
from data_tools.images import SUFFIXES, BadImage, ImageLimits, decode, encode, image_size, resize
from data_tools.readers import Meter, ReaderOptions, Source, open_source
from data_tools.records import HINTS, Problem, Record, problem
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
    without_picture: int = 0
    complete: bool = True
    """False where `limit` ended the reading."""
    reasons: Counter = field(default_factory=Counter)
    examples: dict[str, list[Problem]] = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """Characters of the first caption of each row."""
    shown: list[tuple[float, int, Record]] = field(default_factory=list)
    """The rows drawn: minus the hash of the key, number, record; a heap."""

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
    """Read each split up to `limit` rows (0: all) and decode every picture."""
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
        findings.without_picture += 1
        findings.keep(item, rows)
        return
    try:
        picture = decode(item.image, ImageLimits(max_image_bytes))
    except BadImage as error:
        findings.lose(problem(item.where, item.key, error.reason, error.what))
        return
    findings.sizes.append(picture.size)
    findings.keep(item, rows)


def summary(source: Source, found: Sequence[Findings]) -> list[str]:
    """The counts as lines of text."""
    lines = source.describe()
    for part in found:
        first = "" if part.complete else "the first "
        line = f"  {part.split}: {first}{part.read} rows, {part.kept} good, {part.read - part.kept} bad"
        if part.without_picture:
            line += f", {part.without_picture} without a picture in the source (urls or a test split)"
        lines.append(line)
        for reason, count in part.reasons.most_common():
            lines.append(f"    {count} x {reason}, first {part.examples[reason][0].where}: {HINTS[reason]}")
        if part.sizes:
            lines.append(f"    pictures {size_text(part.sizes)}")
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

STYLE = """
body{font:15px/1.5 system-ui,"Noto Sans CJK SC","Microsoft YaHei",sans-serif;margin:2rem auto;max-width:72rem;
padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.5rem;margin:0}h2{font-size:1.15rem;margin:2rem 0 .5rem;border-bottom:1px solid #ddd}
table{border-collapse:collapse;width:100%}td,th{padding:.4rem .6rem;text-align:left;vertical-align:top;
border-bottom:1px solid #eee;overflow-wrap:anywhere}th{color:#666;font-weight:500;white-space:nowrap}
table{margin-bottom:1.5rem}figure{display:inline-block;margin:0 6px 4px 0}figcaption,small{font-size:12px;color:#777}
img{display:block;background:#f4f4f4;border:1px solid #ddd}
pre{margin:0;font-size:12px;white-space:pre-wrap;color:#555}.n{text-align:right}.bad{color:#b00020}.ok{color:#0a7a33}
.rows td:nth-child(2){min-width:12rem}.rows td:nth-child(3){min-width:10rem}
.hint{color:#555}.none{color:#999}small{color:#777}
"""


def page(source: Source, found: Sequence[Findings], words: Words) -> str:
    """The whole page; every text of the source is escaped."""
    title = html.escape(f"{Path(source.path).name or source.path}")
    what = words(
        "Recognised as {format}, {count} split(s).", format=f"<b>{source.format}</b>", count=len(found)
    )
    body = [f"<h1>{title}</h1><p>{what}</p>"]
    for part in found:
        body.append(f"<h2>{html.escape(part.split)} <small>{html.escape(_names(part.files))}</small></h2>")
        body += [_counts(part, words), _problems(part, words), _rows(part, words)]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="{words.tag}"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _names(files: Sequence[str]) -> str:
    return ", ".join(files[:4]) + (f" and {len(files) - 4} more" if len(files) > 4 else "")


def _counts(part: Findings, words: Words) -> str:
    more = words("(reading ended at --limit; more rows follow)")
    note = "" if part.complete else f" <small>{more}</small>"
    bad = part.read - part.kept
    kind = "bad" if bad else "ok"
    rows = [("rows read", f"{part.read}{note}"), ("good", part.kept), ("bad", f'<b class="{kind}">{bad}</b>')]
    if part.without_picture:
        rows.append(
            ("without picture", f"{part.without_picture} {words('(urls to download, or a test split)')}")
        )
    if part.sizes:
        rows.append(("pictures", words.sentence(size_text(part.sizes))))
    if part.lengths:
        rows.append(
            ("caption, characters", f"{spread(part.lengths)} {words('(smallest / median / largest)')}")
        )
    return f"<table>{''.join(f'<tr><th>{words(name)}</th><td>{value}</td></tr>' for name, value in rows)}</table>"


def _problems(part: Findings, words: Words) -> str:
    if not part.reasons:
        return f'<p class="ok">{words("Nothing wrong was found.")}</p>'
    rows = []
    for reason, count in part.reasons.most_common():
        examples = "".join(map(_example, part.examples[reason]))
        hint = html.escape(words(HINTS[reason]))
        rows.append(
            f'<tr><td class="n bad">{count}</td><td>{reason}</td><td class="hint">{hint}</td><td>{examples}</td></tr>'
        )
    header = _header(words, "rows", "what is wrong", "what to do", "where")
    return f"<table>{header}{''.join(rows)}</table>"


def _example(item: Problem) -> str:
    place, key = html.escape(item.where), html.escape(item.key[:60])
    return f'<div title="{html.escape(item.detail)}">{place} <small>{key}</small></div>'


def _header(words: Words, *names: str) -> str:
    return f"<tr>{''.join(f'<th>{words(name)}</th>' for name in names)}</tr>"


def _rows(part: Findings, words: Words) -> str:
    shown = [record for _, _, record in sorted(part.shown, reverse=True, key=lambda entry: entry[:2])]
    rows = []
    for record in shown:
        pictures = (
            "".join(_thumbnail(data) for data in _pictures(record))
            or f'<span class="none">{words("no picture")}</span>'
        )
        captions = "".join(f"<div>{html.escape(text)}</div>" for text in record.captions[:10])
        meta = html.escape(json.dumps(record.meta, ensure_ascii=False, sort_keys=True))
        key = f"{html.escape(record.key)}<br><small>{html.escape(record.where)}</small>"
        rows.append(
            f"<tr><td>{pictures}</td><td>{captions}</td><td>{key}</td><td><pre>{meta[:2000]}</pre></td></tr>"
        )
    header = _header(words, "picture", "caption", "key", "meta")
    return f'<table class="rows">{header}{"".join(rows)}</table>'


def _pictures(record: Record) -> list[bytes]:
    extra = [data for name, data in sorted(record.extra.items()) if name.rpartition(".")[2] in SUFFIXES]
    return ([record.image] if record.image else []) + extra


def _thumbnail(data: bytes) -> str:
    try:
        picture = decode(data, near=THUMBNAIL)
    except BadImage as error:
        return f'<span class="bad">{error.reason}</span>'
    width, height = image_size(data)
    small = resize(picture, "longest", THUMBNAIL)
    text = base64.b64encode(encode(small, "webp", 80)).decode()
    return (
        f'<figure><img src="data:image/webp;base64,{text}" width="{small.width}" height="{small.height}" '
        f'alt=""><figcaption>{width} x {height}</figcaption></figure>'
    )


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
