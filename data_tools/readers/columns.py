"""A row with named columns to a Record: the names that CSV, JSONL and parquet files use for the same things.

Known forms: Wukong `url,caption`; open_clip `filepath<TAB>title`; DALL-E lists `image_path, sentences`; BriVL
`image_id` as a path, `sentences` as [kind, text] pairs; Hugging Face imagefolder `file_name, text` and images as
`{"bytes", "path"}`; line drawings `pd_line_drawing, pd_realistic_drawing, pd_title` and diffusers
`conditioning_image, image, text`; catalogues of shops in English and Chinese. Names are in `column_names.py`.
"""

import base64
import math
from pathlib import Path
from typing import Any

from data_tools.images.decode import SUFFIXES, sniff
from data_tools.ingest.records import Problem, encodable, problem
from data_tools.readers.base import (
    WHITE_SPACE,
    Item,
    Meter,
    ReaderOptions,
    decode_base64,
    hash64,
    inside,
    make_record,
    read_image_file,
)
from data_tools.readers.column_names import (
    CAPTIONS,
    DRAWINGS,
    IMAGES,
    KEYS,
    PATHS,
    PHOTOS,
    URLS,
    find_column,
    normal,
)

_SPACES = dict.fromkeys(WHITE_SPACE)


class RowReader:
    """Rows with the same columns to records.

    `root`: what paths start from; `source`: goes into the meta; `meter` is told which files were read.
    Raises ValueError for a column of the options that is not there.
    """

    def __init__(
        self,
        names: list[str],
        root: Path,
        source: str,
        options: ReaderOptions,
        meter: Meter,
        drawing: bool = False,
    ):
        for chosen in (options.key_column, options.caption_column, options.image_column):
            if chosen and not find_column(names, (), chosen):
                raise ValueError(f"there is no column {chosen!r}: the columns are {', '.join(names[:20])}")
        self.root, self.source, self.options = options.image_root or root, source, options
        self.names, self.meter = names, meter
        self.key = find_column(names, KEYS, options.key_column)
        self.caption = find_column(names, CAPTIONS, options.caption_column)
        self.drawing = ""
        known = (*PATHS, *IMAGES, *URLS)
        if drawing:
            self.drawing = find_column(names, DRAWINGS) or "source"
            known = tuple(n for n in (*PHOTOS, *PATHS, *IMAGES) if normal(n) != normal(self.drawing))
        self.image = find_column(names, known, options.image_column)
        if not self.image and normal(self.key) == "imageid":  # BriVL: the id is the path
            self.image, self.key = self.key, ""
        self.holds_urls = bool(self.image) and bool(find_column([self.image], URLS))
        self.used = {self.key, self.caption, self.image, self.drawing} - {""}

    def record(self, row: dict[str, Any], where: str, fallback_key: str) -> Item:
        """The row's record or problem; `fallback_key` names a row that has neither an id, a path nor a url."""
        for column in filter(None, (self.image, self.drawing)):  # a row that is lost has named its files too
            self._mark(row.get(column))
        captions = caption_list(row.get(self.caption)) if self.caption else ()
        if captions is None:
            return problem(where, self._key(row), "bad_value", f"{self.caption} is {row[self.caption]!r:.80}")
        if not self.caption and self.options.captions == "required":
            columns = ", ".join(self.names[:20])
            return problem(
                where, self._key(row), "no_caption", f"no column is a caption among {columns:.200}"
            )
        meta = {"source": self.source}
        meta |= plain({k: v for k, v in row.items() if k not in self.used and not isinstance(v, bytes)})
        value, key = row.get(self.image), self._key(row)
        if self.key and not key:
            return problem(where, "", "missing_id")
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, str) and self._is_url(value):
            meta["url"] = encodable(value.strip())
            key = key or f"{hash64(value.strip() + chr(10) + chr(10).join(captions)):016x}"
            return make_record(key, b"", captions, meta, where, self.options)
        image = self._bytes(value, where, key)
        if isinstance(image, Problem):
            return image
        key = key or _key_of_path(value) or fallback_key
        extra = self._drawing(row, where, key) if self.drawing else {}
        if isinstance(extra, Problem):
            return extra
        return make_record(key, image, captions, meta, where, self.options, extra)

    def _key(self, row: dict[str, Any]) -> str:
        value = row.get(self.key) if self.key else None
        return "" if value is None or isinstance(value, (dict, list, bytes)) else str(value).strip()

    def _bytes(self, value: Any, where: str, key: str) -> bytes | Problem:
        """Bytes, `{"bytes", "path"}`, base64 or a path."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")  # an empty image may still have a path
        if value is None or value == "" or value == b"":
            return problem(where, key, "empty_image" if self.image else "no_image")
        if isinstance(value, (bytes, bytearray)):
            return bytes(value)
        if not isinstance(value, str):
            return problem(where, key, "bad_value", f"{self.image} is a {type(value).__name__}")
        if "base64" in self.image.lower() or looks_like_base64(value):
            try:
                return decode_base64(value.encode())
            except ValueError as error:
                return problem(where, key, "bad_base64", str(error))
        path = self._path(value)
        if path is None:
            return problem(where, key, "path_outside_root", f"{value[:120]!r} is not under {self.root}")
        return read_image_file(path, where, key, self.options.max_image_bytes)

    def _mark(self, value: Any) -> None:
        """Tell the meter that a row names this file, if it is the name of one."""
        value = value.get("path") if isinstance(value, dict) else value
        if isinstance(value, str) and len(value) < 4096 and "\0" not in value and (path := self._path(value)):
            self.meter.use(path)

    def _path(self, value: str) -> Path | None:
        """Below the root, also where it is written as on Windows; None outside."""
        name = value.strip().removeprefix("file://")
        path = inside(self.root, name)
        if "\\" in name and not (path and path.is_file()):
            return inside(self.root, name.replace("\\", "/"))
        return path

    def _is_url(self, value: str) -> bool:
        """A column of urls may hold paths all the same."""
        if value.strip().lower().startswith(("http://", "https://", "s3://")):
            return True
        path = self._path(value) if self.holds_urls and "\0" not in value and len(value) < 4096 else None
        return self.holds_urls and not (path and path.is_file())

    def _drawing(self, row: dict[str, Any], where: str, key: str) -> dict[str, bytes] | Problem:
        drawing = self._bytes(row.get(self.drawing), where, key)
        if isinstance(drawing, Problem):
            return drawing
        suffix = sniff(drawing)
        if not suffix:
            return problem(where, key, "not_an_image", "the drawing is no image")
        return {f"drawing.{suffix}": drawing}


def caption_list(value: Any) -> tuple[str, ...] | None:
    """Captions from text, a list of texts, or BriVL's list of [kind, text]; None for any other type."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list):
        if all(isinstance(v, str) for v in value):
            return tuple(value)
        if all(isinstance(v, list) and len(v) == 2 and isinstance(v[1], str) for v in value):
            return tuple(v[1] for v in value)
    return None


