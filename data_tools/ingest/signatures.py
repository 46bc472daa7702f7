"""The signatures of all images of a source, computed in processes, kept in a file so that a killed run goes on."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.console.progress import progress
from data_tools.images.decode import BadImage, ImageLimits, decode, image_size
from data_tools.images.phash import image_signature
from data_tools.ingest.records import Problem, Record, problem
from data_tools.parallel import Workers, batch_size, ordered_map
from data_tools.readers.base import Meter
from data_tools.readers.detect import Source

SIGNATURE = np.dtype(
    [
        ("row", "<u8"),  # number of the row in the source, from 1, problems of the reader counted
        ("part", "u1"),  # which split of the source
        ("sound", "u1"),  # 0: the image cannot be decoded, and the rest is nothing
        ("pixels", "<u4"),
        ("phash", "<u8"),
        ("colours", "u1", 48),
        ("digest", "V16"),  # of the file's bytes
    ]
)


@dataclass(frozen=True)
class Sign:
    """Records to their signatures without row and part, as bytes; picklable."""

    limits: ImageLimits

    def __call__(self, records: Sequence[Record]) -> list[bytes]:
        return [self.one(record) for record in records]

    def one(self, record: Record) -> bytes:
        found = np.zeros((), SIGNATURE)
        if not isinstance(self.check(record), Problem):
            image = decode(record.image, self.limits, near=128)
            signature = image_signature(image)
            found["sound"], found["phash"] = 1, signature.phash
            found["pixels"] = _pixels(record.image)
            found["colours"] = np.frombuffer(signature.colours, np.uint8)
            found["digest"] = np.void(hashlib.blake2b(record.image, digest_size=16).digest())
        return found.tobytes()

    def check(self, record: Record) -> Record | Problem:
        """The record, or why its image has no signature."""
        if not record.image:
            return problem(record.where, record.key, "no_image")
        try:
            decode(record.image, self.limits, near=128)
        except BadImage as error:
            return problem(record.where, record.key, error.reason, error.what)
        return record


def _pixels(data: bytes) -> int:
    width, height = image_size(data)
    return width * height


def _crashed(record: Record) -> bytes:
    return np.zeros((), SIGNATURE).tobytes()


def sign_source(
    source: Source, path: Path, limits: ImageLimits, workers: Workers
) -> tuple[np.ndarray, list[str]]:
    """Signatures (N,) of dtype SIGNATURE and keys of every record, in order.

    `path` keeps what an interrupted run has done.
    """
    size = SIGNATURE.itemsize
    done = path.stat().st_size // size if path.is_file() else 0
    meter, keys = Meter(total=source.num_bytes), []
    with path.open("ab") as file, progress(unit="B", unit_scale=True, desc="hashing") as bar:
        file.truncate(done * size)
        for positions, results in ordered_map(
            Sign(limits), _batches(source, meter, done, keys, batch_size(workers)), workers, _crashed
        ):
            block = np.frombuffer(b"".join(results), SIGNATURE).copy()
            block["row"], block["part"] = positions[:, 0], positions[:, 1]
            file.write(block.tobytes())
            bar.total = meter.total
            bar.update(meter.done - bar.n)
    return np.fromfile(path, SIGNATURE), keys


def _batches(
    source: Source, meter: Meter, skip: int, keys: list[str], size: int
) -> Iterator[tuple[np.ndarray, list[Record]]]:
    """(row and part of each record (n, 2), records) by `size`, without the first `skip` records; `keys` gets all
    of them."""
    row, positions, records = 0, [], []
    for number, part in enumerate(part for part in source.parts if part.has_images):
        for item in source.read(part, meter):
            row += 1
            if isinstance(item, Problem):
                continue
            keys.append(item.key)
            if skip:
                skip -= 1
                continue
            positions.append((row, number))
            records.append(item)
            if len(records) == size:
                yield np.array(positions, np.uint64), records
                positions, records = [], []
    if records:
        yield np.array(positions, np.uint64), records
