"""Any recognised source to image shards: parallel, resumable, the same bytes each time, nothing lost without a reason.

    python -m data_tools.shard catalogue/ data/shards
    python -m data_tools.shard T2I/ data/shards --val-share 0.1 --size 128
    python -m data_tools.shard wukong_shards/ s3://bucket/shards --resize longest --size 512 --image-format jpg

Writes `{split}-%05d.tar`, `dataset.json`, `report.json` with the counts and `dropped.jsonl` with each lost row and its
reason: rows read = kept + dropped. A run that was killed, even by kill -9, is continued by the same command and ends in
the same bytes: `.journal/` holds which rows the finished shards end at, and only rows after them are decoded again.
"""

import hashlib
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from tqdm import tqdm

from common.config import command, parse_options, to_mapping
from common.files import sha256_file
from data_tools.parallel import cpu_count, ordered_map
from data_tools.prepare import PictureOptions, Prepare
from data_tools.readers import Meter, Part, ReaderOptions, Source, open_source
from data_tools.records import HINTS, Problem, Record, problem
from data_tools.shards import DATASET_FILE, FORMAT, ShardWriter
from data_tools.split import hash_split, read_pairs, split_unit
from data_tools.targets import JOB_FILE, JOURNAL, Journal, Target, open_target

BATCH = 16  # records a work package: 200 kB of pictures, so that the hand-over costs less than a tenth of the work
REPORT_FILE, DROPPED_FILE = "report.json", "dropped.jsonl"
_SHARD = re.compile(r"[^.].*-\d{5,}\.tar")


@dataclass(frozen=True)
class ShardConfig:
    """Convert a source to shards."""

    src: tyro.conf.Positional[Path]
    """File or folder in any recognised format; `python -m data_tools.inspect SRC` shows what is recognised."""
    dst: tyro.conf.Positional[str]
    """Folder, or fsspec URL such as s3://bucket/shards."""
    samples_per_shard: int = 1000
    """Samples a tar."""
    max_shard_bytes: int = 0
    """Close a tar early when it reaches this size; 0: no limit."""
    val_share: float = 0.0
    """Share of the train split that becomes val, chosen by hash of the key: stable when data is added."""
    group_by: str = ""
    """Field of the meta whose samples stay in one split, such as the item that several pictures show."""
    split_file: Path | None = None
    """key<TAB>split, as data_tools.split writes it; instead of --val-share."""
    seed: int = 0
    """Of the split by hash."""
    workers: int = -1
    """Processes that decode and encode; -1: one a processor; 0: this process does it all."""
    overwrite: bool = False
    """Delete the shards of an earlier run with other options or another source first."""
    picture: tyro.conf.OmitArgPrefixes[PictureOptions] = field(default_factory=PictureOptions)
    reader: tyro.conf.OmitArgPrefixes[ReaderOptions] = field(default_factory=ReaderOptions)

    def __post_init__(self):
        if not 0 <= self.val_share < 1:
            raise ValueError(f"--val-share must be from 0 to below 1, not {self.val_share}")
        if self.split_file and (self.val_share or self.group_by):
            raise ValueError("--split-file says the split of every key: leave out --val-share and --group-by")
        if self.samples_per_shard < 1 or self.max_shard_bytes < 0 or self.seed < 0:
            raise ValueError(
                "--samples-per-shard must be at least 1, --max-shard-bytes and --seed at least 0"
            )


class Row(NamedTuple):
    """One row on its way: a Record still to prepare, a Problem, or None where its shard is whole already."""

    number: int
    split: str
    item: Record | Problem | None


def job_of(config: ShardConfig, source: Source) -> dict[str, Any]:
    """What decides the bytes of the result: options, and names and sizes of the source's files."""
    options = to_mapping(config)
    for name in ("src", "dst", "workers", "overwrite"):
        del options[name]
    if config.split_file:
        options["split_file"] = sha256_file(config.split_file)
    if config.reader.image_root:
        options["reader"]["image_root"] = config.reader.image_root.name
    files = [
        [path.name, path.stat().st_size if path.is_file() else listing_hash(path)] for path in source.files
    ]
    return {"format": FORMAT, "source_format": source.format, "files": files, "options": options}


def listing_hash(folder: Path) -> str:
    """Changes when a file below `folder` comes, goes or changes its size."""
    digest = hashlib.sha256()
    for base, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(base, name)
            size = os.stat(path).st_size if os.path.exists(path) else -1
            digest.update(os.fsencode(f"{os.path.relpath(path, folder)}\0{size}\n"))
    return digest.hexdigest()


