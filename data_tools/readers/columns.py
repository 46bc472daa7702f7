"""A row with named columns to a Record: the names that CSV, JSONL and parquet files use for the same things.

Known forms: Wukong `url,caption`; open_clip `filepath<TAB>title`; DALL-E lists `image_path, sentences`; BriVL
`image_id` as a path, `sentences` as [kind, text] pairs; Hugging Face imagefolder `file_name, text` and pictures as
`{"bytes", "path"}`; line drawings `pd_line_drawing, pd_realistic_drawing, pd_title` and diffusers
`conditioning_image, image, text`.
"""

import base64
import math
from pathlib import Path
from typing import Any

from data_tools.images import SUFFIXES, sniff
from data_tools.readers.base import (
    Item,
    ReaderOptions,
    decode_base64,
    hash64,
    inside,
    make_record,
    read_image_file,
)
from data_tools.records import Problem, encodable, problem

KEYS = ("key", "__key__", "img_id", "id", "idx", "uid", "sample_id", "image_id")
CAPTIONS = ("caption", "captions", "sentences", "text", "title", "pd_title", "prompt", "txt", "description")
URLS = ("url", "URL", "image_url", "img_url", "image_link")
PATHS = ("image_path", "filepath", "file_name", "filename", "file_path", "path", "file")
PICTURES = (
    "image",
    "img",
    "imgbase64",
    "image_base64",
    "img_base64",
    "image_bytes",
    "jpg",
    "png",
    "webp",
    "photo",
)
PHOTOS = ("pd_realistic_drawing", "realistic_drawing", "photo", "target", "image", "file_name")
DRAWINGS = (
    "pd_line_drawing",
    "line_drawing",
    "drawing",
    "sketch",
    "lineart",
    "conditioning_image",
    "control_image",
)


def find_column(names: list[str], known: tuple[str, ...], chosen: str = "") -> str:
    """The column of `names` that holds a thing: the one the user chose, else the first known; "" if none."""
    if chosen:
        return chosen if chosen in names else ""
    return next((name for name in known if name in names), "")


def has_known_columns(names: list[str]) -> bool:
    """True if a row with these columns says where its picture is."""
    return bool(find_column(names, (*URLS, *PATHS, *PICTURES, *PHOTOS))) or "image_id" in names


def is_line_drawing(names: list[str]) -> bool:
    """True if rows hold a drawing beside the picture."""
    pair = bool(find_column(names, DRAWINGS)) and bool(find_column(names, PHOTOS))
    return pair or {"source", "target"} <= set(names)


class RowReader:
    """Rows with the same columns to records. `root`: what paths start from; `source`: goes into the meta."""

    def __init__(
        self, names: list[str], root: Path, source: str, options: ReaderOptions, drawing: bool = False
    ):
        for chosen in (options.key_column, options.caption_column, options.image_column):
            if chosen and chosen not in names:
                raise ValueError(f"there is no column {chosen!r}: the columns are {', '.join(names[:20])}")
        self.root, self.source, self.options = options.image_root or root, source, options
        self.key = find_column(names, KEYS, options.key_column)
        self.caption = find_column(names, CAPTIONS, options.caption_column)
        self.drawing = ""
        known = (*PATHS, *PICTURES, *URLS)
        if drawing:
            self.drawing = find_column(names, DRAWINGS) or "source"
            known = tuple(name for name in (*PHOTOS, *PATHS, *PICTURES) if name != self.drawing)
        self.picture = find_column(names, known, options.image_column)
        if not self.picture and self.key == "image_id":  # BriVL: the id is the path
            self.picture, self.key = "image_id", ""
        self.used = {self.key, self.caption, self.picture, self.drawing} - {""}

    def record(self, row: dict[str, Any], where: str, fallback_key: str) -> Item:
        """The row's record or problem; `fallback_key` names a row that has neither an id, a path nor a url."""
        captions = caption_list(row.get(self.caption)) if self.caption else ()
        if captions is None:
            return problem(where, self._key(row), "bad_value", f"{self.caption} is {row[self.caption]!r:.80}")
        meta = {"source": self.source}
        meta |= plain({k: v for k, v in row.items() if k not in self.used and not isinstance(v, bytes)})
        value, key = row.get(self.picture), self._key(row)
        if self.key and not key:
            return problem(where, "", "missing_id")
        if isinstance(value, str) and _is_url(value, self.picture):
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
            value = value.get("bytes") or value.get("path")  # an empty picture may still have a path
        if value is None or value == "" or value == b"":
            return problem(where, key, "empty_image" if self.picture else "no_image")
        if isinstance(value, (bytes, bytearray)):
            return bytes(value)
        if not isinstance(value, str):
            return problem(where, key, "bad_value", f"{self.picture} is a {type(value).__name__}")
        if "base64" in self.picture.lower() or looks_like_base64(value):
            try:
                return decode_base64(value.encode())
            except ValueError as error:
                return problem(where, key, "bad_base64", str(error))
        path = inside(self.root, value.strip())
        if path is None:
            return problem(where, key, "path_outside_root", f"{value[:120]!r} is not under {self.root}")
        return read_image_file(path, where, key, self.options.max_image_bytes)

    def _drawing(self, row: dict[str, Any], where: str, key: str) -> dict[str, bytes] | Problem:
        drawing = self._bytes(row.get(self.drawing), where, key)
        if isinstance(drawing, Problem):
            return drawing
        suffix = sniff(drawing)
        if not suffix:
            return problem(where, key, "not_an_image", "the drawing is no picture")
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
    """True for a data URI or a long text whose first bytes decode to a known kind of picture."""
    value = value.strip()
    if value.startswith("data:"):
        return True
    if len(value) < 64:
        return False
    head = value[:64].encode(errors="replace").replace(b"-", b"+").replace(b"_", b"/")
    try:
        return bool(sniff(base64.b64decode(head, validate=True)))
    except ValueError:
        return False


def _is_url(value: str, column: str) -> bool:
    return column in URLS or value.strip().lower().startswith(("http://", "https://", "s3://"))


def _key_of_path(value: Any) -> str:
    """The path without its picture suffix, so that `a/1.jpg` and `b/1.jpg` stay apart; "" for bytes."""
    if isinstance(value, dict):
        value = None if value.get("bytes") else value.get("path")
    if not isinstance(value, str) or len(value) > 4096 or looks_like_base64(value):
        return ""
    stem, dot, suffix = value.strip().rpartition(".")
    name = stem if dot and suffix.lower() in SUFFIXES else value.strip()
    return name.removeprefix("./")
