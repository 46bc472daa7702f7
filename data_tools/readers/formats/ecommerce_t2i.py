"""Tianchi ECommerce-T2I (MUGE): `T2I_{train,val,test}.text.tsv` or `.txt.tsv` and `.img.tsv`, without headers.

Texts are `img_id<TAB>description`, images `img_id<TAB>base64` in the url-safe or the standard alphabet. The two are
joined by id, a 32-digit hex string in the published files and any text here, in any order.
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
from data_tools.readers.join import TextIndex, join, read_base64_rows

META = {"source": "ecommerce_t2i"}


def read(part: Part, options: ReaderOptions, meter: Meter) -> Iterator[Item]:
    """Records of the joined files; of a test split, which has no images, records with an empty `image`."""

    def parse(line: Line, where: str) -> tuple[list[str], str] | Problem:
        parsed = _parse_text(line, where, options)
        return parsed if isinstance(parsed, Problem) else ([parsed[0]], parsed[1])

    if not part.files:
        yield from _texts_alone(part, options, meter)
        return
    if part.texts is None:
        for image in read_base64_rows(part.files[0], options, meter, META):
            if isinstance(image.image, Problem):
                yield image.image
            else:
                yield make_record(image.identifier, image.image, (), image.meta, image.where, options)
        return
    index = TextIndex(part.texts, parse, options)
    try:
        yield from join(index, read_base64_rows(part.files[0], options, meter, META), options, meter)
    finally:
        index.close()


def _texts_alone(part: Part, options: ReaderOptions, meter: Meter) -> Iterator[Item]:
    for line in iter_lines(part.texts, options.max_row_bytes, meter):
        where = f"{part.texts.name}:{line.number}"
        parsed = _parse_text(line, where, options)
        if isinstance(parsed, Problem):
            yield parsed
        else:
            yield make_record(parsed[0], b"", (parsed[1],), dict(META), where, options)


def _parse_text(line: Line, where: str, options: ReaderOptions) -> tuple[str, str] | Problem:
    if line.data is None:
        return problem(where, "", "row_too_large")
    text = decode_text(line.data, options.encoding, where)
    if isinstance(text, Problem):
        return text
    fields = text.split("\t")
    identifier = fields[0].strip()
    if len(fields) != 2:
        return problem(where, identifier, "bad_column_count", f"{len(fields)} columns instead of 2")
    if not identifier:
        return problem(where, "", "missing_id")
    if not fields[1].strip():
        return problem(where, identifier, "no_caption")
    return identifier, fields[1]
