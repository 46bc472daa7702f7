"""Folders of images with captions of the same stem: `a.jpg` + `a.txt`, or `images/a.jpg` + `captions/a.txt`.

What is an image is decided by its bytes where its suffix is none of an image. `a.json` beside it is its metadata, as
img2dataset writes it; its caption counts where there is no `a.txt`. A caption file holds one caption a line. Names with
folders or dots stay apart: the key is the path without suffix.
"""

import codecs
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common.files import split_lines
from data_tools.ingest.records import Problem, problem
from data_tools.readers.base import (
    Item,
    Meter,
    Part,
    ReaderOptions,
    decode_text,
    make_record,
    read_image_file,
)
from data_tools.readers.column_names import CAPTIONS, find_column
from data_tools.readers.columns import caption_list, plain
from data_tools.readers.inventory import Inventory, image_stems, take_inventory

META = {"source": "folder"}
MAX_CAPTION_BYTES = 1 << 20
IMAGE_FOLDERS, CAPTION_FOLDERS = ("images", "image", "imgs"), ("captions", "caption", "texts", "labels")


class Image(NamedTuple):
    """An image and what lies beside it: the names of its caption and of its JSON, "" where there is none."""

    name: str
    caption: str
    meta: str


def read(part: Part, options: ReaderOptions, meter: Meter) -> Iterator[Item]:
    """One item an image, in the order of the names, then the captions left without an image."""
    inventory = part.inventory or take_inventory(part.files[0])
    images = pair(inventory)
    meter.total = max(meter.total, meter.done + len(images))
    captions = dict.fromkeys(inventory.of("caption"))
    for image in images:
        meter.done += 1
        for name in filter(None, image):
            meter.use(inventory.root / name)
        captions.pop(image.caption, None)
        yield _read_image(inventory.root, image, options)
    for name in captions:
        meter.use(inventory.root / name)
        yield problem(name, os.path.splitext(name)[0], "no_image")


def pair(inventory: Inventory) -> list[Image]:
    """The images of a folder with their captions and JSON, by name: `a.jpg` has `a.txt` or `a.jpg.txt`, `a.json`.

    Names are all that is held: about 100 bytes an image.
    """
    folders = set(inventory.folders)
    captions = {_image_stem(os.path.splitext(n)[0], folders): n for n in inventory.of("caption")}
    metas = {_image_stem(os.path.splitext(n)[0], folders): n for n in inventory.of("json")}
    found = []
    for name in inventory.of("image"):
        stems = list(image_stems(name))
        caption = next((captions[stem] for stem in stems if stem in captions), "")
        found.append(Image(name, caption, next((metas[stem] for stem in stems if stem in metas), "")))
    return found


def _image_stem(stem: str, folders: set[str]) -> str:
    """`captions/a` belongs to `images/a` where the two folders stand side by side."""
    head, slash, tail = stem.partition("/")
    if slash and head in CAPTION_FOLDERS:
        for folder in IMAGE_FOLDERS:
            if folder in folders:
                return f"{folder}/{tail}"
    return stem


def _read_image(root: Path, image: Image, options: ReaderOptions) -> Item:
    name = image.name
    key = _short_key(next(image_stems(name)))
    if not _is_plain(name):
        return problem(ascii(name), "", "bad_key", "the file name is not valid UTF-8")
    meta = _meta(root / image.meta) if image.meta else {}
    captions: list[str] | Problem = []
    if image.caption:
        captions = _captions(root, image.caption, name, key, options)
    elif column := find_column(list(meta), CAPTIONS, options.caption_column):
        captions = list(caption_list(meta[column]) or ())
    if isinstance(captions, Problem):
        return captions
    data = read_image_file(root / name, name, key, options.max_image_bytes)
    if isinstance(data, Problem):
        return data
    return make_record(key, data, captions, {**META, **meta}, name, options)


def _meta(path: Path) -> dict[str, Any]:
    """The fields of the JSON object beside an image; a file of anything else has none."""
    data = read_image_file(path, path.name, "", MAX_CAPTION_BYTES)
    try:
        value = json.loads(data) if isinstance(data, bytes) else None
    except (ValueError, RecursionError):
        return {}
    return plain(value) if isinstance(value, dict) else {}


def _captions(
    root: Path, caption_name: str, name: str, key: str, options: ReaderOptions
) -> list[str] | Problem:
    data = read_image_file(root / caption_name, caption_name, key, MAX_CAPTION_BYTES)
    if isinstance(data, Problem):
        empty = data.reason == "empty_image"
        return problem(name, key, "no_caption", f"{caption_name} is empty") if empty else data
    encoding = "utf-8-sig" if data.startswith(codecs.BOM_UTF8) else options.encoding
    text = decode_text(data, encoding, caption_name, key)
    return text if isinstance(text, Problem) else split_lines(text)


def _short_key(stem: str) -> str:
    head, slash, tail = stem.partition("/")
    return tail if slash and head in IMAGE_FOLDERS else stem


def _is_plain(name: str) -> bool:
    return not any(0xD800 <= ord(letter) <= 0xDFFF for letter in name)
