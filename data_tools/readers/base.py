"""What every reader shares: its options, the parts of a source, lines with numbers, base64, one way to a Record."""

import binascii
import codecs
import hashlib
import json
import os
import stat
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from data_tools.images.decode import sniff
from data_tools.ingest.file_kinds import UTF16, what_is
from data_tools.ingest.records import Problem, Record, encodable, encode_key, one_line, problem
from data_tools.readers.inventory import Inventory

Item = Record | Problem
FormatName = Literal[
    "auto",
    "ecommerce_t2i",
    "easynlp",
    "chinese_clip",
    "csv",
    "jsonl",
    "parquet",
    "folder",
    "line_drawing",
    "webdataset",
]


@dataclass(frozen=True)
class ReaderOptions:
    """How a source is read; the defaults suit every published layout."""

    format: FormatName = "auto"
    """Format of the source; auto recognises it by names and first bytes."""
    split: str = ""
    """Read this split alone (train, val, test ...); empty reads all."""
    encoding: str = "utf-8"
    """Of text files: utf-8 (a byte order mark is fine), gb18030, big5 ..."""
    captions: Literal["required", "optional"] = "required"
    """optional keeps images without text, which is enough to train an image tokenizer."""
    image_root: Path | None = None
    """Folder that the paths in a list are relative to; default: the folder of the list."""
    key_column: str = ""
    """Column or field with the id; empty tries the known names, then makes one."""
    caption_column: str = ""
    """Column or field with the caption; empty tries the known names."""
    image_column: str = ""
    """Column or field with the image, its path or its url; empty tries the known names."""
    max_row_bytes: int = 96 * 2**20
    """Longest line of a text file, in bytes; longer ones are dropped unread."""
    max_image_bytes: int = 64 * 2**20
    """Largest encoded image, in bytes."""

    def __post_init__(self):
        try:
            codecs.lookup(self.encoding)
            plain = "a\t,\n".encode(self.encoding)
        except LookupError as error:
            raise ValueError(f"encoding {self.encoding!r} is not known: try utf-8 or gb18030") from error
        if plain != b"a\t,\n":
            raise ValueError(
                f"encoding {self.encoding!r} has no plain line breaks: convert it with iconv -t utf-8"
            )
        if min(self.max_row_bytes, self.max_image_bytes) < 1:
            raise ValueError("max_row_bytes and max_image_bytes must be at least 1")


@dataclass
class Meter:
    """How far a reader is, in the unit of `total` (bytes, or files of a folder); `total` 0 is unknown."""

    total: int = 0
    done: int = 0
    used: set[int] = field(default_factory=set)
    """`hash64` of the files that were read for a row; the other files of a folder are reported as left out."""

    def use(self, path: Path) -> None:
        """A row has read `path`, or said why not."""
        self.used.add(hash_path(path))


def hash_path(path: Path) -> int:
    """64 bits of the name of a file from the root on."""
    return hash64(os.path.normpath(path.absolute()))


@dataclass(frozen=True)
class Part:
    """The files of one split of a source."""

    split: str
    files: tuple[Path, ...]
    """Files with images or rows, in reading order; the folder itself for folders of images."""
    texts: Path | None = None
    """The captions, where they are in a file of their own."""
    root: Path = Path()
    """What relative paths start from, unless `image_root` is set."""
    inventory: Inventory | None = field(default=None, compare=False, repr=False)
    """The files below a folder of images."""
    fetch: Callable[[Sequence[Path]], Iterator[Path]] | None = field(default=None, compare=False, repr=False)
    """Of shards elsewhere: brings each file, which is here until the next is asked for."""

    @property
    def has_images(self) -> bool:
        """False for the texts of a test split that come without images."""
        return bool(self.files)


Reader = Callable[[Part, ReaderOptions, Meter], Iterator[Item]]


class Line(NamedTuple):
    """A line of a text file without its line break; `data` is None where it was longer than allowed."""

    number: int
    offset: int
    data: bytes | None


def iter_lines(path: Path, max_bytes: int, meter: Meter | None = None) -> Iterator[Line]:
    """Lines of a file of any size, holding one at a time. Blank lines are skipped, a UTF-8 byte order mark too."""
    with path.open("rb", buffering=1 << 20) as file:
        offset = len(codecs.BOM_UTF8) if file.peek(3)[:3] == codecs.BOM_UTF8 else 0
        file.seek(offset)
        number = 0
        while data := file.readline(max_bytes + 1):
            number += 1
            size, too_long = len(data), False
            while len(data) > max_bytes and not data.endswith(b"\n"):
                too_long = True
                data = file.readline(max_bytes + 1)
                size += len(data)
            if meter:
                meter.done += size
            data = data.removesuffix(b"\n").removesuffix(b"\r")
            if too_long or data:
                yield Line(number, offset, None if too_long else data)
            offset += size


def decode_text(data: bytes, encoding: str, where: str, key: str = "") -> str | Problem:
    """The text, or why it is none: wrong encoding, or NUL bytes as UTF-16 has them."""
    if data.startswith(UTF16):
        return problem(where, key, "bad_encoding", what_is(data))
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        return problem(
            where, key, "bad_encoding", f"byte {error.start} is {data[error.start : error.start + 4]!r}"
        )
    if "\0" in text:
        return problem(where, key, "bad_encoding", "NUL bytes, as in UTF-16 or in binary files")
    return text


