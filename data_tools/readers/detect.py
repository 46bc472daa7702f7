"""Recognise the format of a source, say by which file, and account for every other file of its folder.

A list, a tar and images in one folder may each be what is meant: where two readings are plausible the user chooses.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from data_tools.ingest.records import Problem, problem
from data_tools.readers.base import (
    Item,
    Meter,
    Part,
    Reader,
    ReaderOptions,
    drop_duplicates,
    hash_path,
)
from data_tools.readers.choice import Reading, choose
from data_tools.readers.elsewhere import fetch_list, is_list, remote_parts
from data_tools.readers.finders import FINDERS, SPLITS, Folder
from data_tools.readers.formats import (
    chinese_clip,
    easynlp,
    ecommerce_t2i,
    folder,
    jsonl,
    line_drawing,
    parquet,
    table,
    webdataset,
)
from data_tools.readers.inventory import Entry, Inventory, take_inventory
from data_tools.readers.lists import unread_reason
from data_tools.shards.remote import is_remote

READERS: dict[str, Reader] = {
    "ecommerce_t2i": ecommerce_t2i.read,
    "easynlp": easynlp.read,
    "chinese_clip": chinese_clip.read,
    "csv": table.read,
    "jsonl": jsonl.read,
    "parquet": parquet.read,
    "folder": folder.read,
    "line_drawing": line_drawing.read,
    "webdataset": webdataset.read,
}
BY_PRODUCTS = ("dataset.json", "report.json", "dropped.jsonl", "groups.tsv", "splits.tsv", "tokenizer.json")
BY_PRODUCTS += ("roundtrip.png", "scores.jsonl")


@dataclass(frozen=True)
class Source:
    """A recognised source: iterate it for all items, or read one part at a time.

    The records of a test split without images, and of lists of urls, have an empty `image`.
    """

    path: Path | str
    """A URL where it is elsewhere."""
    format: str
    parts: tuple[Part, ...]
    options: ReaderOptions
    inventory: Inventory | None = field(default=None, compare=False, repr=False)
    """Of a folder; None where one file was named."""
    notes: tuple[str, ...] = ()
    """What to know about the choice of the format."""
    not_chosen: tuple[Path, ...] = ()
    """Files of the other splits, where one was chosen."""
    shards_elsewhere: tuple[tuple[str, int], ...] = ()
    """Names and sizes, see `readers.elsewhere.remote_parts`."""

    def __iter__(self) -> Iterator[Item]:
        meter = Meter()
        for part in self.parts:
            yield from self.read(part, meter)

    def read(self, part: Part, meter: Meter | None = None) -> Iterator[Item]:
        """Items of one part; a key met before in it is a problem.

        After the last part that has images comes a problem for each file of the folder that no row has read; that needs
        one `meter` for all parts.
        """
        whole = meter is not None or len(self.parts) == 1
        meter = meter or Meter()
        yield from drop_duplicates(READERS[self.format](part, self.options, meter))
        with_images = [p for p in self.parts if p.has_images] or self.parts
        if whole and part == with_images[-1]:
            yield from self._left_out(meter)

    def _left_out(self, meter: Meter) -> Iterator[Problem]:
        """In the order of the inventory."""
        if self.inventory is None:
            return
        own = {hash_path(path) for path in (*self.files, *self.not_chosen)}
        by_products = set(BY_PRODUCTS) if self.format == "webdataset" else set()
        for entry in self.inventory.entries:
            value = hash_path(self.inventory.root / entry.name)
            if value in own or value in meter.used or entry.name in by_products:
                continue
            if self.options.split and entry.kind in ("image", "caption", "json"):
                continue  # of the splits that were not chosen
            yield self._not_read(entry)

    def _not_read(self, entry: Entry) -> Problem:
        if entry.kind == "hidden":
            return problem(entry.name, "", "hidden_file")
        if entry.kind == "image":
            return problem(entry.name, "", "not_in_list")
        what = entry.what or self.unread_reason(entry)
        return problem(entry.name, "", "not_read", what)

    def unread_reason(self, entry: Entry) -> str:
        """Of a list, a tar, a caption or another file."""
        return entry.what or _unread_reason(self.path, entry, self.options, self.format)

    def describe(self) -> list[str]:
        """Lines for people: the format, the files that showed it, and the lists and archives beside them."""
        names = [name for name, _ in self.named_files]
        by = f" by {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" if names else ""
        lines = [f"{self.path}: {self.format}{by}"]
        lines += [f"note: {note}" for note in self.notes]
        if self.inventory:
            own = {*self.files, *self.not_chosen}
            others = [e for e in self.inventory.entries if e.kind in ("list", "tar")]
            others = [
                e for e in others if self.inventory.root / e.name not in own and e.name not in BY_PRODUCTS
            ]
            lines += [f"note: {e.name} is not read: {self.unread_reason(e)}" for e in others[:5]]
            lines += [f"note: nor are {len(others) - 5} more lists and tars"] if len(others) > 5 else []
            if self.inventory.results:
                lines.append(
                    f"note: results of data_tools are left alone: {', '.join(self.inventory.results[:5])}"
                )
        return lines

    @property
    def num_bytes(self) -> int:
        """Size of the files that are read, 0 for folders of images, whose files are counted when they are listed."""
        return sum(max(size, 0) for _, size in self.named_files)

    @property
    def named_files(self) -> list[tuple[str, int]]:
        """Names and sizes of the files that are read; of shards elsewhere see `shards_elsewhere`."""
        if self.shards_elsewhere:
            return list(self.shards_elsewhere)
        return [(path.name, path.stat().st_size) for path in self.files if path.is_file()]

    @property
    def files(self) -> list[Path]:
        """Every file or folder named by the parts."""
        found = [path for part in self.parts for path in (*part.files, part.texts) if path]
        return list(dict.fromkeys(found))


def open_source(
    path: Path | str, options: ReaderOptions | None = None, exclude: Sequence[Path | str] = ()
) -> Source:
    """Recognise `path`, or a URL of shards or of a list. `exclude`: what the running command writes, in case it lies
    below.

    Raises FileNotFoundError, or ValueError that says what was found and what is known, or which readings there are.
    """
    options = options or ReaderOptions()
    if is_remote(str(path)):
        return _open_elsewhere(str(path), options)
    path = Path(str(path).removeprefix("file://"))
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    root = options.image_root
    if root is not None and not root.is_dir():
        raise FileNotFoundError(f"--image-root {root} is no folder")
    inventory = take_inventory(path, [Path(p) for p in exclude]) if path.is_dir() else None
    reading, notes = _recognise(path, options, inventory)
    parts = tuple(sorted(reading.parts, key=lambda part: [*SPLITS.values(), part.split].index(part.split)))
    chosen = _of_split(parts, options.split, path)
    not_chosen = tuple(f for p in parts if p not in chosen for f in (*p.files, p.texts) if f)
    return Source(path, reading.name, chosen, options, inventory, notes, not_chosen)


def _of_split(parts: tuple[Part, ...], split: str, path: Path | str) -> tuple[Part, ...]:
    """All where `split` is ""."""
    chosen = tuple(part for part in parts if split in ("", part.split))
    if not chosen:
        known = ", ".join(part.split for part in parts)
        raise ValueError(f"{path} has no split {split!r}: it has {known}")
    return chosen


def _open_elsewhere(url: str, options: ReaderOptions) -> Source:
    if is_list(url):
        return replace(open_source(fetch_list(url), options), path=url)
    if options.format not in ("auto", "webdataset"):
        raise ValueError(
            f"{url}: of formats in folders, webdataset alone is read by URL, not {options.format}"
        )
    parts, files = remote_parts(url)
    chosen = _of_split(parts, options.split, url)
    read = {path.name for part in chosen for path in part.files}
    return Source(
        url, "webdataset", chosen, options, shards_elsewhere=tuple(f for f in files if f[0] in read)
    )


def _recognise(
    path: Path, options: ReaderOptions, inventory: Inventory | None
) -> tuple[Reading, tuple[str, ...]]:
    if inventory is None:
        beside = sorted(entry.name for entry in os.scandir(path.parent) if entry.is_file())
        neighbors = Inventory(path.parent, [Entry(name, "list") for name in beside])
        looked_at = Folder(neighbors, options, only=path.name)
    else:
        looked_at = Folder(inventory, options)
    readings = []
    for name, find in FINDERS.items():
        if options.format in ("auto", name) and (parts := find(looked_at)):
            readings.append(Reading(name, tuple(parts)))
            for file in (f for part in parts for f in (*part.files, part.texts) if f):
                relative = file.relative_to(looked_at.root).as_posix() if file != looked_at.root else ""
                looked_at.taken.add(f"{relative}/" if file.is_dir() else relative)
            if inventory is None:
                break
    if readings:
        return choose(path, readings, looked_at)
    raise ValueError(_unknown(path, options, inventory))


def _unknown(path: Path, options: ReaderOptions, inventory: Inventory | None) -> str:
    wanted = (
        f"it is not {options.format}" if options.format != "auto" else f"known formats: {', '.join(READERS)}"
    )
    if inventory is None:
        reason = unread_reason(path, options) or f"a file of {path.stat().st_size} bytes"
        return f"cannot recognise {path} ({reason}); {wanted}; --format names one"
    entries = [e for e in inventory.entries if e.kind != "hidden"]
    notable = [e for e in entries if e.kind in ("list", "tar", "json")] + [e for e in entries if e.what]
    reasons = "; ".join(f"{e.name}: {_unread_reason(path, e, options, '')}" for e in notable[:3])
    names = [e.name for e in entries] + [f"{name}/ with shards" for name in inventory.results]
    there = f"a folder with {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}"
    there = there if names else "an empty folder"
    return f"cannot recognise {path} ({reasons or there}); {wanted}; --format names one"


def _unread_reason(path: Path, entry: Entry, options: ReaderOptions, chosen: str) -> str:
    if entry.what:
        return entry.what
    if entry.kind in ("list", "json"):
        reason = unread_reason(path / entry.name, options)
    elif entry.kind == "tar":
        reason = ""
    else:
        return "it belongs to no image" if entry.kind == "caption" else "no data"
    if reason:
        return reason
    if "/" in entry.name:
        return f"it lies in a folder below: name {path / entry.name} itself to read it"
    return (
        f"the source is read as {chosen}: --format or naming the file itself reads this one" if chosen else ""
    )
