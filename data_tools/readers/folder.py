"""Folders of pictures with captions of the same stem: `a.jpg` + `a.txt`, or `images/a.jpg` + `captions/a.txt`.

A caption file holds one caption a line. Names with folders or dots stay apart: the key is the path without suffix.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from data_tools.images import SUFFIXES
from data_tools.readers.base import (
    Item,
    Meter,
    Part,
    ReaderOptions,
    decode_text,
    make_record,
    read_image_file,
)
from data_tools.records import Problem, problem

META = {"source": "folder"}
MAX_CAPTION_BYTES = 1 << 20
PICTURE_FOLDERS, CAPTION_FOLDERS = ("images", "image", "imgs"), ("captions", "caption", "texts", "labels")


def read(part: Part, options: ReaderOptions, meter: Meter) -> Iterator[Item]:
    """One item a picture, in the order of the names, then the captions left without a picture."""
    root = part.files[0]
    pictures, captions = list_files(root)
    meter.total = max(meter.total, meter.done + len(pictures))
    for name in pictures:
        meter.done += 1
        stem = os.path.splitext(name)[0]
        yield _read_picture(root, name, captions.get(stem), options)
    for name in pictures:
        captions.pop(os.path.splitext(name)[0], None)
    for stem, name in captions.items():
        yield problem(name, stem, "no_image")


def list_files(root: Path) -> tuple[list[str], dict[str, str]]:
    """Pictures and captions below `root` as relative names, sorted; captions by the stem of their picture.

    Names are all that is held: about 100 bytes a picture. Hidden files and folders are left out.
    """
    pictures, captions = [], {}
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        base = os.path.relpath(folder, root)
        for name in sorted(names):
            relative = name if base == "." else f"{base}/{name}"
            stem, suffix = os.path.splitext(relative)
            if name.startswith("."):
                continue
            if suffix[1:].lower() in SUFFIXES:
                pictures.append(relative)
            elif suffix.lower() == ".txt":
                captions[_picture_stem(stem, root)] = relative
    return pictures, captions


def _picture_stem(stem: str, root: Path) -> str:
    """`captions/a` belongs to `images/a` where the two folders stand side by side."""
    head, slash, tail = stem.partition("/")
    if slash and head in CAPTION_FOLDERS:
        for folder in PICTURE_FOLDERS:
            if (root / folder).is_dir():
                return f"{folder}/{tail}"
    return stem


def _read_picture(root: Path, name: str, caption_name: str | None, options: ReaderOptions) -> Item:
    key = _short_key(os.path.splitext(name)[0])
    if not _is_plain(name):
        return problem(ascii(name), "", "bad_key", "the file name is not valid UTF-8")
    captions = _captions(root, caption_name, name, key, options) if caption_name else []
    if isinstance(captions, Problem):
        return captions
    image = read_image_file(root / name, name, key, options.max_image_bytes)
    return (
        image if isinstance(image, Problem) else make_record(key, image, captions, dict(META), name, options)
    )


def _captions(
    root: Path, caption_name: str, name: str, key: str, options: ReaderOptions
) -> list[str] | Problem:
    data = read_image_file(root / caption_name, caption_name, key, MAX_CAPTION_BYTES)
    if isinstance(data, Problem):
        empty = data.reason == "empty_image"
        return problem(name, key, "no_caption", f"{caption_name} is empty") if empty else data
    text = decode_text(data.removeprefix(b"\xef\xbb\xbf"), options.encoding, caption_name, key)
    return text if isinstance(text, Problem) else text.splitlines()


def _short_key(stem: str) -> str:
    head, slash, tail = stem.partition("/")
    return tail if slash and head in PICTURE_FOLDERS else stem


def _is_plain(name: str) -> bool:
    return not any(0xD800 <= ord(letter) <= 0xDFFF for letter in name)
