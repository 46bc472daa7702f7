"""EasyNLP text-to-image: TSV of three columns `idx<TAB>text<TAB>imgbase64`, without header.

https://github.com/alibaba/EasyNLP, examples/text2image_generation.
"""

from collections.abc import Iterator

from data_tools.ingest.records import Problem, problem
from data_tools.readers.base import (
    Item,
    Line,
    Meter,
    Part,
    ReaderOptions,
    decode_text,
    iter_lines,
    make_record,
)
from data_tools.readers.join import base64_image

META = {"source": "easynlp"}


def read(part: Part, options: ReaderOptions, meter: Meter) -> Iterator[Item]:
    """One item a line; a header line, where there is one, is skipped."""
    for path in part.files:
        for line in iter_lines(path, options.max_row_bytes, meter):
            if line.number > 1 or not _is_header(line.data):
                yield _read_line(line, f"{path.name}:{line.number}", options)


def _is_header(data: bytes | None) -> bool:
    return data is not None and data.strip().split(b"\t") in (
        [b"idx", b"text", b"imgbase64"],
        [b"id", b"text", b"img"],
    )


def _read_line(line: Line, where: str, options: ReaderOptions) -> Item:
    if line.data is None:
        return problem(where, "", "row_too_large")
    fields = line.data.split(b"\t")
    texts = [decode_text(field, options.encoding, where) for field in fields[:2]]
    for text in texts:
        if isinstance(text, Problem):
            return text
    key = texts[0].strip()
    if len(fields) != 3:
        return problem(where, key, "bad_column_count", f"{len(fields)} columns instead of 3")
    if not key:
        return problem(where, "", "missing_id")
    image = base64_image(fields[2], where, key)
    if isinstance(image, Problem):
        return image
    return make_record(key, image, (texts[1],), dict(META), where, options)
