"""Line drawings beside the images: pairs to train line control and ControlNet on.

    python -m data_tools.lines ../shared/data/goods data/goods_lines --method canny
    python -m data_tools.lines ../shared/data/line_pairs data/line_pairs --method given --size 128
    python -m data_tools.lines GoodsLine2Real/ data/pairs                   # parquet of drawing, photo, title

SRC is any recognised source; DST gets image shards with `{key}.line.png` beside each image, of its size, white on
black. A drawing that the source has is taken as it is (`given`), only turned white on black; without one it is made
of the image. How it came stands in the json as `line`: method, polarity, density. Ids stay as they are. A killed run
is continued by the same command, and every row that is lost is in dropped.jsonl with its reason.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from common.config import command, parse_options, to_mapping
from data_tools.engine import EngineOptions
from data_tools.images.decode import BadImage, decode
from data_tools.images.line_drawings import (
    LINE_MEMBER,
    LineMethod,
    encode_lines,
    extract,
    line_density,
    read_drawing,
    resize_lines,
    same_aspect,
)
from data_tools.ingest.prepare import ImageOptions, Prepare
from data_tools.ingest.records import HINTS, Problem, Record, problem
from data_tools.ingest.rewrite import Steps, print_report, require_kept, rewrite
from data_tools.ingest.shard_run import say
from data_tools.readers.base import ReaderOptions
from data_tools.readers.detect import open_source
from data_tools.shard import files_of

REASONS: dict[str, str] = HINTS | {
    "no_drawing": "the row has no drawing; --method canny, xdog or contour makes one of the image",
    "not_a_drawing": "the drawing is empty or inked all over; look at the file",
    "other_aspect": "drawing and image differ in shape; --fit stretch squashes the drawing onto the image",
    "no_lines": "the image has no edges to draw; another --method may find some",
}


@dataclass(frozen=True)
class LinesConfig:
    """Put line drawings beside images."""

    src: tyro.conf.Positional[Path]
    """File or folder in any recognised format."""
    dst: tyro.conf.Positional[str]
    """Folder, or fsspec URL such as s3://bucket/pairs."""
    method: Literal["auto", "given", "canny", "xdog", "contour"] = "auto"
    """auto: the row's own drawing where it has one, else contour."""
    fit: Literal["refuse", "stretch"] = "refuse"
    """What happens to a drawing of another aspect than its image."""
    size: int = 0
    """Side that images and drawings are cropped and scaled to, in pixels; 0 leaves images as they are."""
    samples_per_shard: int = 1000
    """Samples a tar."""
    workers: int = -1
    """Processes that decode and draw; -1: one a processor; 0: none but this one."""
    max_pixels: int = 64_000_000
    """Most pixels of an image or a drawing; more are refused before they are allocated."""
    reader: tyro.conf.OmitArgPrefixes[ReaderOptions] = field(default_factory=ReaderOptions)
    work: tyro.conf.OmitArgPrefixes[EngineOptions] = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        if self.size < 0 or self.samples_per_shard < 1:
            raise ValueError(
                f"--size must be at least 0 and --samples-per-shard at least 1, not {self.size} and "
                f"{self.samples_per_shard}"
            )
        self.image.limits(1)

    @property
    def image(self) -> ImageOptions:
        """What happens to the images: as they are, or squares in WebP."""
        if self.size:
            return ImageOptions("square", self.size, max_pixels=self.max_pixels)
        return ImageOptions("keep", image_format="same", max_pixels=self.max_pixels)


