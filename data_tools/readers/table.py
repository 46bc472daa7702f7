"""CSV and TSV lists with a header: Wukong `url,caption`, open_clip `filepath<TAB>title`, `file_name,text` and kin.

One broken quote loses one row: a quoted field may span 64 lines, then its first line is reported and reading goes on
with the next. https://wukong-dataset.github.io
"""

import csv
import itertools
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from data_tools.readers.base import Item, Line, Meter, Part, ReaderOptions, decode_text, iter_lines
from data_tools.readers.columns import RowReader, has_known_columns
from data_tools.records import Problem, encode_key, problem

MAX_LINES = 64  # of one quoted field
IMPLIED = ["url", "caption"]
Row = tuple[int, list[str] | Problem]


def read(part: Part, options: ReaderOptions, meter: Meter) -> Iterator[Item]:
    """One item a row after the header; a file whose first row is `url,caption` values has no header and needs none."""
    for path in part.files:
        yield from _read_file(path, part.root, options, meter)


def _read_file(path: Path, root: Path, options: ReaderOptions, meter: Meter) -> Iterator[Item]:
    delimiter = find_delimiter(path, options)
    rows = iter_rows(path, delimiter, options, meter)
    first = next(rows, None)
    if first is None:
        return
    names = header(first[1])
    if isinstance(names, Problem):
        yield problem(f"{path.name}:{first[0]}", "", "unreadable_file", names.detail)
        return
    if names is IMPLIED:
        rows = itertools.chain([first], rows)
    reader = RowReader(names, root, "wukong" if names[0] == "url" else "csv", options)
    stem = encode_key(path.stem)
    for number, row in rows:
        where = f"{path.name}:{number}"
        if isinstance(row, Problem):
            yield row
        elif len(row) != len(names):
            yield problem(where, "", "bad_column_count", f"{len(row)} columns instead of {len(names)}")
        else:
            yield reader.record(dict(zip(names, row, strict=True)), where, f"{stem}-{number:09d}")


def header(row: list[str] | Problem) -> list[str] | Problem:
    """The column names: those of the first row, IMPLIED where it holds `url,caption` values, or why there are none."""
    if isinstance(row, Problem):
        return row
    names = [name.strip() for name in row]
    if len(row) == 2 and row[0].startswith(("http://", "https://")):
        return IMPLIED
    if has_known_columns(names) and len(set(names)) == len(names):
        return names
    found = ", ".join(names)[:200]
    return problem("", "", "unknown_header", f"the first line is {found!r}")


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
    while line := waiting.popleft() if waiting else next(lines, None):
        taken = [line]
        fields = _parse(taken, delimiter, path, options)
        while fields is None and len(taken) < MAX_LINES:
            following = waiting.popleft() if waiting else next(lines, None)
            if following is None:
                break
            taken.append(following)
            fields = _parse(taken, delimiter, path, options)
        if (fields is None or isinstance(fields, Problem)) and len(taken) > 1:  # give the lines after it back
            waiting.extendleft(reversed(taken[1:]))
        if fields is None:
            fields = problem(f"{path.name}:{line.number}", "", "bad_csv", "a quote is never closed")
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
    if '"' not in text and "\r" not in text:
        return text.split(delimiter)
    try:
        rows = list(csv.reader(text.splitlines(keepends=True), delimiter=delimiter, strict=True))
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            return None
        reason = "row_too_large" if "limit" in str(error) else "bad_csv"
        return problem(where, "", reason, str(error))
    return rows[0] if len(rows) == 1 else problem(where, "", "bad_csv", f"{len(rows)} rows in one line")
