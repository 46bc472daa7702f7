"""Parquet tables: images as bytes, as Hugging Face `{"bytes", "path"}`, as paths or urls; column names as in CSV.

Read in batches of 64 rows, so memory holds some images, never the table.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.ingest.records import encode_key, problem
from data_tools.readers.base import Item, Meter, Part, ReaderOptions
from data_tools.readers.column_names import has_known_columns, is_line_drawing
from data_tools.readers.columns import RowReader

BATCH = 64  # rows


def read(part: Part, options: ReaderOptions, meter: Meter) -> Iterator[Item]:
    """One item a row; a row group that cannot be read is one problem that says how many rows are in it."""
    for path in part.files:
        done = meter.done
        yield from _read_file(path, part.root, options, meter)
        meter.done = done + path.stat().st_size


def column_names(path: Path) -> list[str]:
    """Names of the columns; raises ValueError for a file that is no parquet."""
    return list(_open(path).schema_arrow.names)


def _open(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, memory_map=False, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no readable parquet file: {str(error)[:160]}") from error


def _read_file(path: Path, root: Path, options: ReaderOptions, meter: Meter) -> Iterator[Item]:
    try:
        file = _open(path)
        names = list(file.schema_arrow.names)
    except ValueError as error:
        yield problem(path.name, "", "unreadable_file", str(error))
        return
    if not has_known_columns(names, options.image_column):
        yield problem(path.name, "", "unknown_header", f"the columns are {', '.join(names)[:160]}")
        return
    drawing = is_line_drawing(names)
    reader = RowReader(names, root, "line_drawing" if drawing else "parquet", options, meter, drawing)
    stem, start, row = encode_key(path.stem), meter.done, 0
    for group in range(file.num_row_groups):
        first = row
        size = file.metadata.row_group(group).num_rows
        for item in _read_group(file, group, reader, f"{path.name}:", first, stem):
            row += 1
            yield item
        row = first + size
        meter.done = start + (group + 1) * path.stat().st_size // file.num_row_groups
    file.close()


def _read_group(
    file: Any, group: int, reader: RowReader, where: str, first: int, stem: str
) -> Iterator[Item]:
    import pyarrow as pa

    row, rows = first, file.metadata.row_group(group).num_rows
    try:
        for batch in file.iter_batches(batch_size=BATCH, row_groups=[group], use_threads=False):
            for values in batch.to_pylist():
                row += 1
                yield reader.record(values, f"{where}{row}", f"{stem}-{row:09d}")
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        lost = f"rows {row + 1} to {first + rows}: {' '.join(str(error).split())[:120]}"
        yield problem(f"{where}{row + 1}", "", "unreadable_file", lost)
