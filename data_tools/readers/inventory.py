"""Every file below a folder, once: what it is by name and first bytes. Nothing that lies there goes uncounted.

Links to folders are followed; a folder that is reached twice (a loop, a link to a neighbor) is listed where it is met
first, real folders before links. Folders that hold the result of another command of this package are named, not listed.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from data_tools.images.decode import SUFFIXES, sniff
from data_tools.ingest.file_kinds import what_is

Kind = Literal["image", "caption", "json", "list", "tar", "other", "hidden"]
CAPTION_SUFFIXES = (".txt", ".caption")
LIST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".xlsx", ".xls", ".ods", ".ndjson")
OWN_RESULT = "dataset.json"  # of data_tools.shards.image_shards, beside the tars
WORK_FOLDERS = (".journal", ".download")  # of the package, beside what it writes
_HEAD = 512  # bytes


class Entry(NamedTuple):
    """A file: its name below the root with `/`, what it is, and for `other` why it is not read."""

    name: str
    kind: Kind
    what: str = ""


@dataclass
class Inventory:
    """All files below `root` in reading order: those of a folder by name, then its folders, then linked folders."""

    root: Path
    entries: list[Entry] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    """Folders below the root that hold results of this package; their files are not listed."""
    folders: list[str] = field(default_factory=list)
    """Names of the folders in the root itself."""

    def of(self, *kinds: Kind) -> list[str]:
        """Names of one or more kinds."""
        return [entry.name for entry in self.entries if entry.kind in kinds]

    @cached_property
    def at_top(self) -> list[str]:
        """Files of the root itself that are not hidden, by name."""
        return sorted(e.name for e in self.entries if "/" not in e.name and e.kind != "hidden")

    def below(self, folder: str) -> "Inventory":
        """What lies in one of the folders, with names below that one."""
        head = f"{folder}/"
        kept = [e._replace(name=e.name[len(head) :]) for e in self.entries if e.name.startswith(head)]
        folders = {e.name.partition("/")[0] for e in kept if "/" in e.name and e.kind != "hidden"}
        return Inventory(self.root / folder, kept, folders=sorted(folders))


def take_inventory(root: Path, exclude: Sequence[Path] = ()) -> Inventory:
    """List `root`. `exclude`: files and folders that the running command writes, if they lie below it."""
    skipped = {os.path.realpath(path): os.path.basename(os.path.abspath(path)) for path in exclude}
    found = Inventory(root)
    seen = {_identity(root)}
    linked: list[str] = []
    _walk(found, "", seen, skipped, linked)
    while linked:  # links, once everything real is known
        name = linked.pop(0)
        if (identity := _identity(root / name)) not in seen:
            seen.add(identity)
            more: list[str] = []
            _walk(found, name, seen, skipped, more)
            linked += more
    return found


def _identity(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _walk(found: Inventory, folder: str, seen: set, skipped: dict[str, str], linked: list[str]) -> None:
    """Append the files of `folder` and of the real folders below it; collect links to folders."""
    path = found.root / folder
    hidden = any(part.startswith(".") for part in folder.split("/"))
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError as error:
        found.entries.append(Entry(f"{folder}/", "other", f"a folder that cannot be read: {error.strerror}"))
        return
    names = {entry.name for entry in entries}
    if folder and OWN_RESULT in names and any(name.endswith(".tar") for name in names):
        found.results.append(folder)
        return
    folders = []
    for entry in entries:
        name = f"{folder}/{entry.name}" if folder else entry.name
        if entry.name in skipped.values() and os.path.realpath(entry.path) in skipped:
            continue
        if entry.name in WORK_FOLDERS:
            continue
        if os.path.isdir(entry.path):
            folders.append((name, entry))
        else:
            found.entries.append(_examine(found.root, name, hidden or entry.name.startswith(".")))
    for name, entry in folders:
        if not folder and not entry.name.startswith("."):
            found.folders.append(name)
        if entry.is_symlink():
            linked.append(name)
        elif (identity := _identity(Path(entry.path))) not in seen:
            seen.add(identity)
            _walk(found, name, seen, skipped, linked)


def _examine(root: Path, name: str, hidden: bool) -> Entry:
    suffix = os.path.splitext(name)[1].lower()
    if hidden:
        return Entry(name, "hidden")
    if suffix[1:] in SUFFIXES:
        return Entry(name, "image")
    if suffix in CAPTION_SUFFIXES:
        return Entry(name, "caption")
    if suffix == ".json":
        return Entry(name, "json")
    head = read_head(root / name)
    if isinstance(head, str):
        return Entry(name, "other", head)
    if sniff(head):
        return Entry(name, "image")
    if suffix in LIST_SUFFIXES:
        return Entry(name, "list")
    return Entry(name, "tar") if suffix == ".tar" else Entry(name, "other", what_is(head))


def read_head(path: Path) -> bytes | str:
    """The first bytes of a plain file, or why there are none. Never opens a pipe or a device."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return "no plain file but a pipe, a socket or a device"
        with path.open("rb") as file:
            return file.read(_HEAD)
    except OSError as error:
        return "a link to nothing" if path.is_symlink() else str(error.strerror)


def is_image_file(path: Path) -> bool:
    """By its suffix, else by its bytes."""
    return _examine(path.parent, path.name, path.name.startswith(".")).kind == "image"


def image_stems(name: str) -> Iterator[str]:
    """What its caption may be called, the best first: `a` and `a.jpg` for `a.jpg`, `b.5` and `b` for `b.5`."""
    stem, suffix = os.path.splitext(name)
    known = suffix[1:].lower() in SUFFIXES
    yield stem if known else name
    yield name if known else stem
