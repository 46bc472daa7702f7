"""Pairs of a line drawing and a product photo with a title: parquet lists, or two folders and a list of titles.

Parquet: columns `pd_line_drawing, pd_realistic_drawing, pd_title` (GoodsLine2Real) or `conditioning_image, image,
text` (diffusers), paths or bytes. Folders: `source/ target/ prompt.json` of the ControlNet tutorial, or a folder of
drawings beside one of photos with the same names and `titles.tsv`. The photo is the record's image; the drawing is
its member `drawing.png`. Ids need not be contiguous: names join the two, numbers are never counted.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from data_tools.images.decode import SUFFIXES, sniff
from data_tools.ingest.records import Problem, problem
from data_tools.readers.base import (
    Item,
    Meter,
    Part,
    ReaderOptions,
    decode_text,
    iter_lines,
    make_record,
    read_image_file,
)
from data_tools.readers.formats import jsonl, parquet
from data_tools.readers.inventory import image_stems, is_image_file

DRAWING_FOLDERS = (
    "line_drawing",
    "line_drawings",
    "drawing",
    "drawings",
    "Line Drawing",
    "sketch",
    "lineart",
)
PHOTO_FOLDERS = ("realistic_drawing", "photo", "photos", "Realistic Drawing", "target", "real", "images")
TITLE_FILES = ("titles.tsv", "titles.txt", "captions.tsv", "captions.txt", "prompt.tsv")
META = {"source": "line_drawing"}


def read(part: Part, options: ReaderOptions, meter: Meter) -> Iterator[Item]:
    """One item a pair; a photo without drawing, a drawing without photo and a pair without title are problems."""
    first = part.files[0]
    if first.suffix == ".parquet":
        yield from parquet.read(part, options, meter)
    elif first.is_file():
        yield from jsonl.read(part, options, meter)
    else:
        yield from _read_folders(part, options, meter)


def find_folders(root: Path) -> tuple[Path, Path] | None:
    """(photos, drawings) below `root`, or None."""
    drawing = next((root / name for name in DRAWING_FOLDERS if (root / name).is_dir()), None)
    photo = next((root / name for name in PHOTO_FOLDERS if (root / name).is_dir()), None)
    return (photo, drawing) if photo and drawing else None


def _read_folders(part: Part, options: ReaderOptions, meter: Meter) -> Iterator[Item]:
    photo_folder, drawing_folder = part.files
    photos, drawings = _by_stem(photo_folder), _by_stem(drawing_folder)
    titles: dict[str, str] = {}
    if part.texts:
        for item in _read_titles(part.texts, options):
            if isinstance(item, Problem):
                yield item
            else:
                titles[item[0]] = item[1]
    meter.total = max(meter.total, meter.done + len(photos))
    for path in (*photos.values(), *drawings.values()):
        meter.use(path)
    for stem, photo in photos.items():
        meter.done += 1
        meter.use(photo.with_suffix(".txt"))
        yield _read_pair(stem, photo, drawings.pop(stem, None), _title(stem, photo, titles, options), options)
    for stem, path in drawings.items():
        yield problem(_where(path), stem, "no_pair", "a drawing without its photo")
    for stem in sorted(titles.keys() - photos.keys() - drawings.keys()):
        yield problem(part.texts.name, stem, "no_image", "a title without its photo")


def _by_stem(folder: Path) -> dict[str, Path]:
    names = sorted(entry.name for entry in os.scandir(folder))
    known = [name for name in names if is_image_file(folder / name)]
    return {next(image_stems(name)): folder / name for name in known}


def _where(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _read_titles(path: Path, options: ReaderOptions) -> Iterator[tuple[str, str] | Problem]:
    for line in iter_lines(path, options.max_row_bytes):
        where = f"{path.name}:{line.number}"
        text = (
            problem(where, "", "row_too_large")
            if line.data is None
            else decode_text(line.data, options.encoding, where)
        )
        if isinstance(text, Problem):
            yield text
            continue
        name, tab, title = text.partition("\t")
        stem, suffix = os.path.splitext(name.strip())
        stem = stem if suffix[1:].lower() in SUFFIXES else name.strip()
        yield (
            (stem, title)
            if tab
            else problem(where, stem, "bad_column_count", "1 column instead of name<TAB>title")
        )


def _title(stem: str, photo: Path, titles: dict[str, str], options: ReaderOptions) -> str | Problem:
    """From the list of titles, else from the `.txt` beside the photo."""
    beside = photo.with_suffix(".txt")
    if stem in titles or not beside.is_file():
        return titles.get(stem, "")
    data = read_image_file(beside, _where(beside), stem, 1 << 20)
    return data if isinstance(data, Problem) else decode_text(data, options.encoding, _where(beside), stem)


def _read_pair(
    stem: str, photo: Path, drawing: Path | None, title: str | Problem, options: ReaderOptions
) -> Item:
    where = _where(photo)
    if isinstance(title, Problem):
        return title
    if drawing is None:
        return problem(where, stem, "no_pair", "a photo without its drawing")
    parts = [read_image_file(path, _where(path), stem, options.max_image_bytes) for path in (photo, drawing)]
    for data in parts:
        if isinstance(data, Problem):
            return data
    suffix = sniff(parts[1])
    if not suffix:
        return problem(_where(drawing), stem, "not_an_image", "the drawing is no image")
    captions = [title] if title.strip() else []
    return make_record(stem, parts[0], captions, dict(META), where, options, {f"drawing.{suffix}": parts[1]})
