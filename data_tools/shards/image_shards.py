"""Image shards: WebDataset tars of `{key}.{suffix}`, `{key}.txt`, `{key}.json`, whole or absent, same bytes each time.

Layout of https://github.com/webdataset/webdataset: the members of a sample share the name up to the first dot and
stand next to each other. `dataset.json` beside the tars counts the samples of each.

The package webdataset writes them. Its pipeline does not read them back: that streams, and can neither resume in
mid-epoch nor on another number of processes, so training reads through `data_tools/shards/index.py`; and it drops
what is not a plain member and reads members of any size, which `data_tools/readers/formats/webdataset.py` has to count
and to refuse.
"""

import json
import os
import tarfile
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from common.files import naming_a_full_disk, read_json, write_json
from data_tools.ingest.records import Record, validate_key

FORMAT = "image-shards/1"
DATASET_FILE = "dataset.json"


class ShardWriter:
    """Write the records of one split to `dst/{split}-%05d.tar`; use as a context manager.

    A shard appears under its name only when it is whole. `dataset.json` is written at a clean close, beside the
    entries of the other splits already there; after an exception the open shard is dropped and nothing is listed.
    """

    def __init__(
        self,
        dst: Path,
        split: str = "train",
        samples_per_shard: int = 1000,
        max_shard_bytes: int = 0,
        shards: dict[str, int] | None = None,
    ):
        """`max_shard_bytes` (0: no limit) closes a shard early; `shards` are those of an interrupted run, kept.

        Raises ValueError for a split that cannot be a file name, a size under 1, or shards of the split in `dst`.
        """
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, not {samples_per_shard}")
        self.dst, self.split = Path(dst), validate_key(split)
        self.samples_per_shard, self.max_shard_bytes = samples_per_shard, max_shard_bytes
        self.shards: dict[str, int] = dict(shards or {})
        stale = [p for p in sorted(self.dst.glob(f"{split}-*.tar")) if p.name not in self.shards]
        if stale and shards is None:
            raise ValueError(f"{stale[0]} exists already: choose an empty folder or delete the old shards")
        self.dst.mkdir(parents=True, exist_ok=True)
        self._tar: Any = None  # webdataset.TarWriter
        self._keys: set[str] = set()

    @property
    def num_samples(self) -> int:
        """Samples written, those of the open shard included."""
        return sum(self.shards.values()) + len(self._keys)

    def write(self, record: Record) -> Path | None:
        """Add a sample; returns the path of a shard that this sample completed.

        Raises ValueError for a bad key, a key twice in one shard, or an image without suffix.
        """
        key = validate_key(record.key)
        if key in self._keys:
            raise ValueError(f"key {key!r} twice in one shard ({record.where}): keys must be unique")
        tar = self._tar or self._open()
        with naming_a_full_disk(self.dst / self._name):
            write_sample(tar, record)
        self._keys.add(key)
        full = len(self._keys) >= self.samples_per_shard
        if full or (self.max_shard_bytes and tar.tarstream.offset >= self.max_shard_bytes):
            return self._finish_shard()
        return None

    def close(self) -> Path | None:
        """Finish the open shard, returned if there is one, and write `dataset.json`."""
        path = self._finish_shard() if self._tar else None
        add_to_dataset(self.dst, self.split, self.shards)
        return path

    def abort(self) -> None:
        """Drop the open shard; whole shards stay."""
        if self._tar:
            self._tar.tarstream.fileobj.closed = True  # else the stream writes its end when it is collected
            self._tar.stream.close()
            self._temporary.unlink(missing_ok=True)
            self._tar, self._keys = None, set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    @property
    def _name(self) -> str:
        return f"{self.split}-{len(self.shards):05d}.tar"

    @property
    def _temporary(
        self,
    ) -> Path:  # the same name in each run, so a killed one leaves nothing that the next does not reuse
        return self.dst / f".{self._name}.tmp"

    def _open(self) -> Any:
        self._tar = tar_writer(self._temporary.open("wb"))
        return self._tar

    def _finish_shard(self) -> Path:
        file = self._tar.stream
        path = self.dst / self._name
        with naming_a_full_disk(path):
            self._tar.close()
            file.flush()
            os.fsync(file.fileno())
            file.close()
        os.replace(self._temporary, path)
        self.shards[path.name] = len(self._keys)
        self._tar, self._keys = None, set()
        return path


def tar_writer(file: BinaryIO) -> Any:
    """A `webdataset.TarWriter` whose headers hold nothing of this machine or moment: mtime 0, uid 0, mode 644.

    It ignores its own argument `format`; in GNU's, a long or Chinese key is one more block and no table of attributes.
    """
    from webdataset.writer import TarWriter

    writer = TarWriter(
        file, user="", group="", mode=0o644, compress=False, encoder=False, keep_meta=True, mtime=0
    )
    writer.tarstream.format, writer.tarstream.encoding = tarfile.GNU_FORMAT, "utf-8"
    return writer


def write_sample(writer: Any, record: Record) -> None:
    """Image, further members, caption, meta: one at a time, since the writer would sort them, and readers know by the
    meta, which is last, that the sample of a tar which breaks off is whole."""
    for suffix, data in sample_members(record):
        writer.write({"__key__": record.key, suffix: data})
    writer.tarstream.members.clear()  # tarfile keeps every header, which nobody reads


def sample_members(record: Record) -> list[tuple[str, bytes]]:
    """Suffixes and bytes of a sample's members, in the order in which they are written."""
    if record.image and not record.suffix:
        raise ValueError(f"{record.where}: the image of {record.key!r} has no suffix")
    if "__key__" in record.extra:
        raise ValueError(f"{record.where}: no member may be called {record.key}.__key__")
    members = [(record.suffix, record.image)] if record.image else []
    members += sorted(record.extra.items())
    return [*members, ("txt", "\n".join(record.captions).encode()), ("json", meta_bytes(record.meta))]


def meta_bytes(meta: dict[str, Any]) -> bytes:
    """Sorted keys, UTF-8 unescaped; NaN is refused since JSON has none."""
    return json.dumps(meta, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


def add_to_dataset(dst: Path, split: str, shards: dict[str, int]) -> dict[str, Any]:
    """Put the shards of one split into `dst/dataset.json`, beside those of the other splits; returns its content."""
    path = dst / DATASET_FILE
    others = read_json(path)["shards"] if path.is_file() else {}
    kept = {name: count for name, count in others.items() if name.rpartition("-")[0] != split}
    dataset = describe_shards({**kept, **shards})
    write_json(path, dataset)
    return dataset


def describe_shards(shards: dict[str, int]) -> dict[str, Any]:
    """The content of `dataset.json`: format, samples a shard, a split and in all."""
    splits: dict[str, int] = {}
    for name, count in shards.items():
        split = name.rpartition("-")[0]
        splits[split] = splits.get(split, 0) + count
    return {"format": FORMAT, "num_samples": sum(shards.values()), "shards": shards, "splits": splits}
