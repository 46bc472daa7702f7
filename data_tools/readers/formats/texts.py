"""Files of texts alone (prompts, ids of a contest), read as lists of images are: same columns, same lines, same quotes.

    .txt              a text a line; with a header of known columns, a table
    .tsv              id<TAB>text, as contests hand out their texts; or a table with a header
    .csv              a table with a header, else `text` or `id,text`
    .jsonl, .ndjson   objects with a text and perhaps an id, named as in `column_names.py`

Empty lines are left out, a header line is no text. Ids are names: they are kept as they stand.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.ingest.file_kinds import what_is
from data_tools.ingest.records import Problem
from data_tools.readers.base import Line, Meter, ReaderOptions, decode_text, iter_lines
from data_tools.readers.column_names import CAPTIONS, KEYS, find_column, normal
from data_tools.readers.formats.table import find_delimiter, iter_rows
from data_tools.readers.inventory import read_head

OPTIONS = ReaderOptions()
_KNOWN = {normal(name) for name in (*KEYS, *CAPTIONS)}


class Text(NamedTuple):
    """A text, its name if it has one, and `file:line`."""

    text: str
    key: str | None
    where: str


def read_texts(path: Path, ids_alone: bool = False) -> Iterator[Text]:
    """The rows of a UTF-8 file. `ids_alone`: a line without separator is an id, not a text.

    Raises FileNotFoundError, or ValueError naming the line and what is wrong with it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    head = read_head(path)
    what = what_is(head) if isinstance(head, bytes) and head else ""
    if what and not what.startswith("the first bytes"):
        raise ValueError(f"{path} holds no texts: {what}")
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson", ".json"):
        yield from _from_json(path)
    elif suffix in (".csv", ".tsv") or _is_table(path) or (ids_alone and b"\t" in _first(path)):
        yield from _from_table(path, ids_alone)
    else:
        yield from _plain(path, ids_alone)


def _first(path: Path) -> bytes:
    line = next(iter_lines(path, 1 << 20), None)
    return (line.data or b"") if line else b""


def _is_table(path: Path) -> bool:
    """Whether every field of the first line of a text file is the name of a known column, and there are several."""
    names = _first(path).decode("utf-8", errors="replace").split(find_delimiter(path, OPTIONS))
    return len(names) > 1 and {normal(name) for name in names} <= _KNOWN


def _decoded(line: Line, path: Path) -> str:
    where = f"{path}:{line.number}"
    if line.data is None:
        raise ValueError(f"{where} is longer than {OPTIONS.max_row_bytes} bytes")
    text = decode_text(line.data, "utf-8", where)
    if isinstance(text, Problem):
        no_text = "\0" in line.data.decode("latin-1")
        what = "is no text" if no_text else "is not valid UTF-8: convert it with iconv -f gb18030 -t utf-8"
        raise ValueError(f"{where} {what}")
    return text


def _plain(path: Path, ids_alone: bool) -> Iterator[Text]:
    for number, line in enumerate(iter_lines(path, OPTIONS.max_row_bytes)):
        text = _decoded(line, path).strip()
        if text and not (number == 0 and normal(text) in _KNOWN):
            where = f"{path}:{line.number}"
            yield Text("", text, where) if ids_alone else Text(text, None, where)


def _from_table(path: Path, ids_alone: bool) -> Iterator[Text]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else find_delimiter(path, OPTIONS)
    quotes = path.suffix.lower() != ".tsv"  # titles of contests hold single quotes that mean inches
    rows = iter_rows(path, delimiter, OPTIONS, Meter()) if quotes else _tabs(path)
    columns: tuple[int | None, int | None] | None = None
    for number, row in rows:
        where = f"{path}:{number}"
        if isinstance(row, Problem):
            raise ValueError(f"{where}: {row.detail}")
        if not any(field.strip() for field in row):
            continue
        if columns is None:
            columns = _columns_of(row)
            if columns:
                continue
            columns = _implied(row, where, path, ids_alone)
        yield _row([*row, ""] if ids_alone else row, columns, where)


def _tabs(path: Path) -> Iterator[tuple[int, list[str]]]:
    for line in iter_lines(path, OPTIONS.max_row_bytes):
        yield line.number, _decoded(line, path).split("\t")


def _columns_of(row: list[str]) -> tuple[int | None, int | None] | None:
    """(of the id, of the text) where the row is a header, else None."""
    text, key = find_column(row, CAPTIONS), find_column(row, KEYS)
    alone = len(row) == 1 and normal(row[0]) in _KNOWN
    if not (text and key) and not alone and not (text and len(row) > 1):
        return None
    return (row.index(key) if key else None), (row.index(text) if text else None)


def _implied(row: list[str], where: str, path: Path, ids_alone: bool) -> tuple[int | None, int | None]:
    """Without a header: id and text, or one column."""
    tabs = path.suffix.lower() == ".tsv"
    if len(row) == 1:
        if tabs and not ids_alone:
            raise ValueError(f"{where} is not id<TAB>text")
        return (0, 1) if ids_alone else (None, 0)
    if len(row) > 2 and not tabs:
        names = ", ".join(row[:10])
        raise ValueError(f"{where}: no column is a text among {names:.200}: name one text, caption or title")
    return 0, 1


def _row(row: list[str], columns: tuple[int | None, int | None], where: str) -> Text:
    key_at, text_at = columns
    last = max(column for column in columns if column is not None)
    if len(row) <= last:
        raise ValueError(f"{where} is not id<TAB>text: it has {len(row)} columns")
    key = row[key_at].strip() if key_at is not None else None
    if key == "":
        raise ValueError(f"{where}: the id is empty, so it is not id<TAB>text")
    return Text(row[text_at].strip() if text_at is not None else "", key, where)


def _from_json(path: Path) -> Iterator[Text]:
    for line in iter_lines(path, OPTIONS.max_row_bytes):
        where = f"{path}:{line.number}"
        try:
            row: Any = json.loads(_decoded(line, path))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where} is not valid JSON") from error
        row = row if isinstance(row, dict) else {}
        text = row.get(find_column(list(row), CAPTIONS))
        key = row.get(find_column(list(row), KEYS))
        if not isinstance(text, str) or not isinstance(key, str | int | None) or isinstance(key, bool):
            raise ValueError(f'{where} needs "text", a string, and may have "key" or "id", a name')
        yield Text(text.strip(), None if key is None else str(key), where)
