"""Any recognised source to image shards: parallel, resumable, the same bytes each time, nothing lost without a reason.

    python -m data_tools.shard catalogue/ data/shards
    python -m data_tools.shard T2I/ data/shards --val-share 0.1 --size 128
    python -m data_tools.shard wukong_shards/ s3://bucket/shards --resize longest --size 512 --image-format jpg

Writes `{split}-%05d.tar`, `dataset.json`, `report.json` with the counts and `dropped.jsonl` with each lost row and its
reason: rows read = kept + dropped. A run that was killed, even by kill -9, is continued by the same command and ends in
the same bytes: `.journal/` holds which rows the finished shards end at, and only rows after them are decoded again.
"""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import tyro

from common.config import command, parse_options, to_mapping
from common.files import sha256_file
from data_tools.engine import EngineOptions
from data_tools.images.color_profiles import BROKEN
from data_tools.ingest.prepare import ImageOptions, Prepare
from data_tools.ingest.records import HINTS, Problem, Record, problem
from data_tools.ingest.shard_run import DROPPED_FILE, ShardRun, announce, reason_lines, say
from data_tools.readers.base import Part, ReaderOptions
from data_tools.readers.detect import Source, open_source
from data_tools.readers.inventory import Inventory
from data_tools.shards.image_shards import FORMAT
from data_tools.shards.targets import Target, open_target
from data_tools.split import hash_split, read_pairs, split_unit


@dataclass(frozen=True)
class ShardConfig:
    """Convert a source to shards."""

    EARLIER_NAMES: ClassVar = {"picture": "image"}
    src: tyro.conf.Positional[str]
    """File or folder in any recognised format, or URL of shards or of a list; `python -m data_tools.inspect SRC` shows
    what is recognised."""
    dst: tyro.conf.Positional[str]
    """Folder, or fsspec URL such as s3://bucket/shards."""
    samples_per_shard: int = 1000
    """Samples a tar."""
    max_shard_bytes: int = 0
    """Close a tar early when it reaches this size; 0: no limit."""
    val_share: float = 0.0
    """Share of the train split that becomes val, chosen by hash of the key: stable when data is added."""
    group_by: str = ""
    """Field of the meta whose samples stay in one split, such as the item that several images show."""
    split_file: Path | None = None
    """key<TAB>split, as data_tools.split writes it; instead of --val-share."""
    seed: int = 0
    """Of the split by hash."""
    workers: int = -1
    """Processes that decode and encode; -1: one a processor; 0: this process does it all."""
    overwrite: bool = False
    """Delete the shards of an earlier run with other options or another source first."""
    image: tyro.conf.OmitArgPrefixes[ImageOptions] = field(default_factory=ImageOptions)
    reader: tyro.conf.OmitArgPrefixes[ReaderOptions] = field(default_factory=ReaderOptions)
    work: tyro.conf.OmitArgPrefixes[EngineOptions] = field(default_factory=EngineOptions)

    def __post_init__(self):
        if not 0 <= self.val_share < 1:
            raise ValueError(f"--val-share must be from 0 to below 1, not {self.val_share}")
        if self.split_file and (self.val_share or self.group_by):
            raise ValueError("--split-file says the split of every key: leave out --val-share and --group-by")
        if self.samples_per_shard < 1 or self.max_shard_bytes < 0 or self.seed < 0:
            raise ValueError(
                "--samples-per-shard must be at least 1, --max-shard-bytes and --seed at least 0"
            )


def job_of(config: ShardConfig, source: Source) -> dict[str, Any]:
    """What decides the bytes of the result: options, and names and sizes of the source's files."""
    options = to_mapping(config)
    for name in ("src", "dst", "workers", "work", "overwrite"):
        del options[name]
    if config.split_file:
        options["split_file"] = sha256_file(config.split_file)
    if config.reader.image_root:
        options["reader"]["image_root"] = config.reader.image_root.name
    return {
        "format": FORMAT,
        "source_format": source.format,
        "files": files_of(source),
        "options": options,
    }


