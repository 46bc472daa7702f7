"""CSV and TSV lists with a header: Wukong `url,caption`, open_clip `filepath<TAB>title`, `file_name,text` and kin.

Rows are RFC 4180: a quoted field may hold separators, line breaks and doubled quotes, and be as long as
`max_row_bytes`. Where a quote is never closed its first line is reported and reading goes on with the next one, so one
broken quote loses one row. https://wukong-dataset.github.io
"""

import itertools
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data_tools.images.decode import SUFFIXES
from data_tools.ingest.records import Problem, encode_key, problem
from data_tools.readers.base import Item, Line, Meter, Part, ReaderOptions, decode_text, iter_lines
from data_tools.readers.column_names import has_known_columns
from data_tools.readers.columns import RowReader

MAX_LINES = 10_000  # of one quoted field that hold a separator, as wrapped base64 does not
URL_CAPTION, PATH_CAPTION = ["url", "caption"], ["file_name", "caption"]  # of lists without a header
Row = tuple[int, list[str] | Problem]


def read(part: Part, options: ReaderOptions, meter: Meter) -> Iterator[Item]:
    """One item a row after the header; a file whose first row is an url or an image and a caption needs no header."""
    for path in part.files:
        yield from _read_file(path, part.root, options, meter)


def _read_file(path: Path, root: Path, options: ReaderOptions, meter: Meter) -> Iterator[Item]:
    delimiter = find_delimiter(path, options)
    rows = iter_rows(path, delimiter, options, meter)
    first = next(rows, None)
    if first is None:
        return
    names = header(first[1], options)
    if isinstance(names, Problem):
        yield replace(names, where=f"{path.name}:{first[0]}")
        return
    if names is URL_CAPTION or names is PATH_CAPTION:
        rows = itertools.chain([first], rows)
    reader = RowReader(names, root, "wukong" if names[0] == "url" else "csv", options, meter)
    stem = encode_key(path.stem)
    for number, row in rows:
        where = f"{path.name}:{number}"
        if isinstance(row, Problem):
            yield row
        elif len(row) != len(names):
            yield problem(where, "", "bad_column_count", f"{len(row)} columns instead of {len(names)}")
        else:
            yield reader.record(dict(zip(names, row, strict=True)), where, f"{stem}-{number:09d}")


def header(row: list[str] | Problem, options: ReaderOptions) -> list[str] | Problem:
    """The column names: those of the first row, implied ones where it holds values, or why there are none."""
    if isinstance(row, Problem):
        return row
    names = [name.strip() or f"column {number}" for number, name in enumerate(row, 1)]
    if len(row) == 2 and row[0].startswith(("http://", "https://")):
        return URL_CAPTION
    if len(row) == 2 and os.path.splitext(names[0])[1][1:].lower() in SUFFIXES:
        return PATH_CAPTION
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        return problem("", "", "unknown_header", f"two columns are named {twice[0]!r}")
    if has_known_columns(names, options.image_column):
        return names
    return problem("", "", "unknown_header", f"the first line is {', '.join(names)[:200]!r}")


def find_delimiter(path: Path, options: ReaderOptions) -> str:
    """The one of tab, comma, semicolon that the first line holds most of; comma if none."""
    line = next(iter_lines(path, options.max_row_bytes), None)
    head = (line.data or b"") if line else b""
    counts = {delimiter: head.count(delimiter.encode()) for delimiter in ("\t", ",", ";")}
    best = max(counts, key=lambda d: counts[d])
    return best if counts[best] else ","


def iter_rows(path: Path, delimiter: str, options: ReaderOptions, meter: Meter) -> Iterator[Row]:
    """(line number, fields) or (line number, problem) of each row."""
    lines = iter_lines(path, options.max_row_bytes, meter)
    waiting: deque[Line] = deque()

    def following() -> Line | None:
        return waiting.popleft() if waiting else next(lines, None)

    while line := following():
        taken = [line]
        fields = _parse(taken, delimiter, path, options)
        separators, size = 0, len(line.data or b"")
        while fields is None and separators < MAX_LINES and size <= options.max_row_bytes:
            if (more := following()) is None:
                break
            taken.append(more)
            separators += delimiter.encode() in (more.data or b"")
            size += len(more.data or b"")
            if more.data is None or b'"' in more.data:  # nothing else closes the field
                fields = _parse(taken, delimiter, path, options)
        if (fields is None or isinstance(fields, Problem)) and len(taken) > 1:  # give the lines after it back
            waiting.extendleft(reversed(taken[1:]))
        if fields is None:
            reason = "row_too_large" if size > options.max_row_bytes else "bad_csv"
            fields = problem(f"{path.name}:{line.number}", "", reason, "a quote is never closed")
        yield line.number, fields


def _parse(
    taken: list[Line], delimiter: str, path: Path, options: ReaderOptions
) -> list[str] | Problem | None:
    """Fields, a problem, or None while a quoted field is still open."""
    where = f"{path.name}:{taken[0].number}"
    if any(line.data is None for line in taken):
        return problem(where, "", "row_too_large")
    text = decode_text(b"\n".join(line.data for line in taken), options.encoding, where)
    if isinstance(text, Problem):
        return text
    if '"' not in text:
        return text.split(delimiter)
    try:
        return split_row(text, delimiter)
    except ValueError as error:
        return problem(where, "", "bad_csv", str(error))


def split_row(text: str, delimiter: str) -> list[str] | None:
    """The fields of a row, None where its last quote is still open. Python's `csv` limits a field to 131,072 letters.

    Raises ValueError where something other than a separator follows a closing quote.
    """
    fields, offset = [], 0
    while True:
        if text[offset : offset + 1] != '"':
            end = text.find(delimiter, offset)
            if end < 0:
                return [*fields, text[offset:]]
            fields.append(text[offset:end])
            offset = end + 1
            continue
        quoted = _quoted(text, offset + 1)
        if quoted is None:
            return None
        field, offset = quoted
        fields.append(field)
        if offset == len(text):
            return fields
        if text[offset] != delimiter:
            raise ValueError(f"{text[offset : offset + 10]!r} follows a closing quote")
        offset += 1


def _quoted(text: str, start: int) -> tuple[str, int] | None:
    """The field from behind its opening quote on, and the offset behind its closing one."""
    parts = []
    while (end := text.find('"', start)) >= 0:
        if text[end + 1 : end + 2] != '"':
            return "".join([*parts, text[start:end]]), end + 1
        parts.append(text[start : end + 1])
        start = end + 2
    return None
