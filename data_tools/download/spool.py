"""What has been fetched of one part of a list, on disk, so that kill -9 loses nothing but requests under way.

A spool is one append-only file: for each row a line of JSON, then the image. A torn tail (a killed process, a power
cut) is recognised by its length or checksum and cut off. Finished parts become tars and their spools are deleted.
"""

import json
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from common.files import atomic_path, naming_a_full_disk
from data_tools.images.decode import SUFFIXES
from data_tools.ingest.records import Record
from data_tools.shards.image_shards import tar_writer, write_sample
from data_tools.shards.index import ShardIndex


class Entry(NamedTuple):
    """A row's outcome: where its image is in the spool, or why there is none."""

    offset: int
    size: int
    reason: str
    detail: str
    host: str


class Spool:
    """Outcomes of the rows of one part, by row number."""

    def __init__(self, path: Path):
        """Open or create; what is whole of an earlier run is there again."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.entries: dict[int, Entry] = {}
        self._file = path.open("a+b", buffering=0)
        self._end = self._recover()
        self._file.truncate(self._end)

    def _recover(self) -> int:
        """Read entries up to the first torn one; returns where it begins."""
        end = 0
        with self.path.open("rb") as reader:
            while line := reader.readline():
                header = _parse(line)
                if header is None:
                    break
                rows, size, checksum, reason, detail, host = header
                data = reader.read(size)
                if len(data) < size or zlib.crc32(data) != checksum:
                    break
                self.entries |= dict.fromkeys(rows, Entry(end + len(line), size, reason, detail, host))
                end += len(line) + size
        return end

    def add(self, rows: Sequence[int], data: bytes, reason: str, detail: str, host: str) -> None:
        """Append the outcome of the rows that share one url, in one write."""
        header = [list(rows), len(data), zlib.crc32(data), reason, detail, host]
        line = json.dumps(header, separators=(",", ":")).encode() + b"\n"
        with naming_a_full_disk(self.path):
            _write_all(self._file.fileno(), line + data)
        entry = Entry(self._end + len(line), len(data), reason, detail, host)
        self.entries |= dict.fromkeys(rows, entry)
        self._end += len(line) + len(data)

    def read(self, row: int) -> bytes:
        """The image of a row."""
        entry = self.entries[row]
        return os.pread(self._file.fileno(), entry.size, entry.offset)

    def close(self) -> None:
        self._file.close()

    def delete(self) -> None:
        """The part is a whole tar now."""
        self.close()
        self.path.unlink()


def _parse(line: bytes) -> list | None:
    if not line.endswith(b"\n"):
        return None
    try:
        header = json.loads(line)
    except ValueError:
        return None
    return header if isinstance(header, list) and len(header) == 6 else None


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def write_tar(path: Path, records: Iterable[Record]) -> int:
    """One shard of any name, whole or absent, same bytes each time; none without a record. Returns the count."""
    count = 0
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        with tar_writer(file) as tar:
            for record in records:
                count += 1
                write_sample(tar, record)
        file.flush()
        os.fsync(file.fileno())
    if not count:
        path.unlink()
    return count


def read_images(tar: Path) -> dict[str, bytes]:
    """Key to image of a shard that was written before."""
    index = ShardIndex.open(tar, "")
    images = ((sample.key, index.read(i, SUFFIXES)) for i, sample in enumerate(index.samples))
    return {key: next(iter(members.values())) for key, members in images}