def parse_json_line(line: Line, where: str, options: ReaderOptions) -> dict[str, Any] | Problem:
    """The JSON object of a line, or why there is none."""
    if line.data is None:
        return problem(where, "", "row_too_large")
    text = decode_text(line.data, options.encoding, where)
    if isinstance(text, Problem):
        return text
    try:
        row = json.loads(text)
    except (
        json.JSONDecodeError,
        RecursionError,
        ValueError,
    ) as error:  # ValueError: a number of 5,000 digits
        return problem(where, "", "bad_json", f"{type(error).__name__}: {str(error)[:120]}")
    return (
        row if isinstance(row, dict) else problem(where, "", "bad_json", f"it holds a {type(row).__name__}")
    )


WHITE_SPACE = b" \t\r\n\v\f"
_URL_SAFE = bytes.maketrans(b"-_", b"+/")


def decode_base64(data: bytes) -> bytes:
    """Both alphabets, padding optional, a `data:image/...;base64,` prefix and line breaks (MIME) allowed.

    Raises ValueError for the rest.

    Python's `b64decode` skips foreign characters and so returns garbage for url-safe input: this one is strict.
    """
    data = data.translate(None, WHITE_SPACE).strip(b"\"'")
    if data[:5].lower() == b"data:":
        data = data.partition(b",")[2]
    data = data.rstrip(b"=").translate(_URL_SAFE)
    try:
        return binascii.a2b_base64(data + b"=" * (-len(data) % 4), strict_mode=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from error


def make_record(
    identifier: Any,
    image: bytes,
    captions: Iterable[str],
    meta: dict[str, Any],
    where: str,
    options: ReaderOptions,
    extra: dict[str, bytes] | None = None,
) -> Item:
    """The one way to a Record: id to key, captions on one line, suffix by content; a Problem where that fails."""
    identifier = str(identifier).strip()
    if not identifier:
        return problem(where, "", "missing_id")
    try:
        key = encode_key(identifier)
    except ValueError:
        return problem(where, "", "bad_key", f"id {identifier[:40]!r}")
    lines = tuple(dict.fromkeys(filter(None, map(one_line, captions))))
    if not lines and options.captions == "required":
        return problem(where, key, "no_caption")
    if any("\0" in line or not _is_unicode(line) for line in lines):
        return problem(where, key, "bad_encoding", "the caption holds NUL or half characters")
    if len(image) > options.max_image_bytes:
        return problem(where, key, "image_too_large", f"{len(image)} bytes")
    suffix = sniff(image)
    if image and not suffix:
        return problem(where, key, "not_an_image", what_is(image[:512]))
    if key != identifier:
        meta = {**meta, "id": encodable(identifier)}
    return Record(key, image, suffix, lines, meta, where, extra or {})


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_image_file(path: Path, where: str, key: str, max_bytes: int) -> bytes | Problem:
    """The bytes of a plain file within the size limit: never a pipe or a device, which could block for ever."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return problem(where, key, "unsafe_name", f"{path} is no plain file")
        if status.st_size > max_bytes:
            return problem(where, key, "image_too_large", f"{path} has {status.st_size} bytes")
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL inside the name
        reason = "unreadable_file" if isinstance(error, PermissionError) else "missing_file"
        return problem(where, key, reason, f"{str(path)[:200]!r}")
    return data or problem(where, key, "empty_image", f"{path} has 0 bytes")


def inside(root: Path, name: str) -> Path | None:
    """`root/name` if it stays inside `root` by its name (links are the user's own), else None."""
    full = os.path.normpath(root.absolute() / name)
    base = os.path.normpath(root.absolute())
    return Path(full) if full.startswith(base.rstrip(os.sep) + os.sep) else None


def hash64(text: str) -> int:
    """64 bits of BLAKE2b, never 0."""
    return (
        int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
        or 1
    )


class KeyTable:
    """Which keys were seen, and in which row first: 18 to 36 bytes a key, where a dict of strings takes 200.

    Open addressing over 64-bit hashes; the chance that two of a million keys agree is 3e-8.
    """

    def __init__(self) -> None:
        self._slots, self._rows, self._count = array("Q", [0]) * 1024, array("I", [0]) * 1024, 0

    def first_row(self, key: str, row: int) -> int:
        """The row in which `key` was met first, or 0 if it is new; then `row` (from 1) is remembered."""
        value = hash64(key)
        slot = self._find(value)
        if self._slots[slot]:
            return self._rows[slot]
        self._slots[slot], self._rows[slot] = value, min(row, 2**32 - 1)
        self._count += 1
        if 3 * self._count > 2 * len(self._slots):
            self._grow()
        return 0

    def _find(self, value: int) -> int:
        slots, mask = self._slots, len(self._slots) - 1
        slot = value & mask
        while slots[slot] and slots[slot] != value:
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        slots, rows = self._slots, self._rows
        self._slots, self._rows = array("Q", [0]) * (2 * len(slots)), array("I", [0]) * (2 * len(slots))
        for value, row in zip(slots, rows, strict=True):
            if value:
                slot = self._find(value)
                self._slots[slot], self._rows[slot] = value, row


def drop_duplicates(items: Iterable[Item]) -> Iterator[Item]:
    """Turn records whose key came before into problems that name the earlier row."""
    table = KeyTable()
    for row, item in enumerate(items, 1):
        first = table.first_row(item.key, _line(item.where, row)) if isinstance(item, Record) else 0
        yield problem(item.where, item.key, "duplicate_key", f"same id as row {first}") if first else item


def _line(where: str, row: int) -> int:
    number = where.rpartition(":")[2]
    return (
        int(number)
        if number.isdecimal() and number.isascii() and 0 < len(number) < 19 and int(number)
        else row
    )
