"""Images in one file, texts in another, joined by id in any order: the index of texts that makes it one pass.

21 bytes a text row stay in memory (hash of the id, place in the file, line, seen or not); neither the images nor
the texts do. A text is read again from its place when its image comes, so two ids of one hash cannot be confused.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_tools.ingest.records import Problem, problem
from data_tools.readers.base import (
    Item,
    Line,
    Meter,
    ReaderOptions,
    decode_base64,
    decode_text,
    hash64,
    iter_lines,
    make_record,
)

# Parses one line of the texts to (ids of its images, caption), or says why not.
TextParser = Callable[[Line, str], tuple[list[str], str] | Problem]

MAX_CAPTIONS = (
    1000  # of one image; the texts beyond are reported as left without one, so reading stays linear
)


class TextIndex:
    """Where in the file of texts the captions of an image are, and which texts no image came for."""

    def __init__(self, path: Path, parse: TextParser, options: ReaderOptions):
        self.path, self._parse, self._options = path, parse, options
        self._hashes = self._offsets = self._lines = np.zeros(0, np.uint64)
        self._seen = np.zeros(0, bool)
        self._file = path.open("rb")

    def build(self, meter: Meter) -> Iterator[Problem]:
        """Read the file once; yields the rows that are lost."""
        hashes, offsets, lines = array("Q"), array("Q"), array("I")
        for line in iter_lines(self.path, self._options.max_row_bytes, meter):
            parsed = self._parse(line, f"{self.path.name}:{line.number}")
            if isinstance(parsed, Problem):
                yield parsed
                continue
            for identifier in parsed[0]:
                hashes.append(hash64(identifier))
                offsets.append(line.offset)
                lines.append(line.number)
        order = np.argsort(_view(hashes), kind="stable").astype(np.uint32)
        self._hashes = _view(hashes)[order]
        self._offsets = _view(offsets)[order]
        self._lines = _view(lines)[order]
        self._seen = np.zeros(len(order), bool)

    def captions(self, identifier: str) -> list[str]:
        """The texts with this id, in the order of the file; they count as seen from now on."""
        value = np.uint64(hash64(identifier))
        first, last = np.searchsorted(self._hashes, value), np.searchsorted(self._hashes, value, side="right")
        found = []
        for row in range(first, min(last, first + MAX_CAPTIONS)):
            ids, caption = self._read(row)
            if identifier in ids:
                self._seen[row] = True
                found.append(caption)
        return found

    def _read(self, row: int) -> tuple[list[str], str]:
        self._file.seek(int(self._offsets[row]))
        data = self._file.readline().removesuffix(b"\n").removesuffix(b"\r")
        parsed = self._parse(Line(int(self._lines[row]), int(self._offsets[row]), data), "")
        if isinstance(parsed, Problem):
            raise ValueError(f"{self.path} changed while it was read: start again when it is complete")
        return parsed

    def without_image(self) -> Iterator[Problem]:
        """The texts no image came for, in the order of the file."""
        rows = np.flatnonzero(~self._seen)
        for row in rows[np.argsort(self._offsets[rows], kind="stable")]:
            for identifier in self._ids_of_hash(row):
                yield problem(f"{self.path.name}:{self._lines[row]}", identifier, "no_image")

    def _ids_of_hash(self, row: int) -> list[str]:
        return [i for i in self._read(row)[0] if hash64(i) == int(self._hashes[row])][:1]

    def close(self) -> None:
        """Close the file of texts."""
        self._file.close()


def _view(values: array) -> np.ndarray:
    return np.frombuffer(values, f"u{values.itemsize}") if values else np.zeros(0, f"u{values.itemsize}")


class GeneratedImage(NamedTuple):
    """A row of the file of images before its texts are known."""

    identifier: str
    where: str
    image: bytes | Problem
    meta: dict[str, Any]


def join(
    index: TextIndex, images: Iterable[GeneratedImage], options: ReaderOptions, meter: Meter
) -> Iterator[Item]:
    """Rows of the file of texts that are lost, then one item an image, then the texts left without an image."""
    yield from index.build(meter)
    for image in images:
        captions = index.captions(image.identifier) if image.identifier else []
        if isinstance(image.image, Problem):
            yield image.image
        elif not captions and options.captions == "required":
            what = f"id {image.identifier[:80]!r} is not in {index.path.name}"
            yield problem(image.where, image.identifier, "no_caption", what)
        else:
            yield make_record(image.identifier, image.image, captions, image.meta, image.where, options)
    yield from index.without_image()


def read_base64_rows(
    path: Path, options: ReaderOptions, meter: Meter, meta: dict[str, Any]
) -> Iterator[GeneratedImage]:
    """`id<TAB>base64` of each line; the meta of an image is a copy of `meta`."""
    for line in iter_lines(path, options.max_row_bytes, meter):
        where = f"{path.name}:{line.number}"
        if line.data is None:
            yield GeneratedImage("", where, problem(where, "", "row_too_large"), {})
            continue
        fields = line.data.split(b"\t")
        identifier = decode_text(fields[0].strip(), options.encoding, where)
        if isinstance(identifier, Problem):
            yield GeneratedImage("", where, identifier, {})
        else:
            yield GeneratedImage(identifier, where, _image_bytes(fields, identifier, where), dict(meta))


def _image_bytes(fields: list[bytes], identifier: str, where: str) -> bytes | Problem:
    if len(fields) != 2:
        return problem(where, identifier, "bad_column_count", f"{len(fields)} columns instead of 2")
    if not identifier:
        return problem(where, "", "missing_id")
    return base64_image(fields[1], where, identifier)


def base64_image(field: bytes, where: str, key: str) -> bytes | Problem:
    """The image in a base64 field, or why there is none."""
    if not field.strip():
        return problem(where, key, "empty_image")
    try:
        return decode_base64(field) or problem(where, key, "empty_image")
    except ValueError as error:
        return problem(where, key, "bad_base64", str(error))
