"""What the first lines of a list say: its columns, or in one sentence why it cannot be read as one."""

import json
import os
from pathlib import Path

from data_tools.ingest.file_kinds import UTF16, what_is
from data_tools.ingest.records import Problem
from data_tools.readers.base import Line, Meter, ReaderOptions, decode_text, iter_lines
from data_tools.readers.column_names import has_known_columns
from data_tools.readers.formats import parquet
from data_tools.readers.formats.table import find_delimiter, header, iter_rows
from data_tools.readers.inventory import read_head

TEXT_LISTS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
_FIRST_BYTES = 1 << 20


def first_line(path: Path) -> Line | None:
    """The first that is not blank."""
    return next(iter_lines(path, _FIRST_BYTES), None)


def json_fields(path: Path, options: ReaderOptions) -> list[str] | None:
    """The names in the first line, None where it is no JSON object."""
    line = next(iter_lines(path, options.max_row_bytes), None)
    text = decode_text(line.data or b"", options.encoding, path.name) if line else ""
    try:
        row = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    is_list = isinstance(row, dict) and not {"images", "annotations"} <= set(row)  # COCO is one object
    return list(row) if is_list else None


def table_fields(path: Path, options: ReaderOptions) -> list[str] | Problem:
    """The columns of a CSV or TSV file, or why it has none that say where an image is."""
    row = next(iter_rows(path, find_delimiter(path, options), options, Meter()), (0, []))[1]
    return header(row, options)


def unread_reason(path: Path, options: ReaderOptions) -> str:
    """Why a file with the suffix of a list is not read as one, and what to do; "" where nothing is wrong with it."""
    head = read_head(path)
    if isinstance(head, str):
        return head
    suffix = path.suffix.lower()
    known = suffix in TEXT_LISTS and not what_is(head).startswith("the first bytes")
    if not head or head.startswith(UTF16) or known or suffix not in (*TEXT_LISTS, ".parquet"):
        return what_is(head)
    if suffix == ".parquet":
        return _parquet_unread_reason(path, options)
    if suffix in (".csv", ".tsv"):
        return _table_unread_reason(path, options)
    return _json_unread_reason(path, options)


def _parquet_unread_reason(path: Path, options: ReaderOptions) -> str:
    try:
        names = parquet.column_names(path)
    except ValueError as error:
        return str(error)
    return "" if has_known_columns(names, options.image_column) else no_image_column(names)


def no_image_column(names: list[str]) -> str:
    """One sentence with the columns that are there."""
    columns = ", ".join(names[:20])
    return f"no column is an image among {columns:.300}: name it with --image-column"


def _table_unread_reason(path: Path, options: ReaderOptions) -> str:
    line = first_line(path)
    if line is None or line.data is None:
        return "its first line is longer than a megabyte" if line else "an empty file"
    if guess := _other_encoding(line.data, options.encoding):
        return guess
    fields = table_fields(path, options)
    if not isinstance(fields, Problem):
        return ""
    if fields.reason != "unknown_header" or "two columns" in fields.detail:
        return fields.detail
    delimiter = find_delimiter(path, options)
    return no_image_column(line.data.decode(options.encoding, "replace").split(delimiter))


def _other_encoding(data: bytes, encoding: str) -> str:
    """A sentence where the bytes are not of that encoding."""
    try:
        data.decode(encoding)
        return ""
    except UnicodeDecodeError:
        pass
    try:
        return (
            f"not {encoding}, but it reads as GB18030: pass --encoding gb18030 ({data.decode('gb18030'):.60})"
        )
    except UnicodeDecodeError:
        return f"not {encoding}: name its encoding with --encoding"


def _json_unread_reason(path: Path, options: ReaderOptions) -> str:
    line = first_line(path)
    data = (line.data or b"").lstrip() if line else b""
    if guess := _other_encoding(data, options.encoding):
        return guess
    if data.startswith(b"["):
        return "a JSON array, where one object a line is read: jq -c '.[]' IN.json > OUT.jsonl"
    with path.open("rb") as file:
        start = file.read(_FIRST_BYTES)
        file.seek(max(0, os.path.getsize(path) - _FIRST_BYTES))
        both = start + file.read()
    if b'"images"' in both and b'"annotations"' in both:
        return "COCO annotations: write a JSONL of file_name and caption from images and annotations"
    names = json_fields(path, options)
    if names is None:
        return "its first line is no JSON object: JSONL holds one object a line"
    return "" if has_known_columns(names, options.image_column) else no_image_column(names)
