"""JSON lines: `image_path`/`sentences` (DALL-E lists), `file_name`/`text` (imagefolder), BriVL, urls, base64.

A line is read by the names in it, so lines of one file may differ; see `columns.py` for the names.
"""

from collections.abc import Iterator

from data_tools.ingest.records import Problem, encode_key, problem
from data_tools.readers.base import Item, Meter, Part, ReaderOptions, iter_lines, parse_json_line
from data_tools.readers.column_names import has_known_columns, is_line_drawing
from data_tools.readers.columns import RowReader


def read(part: Part, options: ReaderOptions, meter: Meter) -> Iterator[Item]:
    """One item a line."""
    for path in part.files:
        readers: dict[tuple[str, ...], RowReader | None] = {}
        stem = encode_key(path.stem)
        for line in iter_lines(path, options.max_row_bytes, meter):
            where = f"{path.name}:{line.number}"
            row = parse_json_line(line, where, options)
            if isinstance(row, Problem):
                yield row
                continue
            reader = _reader(readers, list(row), part, options, meter)
            if reader is None:
                yield problem(where, "", "no_image", f"no field is an image among {', '.join(row)[:120]!r}")
            else:
                yield reader.record(row, where, f"{stem}-{line.number:09d}")


def _reader(
    readers: dict, names: list[str], part: Part, options: ReaderOptions, meter: Meter
) -> RowReader | None:
    key = tuple(names)
    if key not in readers:
        if len(readers) > 1000:  # fields that differ in every line: do not keep a reader for each
            readers.clear()
        known, drawing = has_known_columns(names, options.image_column), is_line_drawing(names)
        readers[key] = RowReader(names, part.root, "jsonl", options, meter, drawing) if known else None
    return readers[key]