def crashed(record: Record) -> Problem:
    """What becomes of a record whose picture ends its worker process."""
    return problem(record.where, record.key, "decoder_crashed")


def shard(config: ShardConfig) -> dict[str, Any]:
    """Run the conversion; returns the content of report.json. Raises ValueError for what the user has to change."""
    source = open_source(config.src, config.reader)
    parts = tuple(part for part in source.parts if part.has_images)
    if not parts:
        raise ValueError(f"{config.src} holds texts without pictures: there is nothing to put into shards")
    splits = ", ".join(part.split for part in parts)
    if config.val_share and any(part.split == "val" for part in parts):
        raise ValueError(
            f"{config.src} has its own val split: leave out --val-share or choose one (--split train)"
        )
    if config.split_file and len(parts) > 1:
        raise ValueError(f"{config.src} has the splits {splits}: choose one with --split to split it anew")
    target = open_target(config.dst)
    try:
        target.lock()
        return Run(config, source, parts, target).report()
    finally:
        target.close()


class Run:
    """One conversion: rows are read here in order, prepared in workers, written here in the same order."""

    def __init__(self, config: ShardConfig, source: Source, parts: tuple[Part, ...], target: Target):
        self.config, self.source, self.parts, self.target = config, source, parts, target
        self.job = job_of(config, source)
        self.splits = read_pairs(config.split_file) if config.split_file else {}
        self.meter = Meter(total=source.num_bytes)
        self.kept: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.writers: dict[str, ShardWriter] = {}

    def report(self) -> dict[str, Any]:
        """Do what is left to do; a finished job is recognised and left alone."""
        done = self.target.read_json(REPORT_FILE)
        begun = self.target.read_json(JOB_FILE)
        if begun is None and done and done["job"] == self.job:
            self.target.remove(JOURNAL)
            say(f"{self.config.dst} is complete already, nothing to do")
            return done
        if begun != self.job:
            self._start_afresh()
        self.journal = Journal(self.target)
        if self.journal.count:
            say(f"continuing after {self.journal.count} whole shards, row {self.journal.last_row}")
        for split in self.journal.shards:
            self._writer(split)
        try:
            self._convert()
        except BaseException:
            for writer in self.writers.values():
                writer.abort()
            raise
        return self._finish()

    def _start_afresh(self) -> None:
        """Make the folder empty of shards, which needs --overwrite where there are any, and begin a journal."""
        names = self.target.names()
        shards = [name for name in names if _SHARD.fullmatch(name) or name == DATASET_FILE]
        if shards and not self.config.overwrite:
            raise ValueError(
                f"{self.config.dst} holds {shards[0]} of another source or of other options: choose another folder, "
                "or pass --overwrite to delete its shards"
            )
        for name in (JOB_FILE, REPORT_FILE, DROPPED_FILE, *shards, *self.target.journal_names()):
            self.target.remove(name)
        self.target.write_json(JOB_FILE, self.job)

    def _rows(self) -> Iterator[Row]:
        """Every row of the source; what the journal knows is not prepared again."""
        finished = {split: sum(shards.values()) for split, shards in self.journal.shards.items()}
        number, seen = 0, Counter()
        for part in self.parts:
            for item in self.source.read(part, self.meter):
                number += 1
                split = part.split
                if isinstance(item, Record):
                    split, item = self._with_split(part, item)
                if isinstance(item, Record) and number <= self.journal.last_row:
                    item = self.journal.lost.get(number, item)
                    if isinstance(item, Record):
                        seen[split] += 1
                        item = item if seen[split] > finished.get(split, 0) else None
                yield Row(number, split, item)

    def _with_split(self, part: Part, record: Record) -> tuple[str, Record | Problem]:
        if self.config.split_file:
            if split := self.splits.get(record.key):
                return split, record
            return part.split, problem(record.where, record.key, "not_in_split_file")
        if part.split != "train" or not self.config.val_share:
            return part.split, record
        shares = {"train": 1 - self.config.val_share, "val": self.config.val_share}
        group = record.meta.get(self.config.group_by) if self.config.group_by else None
        return hash_split(split_unit(record.key, group), shares, self.config.seed), record

    def _batches(self) -> Iterator[tuple[list[Row], list[Record]]]:
        rows: list[Row] = []
        records: list[Record] = []
        for row in self._rows():
            rows.append(row)
            if isinstance(row.item, Record):
                records.append(row.item)
            if len(records) == BATCH or len(rows) == 64 * BATCH:
                yield rows, records
                rows, records = [], []
        if rows:
            yield rows, records

    def _convert(self) -> None:
        config = self.config
        prepare = Prepare(config.picture, config.reader.max_image_bytes)
        workers = cpu_count() if config.workers < 0 else config.workers
        path = self.target.staging / f".{DROPPED_FILE}.tmp"
        with (
            path.open("w", encoding="utf-8") as dropped,
            tqdm(unit="B", unit_scale=True, disable=None) as bar,
        ):
            for rows, results in ordered_map(prepare, self._batches(), workers, crashed):
                ready = iter(results)
                for row in rows:
                    prepared = isinstance(row.item, Record)
                    item = next(ready) if prepared else row.item
                    if isinstance(item, Problem):
                        dropped.write(json.dumps(item.to_json(), ensure_ascii=False, sort_keys=True) + "\n")
                    self._consume(row, item, prepared)
                bar.total = self.meter.total
                bar.set_postfix(
                    kept=sum(self.kept.values()), dropped=sum(self.reasons.values()), refresh=False
                )
                bar.update(self.meter.done - bar.n)
        os.replace(path, self.target.staging / DROPPED_FILE)

    def _consume(self, row: Row, item: Record | Problem | None, prepared: bool) -> None:
        if isinstance(item, Problem):
            self.reasons[item.reason] += 1
            if prepared:
                self.journal.lose(row.number, item)
            return
        self.kept[row.split] += 1
        if item is None:
            return
        writer = self._writer(row.split)
        path = writer.write(item)
        if path:
            samples = writer.shards[path.name]
            self.target.put(path)
            self.journal.finish(row.split, path.name, samples, row.number)
            if not sys.stderr.isatty():  # where no bar is drawn
                share = f" ({self.meter.done / self.meter.total:.0%})" if self.meter.total else ""
                say(f"{path.name} | row {row.number}{share} | {sum(self.reasons.values())} dropped")

    def _writer(self, split: str) -> ShardWriter:
        if split not in self.writers:
            config, shards = self.config, self.journal.shards.get(split, {})
            sizes = (config.samples_per_shard, config.max_shard_bytes)
            self.writers[split] = ShardWriter(self.target.staging, split, *sizes, shards=shards)
        return self.writers[split]

    def _finish(self) -> dict[str, Any]:
        """The last, shorter shards, then the files about them; the journal goes last, so a kill repeats this."""
        for writer in self.writers.values():
            if path := writer.close():
                self.target.put(path)
        self.target.put(self.target.staging / DROPPED_FILE)
        kept, dropped = sum(self.kept.values()), sum(self.reasons.values())
        report = {
            "read": kept + dropped,
            "kept": kept,
            "dropped": dropped,
            "reasons": dict(self.reasons),
            "splits": dict(self.kept),
            "left_out": [part.split for part in self.source.parts if not part.has_images],
            "job": self.job,
        }
        if kept:
            self.target.put(self.target.staging / DATASET_FILE)
        self.target.write_json(REPORT_FILE, report)
        self.target.remove(JOB_FILE)
        self.target.remove(JOURNAL)
        self.target.tidy()
        if not kept:
            raise ValueError(_nothing_kept(self.config, self.reasons))
        return report


def _nothing_kept(config: ShardConfig, reasons: Counter) -> str:
    if not reasons:
        return f"{config.src} has no rows"
    reason, count = reasons.most_common(1)[0]
    total = sum(reasons.values())
    most = f"{count} times {reason} ({HINTS[reason]})"
    return f"none of {total} rows of {config.src} was kept: {most}; see {DROPPED_FILE}"


def say(text: str) -> None:
    """One line an event, beside the progress bar."""
    print(text, file=sys.stderr, flush=True)


@command
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command of this module."""
    config = parse_options(ShardConfig, argv, description=__doc__.splitlines()[0])
    start = time.monotonic()
    report = shard(config)
    seconds = time.monotonic() - start
    splits = ", ".join(f"{name} {count}" for name, count in sorted(report["splits"].items()))
    say(f"{report['kept']} kept ({splits}) | {report['dropped']} dropped | {seconds:.1f} s | {config.dst}")
    for reason, count in sorted(report["reasons"].items(), key=lambda item: -item[1]):
        say(f"  {count} x {reason}: {HINTS[reason]}")
    if report["left_out"]:
        say(f"  left out, texts without pictures: {', '.join(report['left_out'])}")
    return report


if __name__ == "__main__":
    main()
