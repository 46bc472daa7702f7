"""Chinese-CLIP: `{split}_imgs.tsv` (`image_id<TAB>base64`) and `{split}_texts.jsonl`.

A line of texts is `{"text_id": 8428, "text": "...", "image_ids": [1076345]}`: a text may belong to several images
and an image to several texts. https://github.com/OFA-Sys/Chinese-CLIP, section "data preparation".
"""

from collections.abc import Iterator
from typing import Any

from data_tools.ingest.records import Problem, problem
from data_tools.readers.base import (
    Item,
    Line,
    Meter,
    Part,
    ReaderOptions,
    iter_lines,
    make_record,
    parse_json_line,
)
from data_tools.readers.join import TextIndex, join, read_base64_rows

META = {"source": "chinese_clip"}


def read(part: Part, options: ReaderOptions, meter: Meter) -> Iterator[Item]:
    """One record an image with all its texts; without a file of images, one a text with an empty `image`."""

    def parse(line: Line, where: str) -> tuple[list[str], str] | Problem:
        row = _parse_text(line, where, options)
        if isinstance(row, Problem):
            return row
        if not row["image_ids"]:
            return problem(where, str(row["text_id"]), "no_image", "image_ids is empty")
        return [str(i) for i in row["image_ids"]], row["text"]

    if not part.files:
        yield from _texts_alone(part, options, meter)
        return
    if part.texts is None:
        raise ValueError(
            f"{part.files[0]} has no texts beside it: put {part.split}_texts.jsonl into the same folder"
        )
    index = TextIndex(part.texts, parse, options)
    try:
        yield from join(index, read_base64_rows(part.files[0], options, meter, META), options, meter)
    finally:
        index.close()


def _texts_alone(part: Part, options: ReaderOptions, meter: Meter) -> Iterator[Item]:
    for line in iter_lines(part.texts, options.max_row_bytes, meter):
        where = f"{part.texts.name}:{line.number}"
        row = _parse_text(line, where, options)
        if isinstance(row, Problem):
            yield row
        else:
            yield make_record(row["text_id"], b"", (row["text"],), dict(META), where, options)


def _parse_text(line: Line, where: str, options: ReaderOptions) -> dict[str, Any] | Problem:
    row = parse_json_line(line, where, options)
    if isinstance(row, Problem):
        return row
    row = {"text_id": line.number, "image_ids": [], **row}
    key = str(row["text_id"])[:80]
    if not isinstance(row.get("text"), str) or not row["text"].strip():
        return problem(where, key, "no_caption", "no field text")
    ids = row["image_ids"]
    if not isinstance(ids, list) or any(isinstance(i, bool) or not isinstance(i, (int, str)) for i in ids):
        return problem(where, key, "bad_value", "image_ids must be a list of numbers or strings")
    return row