def plain(value: Any, depth: int = 0) -> Any:
    """`value` as JSON can hold it: no bytes, no NaN, text that is valid Unicode, at most 32 levels."""
    if depth > 32:
        return "..."
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {encodable(str(k)): plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, depth + 1) for v in value]
    return encodable(value if isinstance(value, str) else str(value))


def looks_like_base64(value: str) -> bool:
    """True for a data URI or a long text whose first bytes decode to a known kind of image."""
    head = value[:400].translate(_SPACES)[:64]
    if head[:5].lower() == "data:":
        return True
    if len(head) < 64:
        return False
    data = head.encode(errors="replace").replace(b"-", b"+").replace(b"_", b"/")
    try:
        return bool(sniff(base64.b64decode(data, validate=True)))
    except ValueError:
        return False


def _key_of_path(value: Any) -> str:
    """The path without its image suffix, so that `a/1.jpg` and `b/1.jpg` stay apart; "" for bytes."""
    if isinstance(value, dict):
        value = None if value.get("bytes") else value.get("path")
    if not isinstance(value, str) or len(value) > 4096 or looks_like_base64(value):
        return ""
    stem, dot, suffix = value.strip().rpartition(".")
    name = stem if dot and suffix.lower() in SUFFIXES else value.strip()
    return name.removeprefix("./")