def files_of(source: Source) -> list[list[Any]]:
    """Names and sizes of the files that a source is read from; of a folder a hash over those of all its files."""
    files: list[list[Any]] = [list(file) for file in source.named_files]
    if source.inventory:
        files.append(["", listing_hash(source.inventory)])
    return files


def listing_hash(inventory: Inventory) -> str:
    """Changes when a file of a folder comes, goes or changes its size."""
    digest = hashlib.sha256()
    for entry in inventory.entries:
        path = inventory.root / entry.name
        size = os.stat(path).st_size if os.path.exists(path) else -1
        digest.update(os.fsencode(f"{entry.name}\0{size}\n"))
    return digest.hexdigest()


def shard(config: ShardConfig, source: Source | None = None) -> dict[str, Any]:
    """Run the conversion; returns the content of report.json. Raises ValueError for what the user has to change.

    `source`: `config.src`, where it was opened before.
    """
    source = source or open_source(config.src, config.reader, exclude=[config.dst])
    announce(source)
    parts = tuple(part for part in source.parts if part.has_images)
    if not parts:
        raise ValueError(f"{config.src} holds texts without images: there is nothing to put into shards")
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
        run = Run(config, source, target)
        report = run.report(Prepare(config.image, config.reader.max_image_bytes))
    finally:
        target.close()
    if not report["kept"]:
        raise ValueError(_nothing_kept(config, Counter(report["reasons"])))
    return report


class Run(ShardRun):
    """One conversion: records are prepared in workers and written as they are."""

    remedy = "choose another folder, or delete its shards with data_tools.shard --overwrite"

    def __init__(self, config: ShardConfig, source: Source, target: Target):
        workers = config.work.workers(config.workers)
        sizes = (config.samples_per_shard, config.max_shard_bytes)
        super().__init__(source, target, config.dst, job_of(config, source), sizes, workers)
        self.config = config
        self.splits = read_pairs(config.split_file) if config.split_file else {}

    def split_of(self, part: Part, record: Record) -> tuple[str, Record | Problem]:
        if self.config.split_file:
            if split := self.splits.get(record.key):
                return split, record
            return part.split, problem(record.where, record.key, "not_in_split_file")
        if part.split != "train" or not self.config.val_share:
            return part.split, record
        shares = {"train": 1 - self.config.val_share, "val": self.config.val_share}
        group = record.meta.get(self.config.group_by) if self.config.group_by else None
        return hash_split(split_unit(record.key, group), shares, self.config.seed), record

    def describe(self, record: Record) -> Sequence[str]:
        return ["broken color profile"] if record.meta.get("color_profile") == BROKEN else ()

    def may_delete(self) -> bool:
        return self.config.overwrite

    def more(self) -> dict[str, Any]:
        left_out = [part.split for part in self.source.parts if not part.has_images]
        return {"left_out": left_out, "counts": dict(self.journal.counts)}


def _nothing_kept(config: ShardConfig, reasons: Counter) -> str:
    if not reasons:
        return f"{config.src} has no rows"
    reason, count = reasons.most_common(1)[0]
    total = sum(reasons.values())
    most = f"{count} times {reason} ({HINTS[reason]})"
    return f"none of {total} rows and files of {config.src} was kept: {most}; see {DROPPED_FILE}"


@command
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command of this module."""
    config = parse_options(ShardConfig, argv, description=__doc__.splitlines()[0])
    start = time.monotonic()
    report = shard(config)
    seconds = time.monotonic() - start
    splits = ", ".join(f"{name} {count}" for name, count in sorted(report["splits"].items()))
    say(f"{report['kept']} kept ({splits}) | {report['dropped']} dropped | {seconds:.1f} s | {config.dst}")
    for line in reason_lines(report, HINTS):
        say(line)
    if report["left_out"]:
        say(f"  left out, texts without images: {', '.join(report['left_out'])}")
    return report


if __name__ == "__main__":
    main()