@dataclass(frozen=True)
class ExtractLines:
    """Records to records with a drawing, or to problems; picklable."""

    method: str
    fit: str
    prepare: Prepare

    def __call__(self, records: Sequence[Record]) -> list[Record | Problem]:
        return [self.one(record) for record in records]

    def one(self, record: Record) -> Record | Problem:
        given = drawing_of(record)
        if self.method == "given" and given is None:
            return Problem(record.where, record.key, "no_drawing", REASONS["no_drawing"])
        extra = {n: d for n, d in record.extra.items() if not is_drawing(n)}
        done = self.prepare.one(replace(record, extra=extra))
        if isinstance(done, Problem):
            return done
        if given is not None and self.method in ("auto", "given"):
            return self._with_given(record, done, given)
        return _with_extracted(done, "contour" if self.method == "auto" else self.method)

    def _with_given(self, record: Record, done: Record, given: bytes) -> Record | Problem:
        try:
            drawing = read_drawing(given, self.prepare.options.limits(self.prepare.max_image_bytes))
            photo = decode(record.image).size
        except BadImage as error:
            return problem(record.where, record.key, error.reason, f"the drawing: {error.what}")
        except ValueError as error:
            return Problem(record.where, record.key, "not_a_drawing", f"{error}")
        height, width = drawing.lines.shape
        if self.fit == "refuse" and not same_aspect((width, height), photo):
            what = f"the drawing is {width} x {height}, the image {photo[0]} x {photo[1]}"
            return Problem(record.where, record.key, "other_aspect", f"{what}; {REASONS['other_aspect']}")
        lines = self._cut(drawing.lines, photo, done)
        return with_lines(
            done, lines, method="given", polarity=drawing.polarity, coloured=drawing.is_coloured
        )

    def _cut(self, lines: np.ndarray, photo: tuple[int, int], done: Record) -> np.ndarray:
        """The part of the drawing that the image shows now, in its size: (H, W)"""
        if self.prepare.options.resize == "keep":
            return resize_lines(lines, photo)
        height, width = lines.shape
        side = min(photo)  # the centre square of the photo, in the drawing's pixels
        across, down = round(side * width / photo[0]), round(side * height / photo[1])
        left, top = (width - across) // 2, (height - down) // 2
        size = decode(done.image).size
        return resize_lines(np.ascontiguousarray(lines[top : top + down, left : left + across]), size)


def is_drawing(member: str) -> bool:
    """Whether a member of a sample is a drawing: `line.png`, or `drawing.jpg` as the readers name it."""
    return member.partition(".")[0] in ("line", "drawing")


def drawing_of(record: Record) -> bytes | None:
    """The encoded drawing that a record came with."""
    return next((data for name, data in sorted(record.extra.items()) if is_drawing(name)), None)


def _with_extracted(done: Record, method: LineMethod) -> Record | Problem:
    lines = extract(decode(done.image), method)
    if not lines.any():
        return Problem(done.where, done.key, "no_lines", REASONS["no_lines"])
    return with_lines(done, lines, method=method, polarity="light_on_dark", coloured=False)


def with_lines(record: Record, lines: np.ndarray, **how: Any) -> Record:
    """The record with a drawing (H, W) uint8, and `how` it came in its meta."""
    meta = record.meta | {"line": how | {"density": round(line_density(lines), 4)}}
    return replace(record, extra={**record.extra, LINE_MEMBER: encode_lines(lines)}, meta=meta)


def lines(config: LinesConfig) -> dict[str, Any]:
    """Run it; returns the content of report.json. Raises ValueError for what the user has to change."""
    source = open_source(config.src, config.reader, exclude=[config.dst])
    options = to_mapping(config)
    for name in ("src", "dst", "workers", "work"):
        del options[name]
    files = files_of(source)
    job = {"step": "lines", "source_format": source.format, "files": files, "options": options}
    work = ExtractLines(config.method, config.fit, Prepare(config.image, config.reader.max_image_bytes))
    steps = Steps(work, lambda number, record, result: result, lambda record: None)
    workers = config.work.workers(config.workers)
    return rewrite(source, config.dst, job, steps, config.samples_per_shard, workers, _described)


def _described(record: Record) -> list[str]:
    line = record.meta["line"]
    return [f"line {line['method']}", f"line {line['polarity']}"] + ["line coloured"] * line["coloured"]


@command
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command of this module."""
    config = parse_options(LinesConfig, argv, description=__doc__)
    start = time.monotonic()
    report = lines(config)
    print_report(report, config.dst, REASONS)
    say(f"  {time.monotonic() - start:.1f} s")
    require_kept(report, config.src, config.dst)
    return report


if __name__ == "__main__":
    main()
