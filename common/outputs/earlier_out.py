"""Out directories of releases that kept no record: which of their files surely are those of generate.py and rerank.py.

The list is known by its keys, its names in order and nothing else in it. An image is, by its line, by being a plain
PNG of the common size and no younger than the list, whose line was appended after it; the grid and the first images
by each other's pixels; a ranking by its keys and by copies that are the listed images. What fails is the user's.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.image import make_grid
from common.outputs.image_list import GRID, LIST, MAX_GRID, RANKED, RANKING, image_name

LINE = frozenset(
    (
        "checkpoint",
        "file",
        "index",
        "log_likelihood",
        "null_log_likelihood",
        "sampling",
        "seconds",
        "seed",
        "text",
    )
)
MORE = frozenset(("engine", "kernels", "key", "negative", "source", "weights"))
RANKING_KEYS = frozenset(("ranker", "encoders", "calibration", "top_k", "min_percentile", "texts"))
CLOCK = 2.0  # seconds: some file systems count in twos
FIRST = b'{"checkpoint": '


def earlier_files(directory: Path) -> list[str]:
    """Names of the files that an earlier release surely wrote; empty where there is no list of its own."""
    path = directory / LIST
    if path.is_symlink() or not path.is_file():
        return []
    lines, is_cut = _lines(path.read_bytes())
    if lines is None:
        return []
    count = len(lines) + is_cut  # the image of a half line was renamed into place before
    images = _images(directory, count, path.stat().st_mtime + CLOCK)
    grid = _grid(directory, images, len(lines))
    if grid == "other":
        return [LIST]
    found = [LIST, *images, *([GRID] if grid == "same" else [])]
    return found + _ranking(directory, {line["text"] for line in lines}, set(images))


def _lines(data: bytes) -> tuple[list[dict[str, Any]] | None, bool]:
    """The lines, or None where one is not ours; whether a last one was cut."""
    *whole, rest = data.split(b"\n")
    lines = []
    for number, text in enumerate(whole):
        try:
            line = json.loads(text)
        except ValueError:
            return None, False
        if not isinstance(line, dict) or not LINE <= set(line) <= LINE | MORE:
            return None, False
        if line["file"] != image_name(number) or text.decode() != json.dumps(
            line, sort_keys=True, ensure_ascii=False
        ):
            return None, False
        lines.append(line)
    if not lines or not (rest.startswith(FIRST) or FIRST.startswith(rest)):
        return None, False
    return lines, bool(rest)


def _images(directory: Path, count: int, newest: float) -> list[str]:
    names, size = [], None
    for i in range(count):
        path = directory / image_name(i)
        found = _plain_png(path, newest)
        size = size or found
        if found and found == size:
            names.append(path.name)
    return names


def _plain_png(path: Path, newest: float) -> tuple[int, int] | None:
    """Size of an RGB image without metadata that is not younger than `newest`; None for anything else."""
    try:
        if path.is_symlink() or path.stat().st_mtime > newest:
            return None
        with Image.open(path) as image:
            plain = image.format == "PNG" and image.mode == "RGB" and not image.info
            return image.size if plain else None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def _grid(directory: Path, images: list[str], count: int) -> str:
    """Whether grid.png is "absent", the "same" as a grid of the first images, or "other"."""
    path = directory / GRID
    if not os.path.lexists(path):
        return "absent"
    shown = [image_name(i) for i in range(min(count, MAX_GRID))]
    if path.is_symlink() or not set(shown) <= set(images):
        return "other"
    try:
        with Image.open(path) as image:
            grid = np.asarray(image.convert("RGB"))
        cells = [Image.open(directory / name).convert("RGB") for name in shown]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return "other"
    columns = max(1, (grid.shape[1] + 2) // (cells[0].width + 2))
    return "same" if np.array_equal(np.asarray(make_grid(cells, columns)), grid) else "other"


def _ranking(directory: Path, texts: set[str], images: set[str]) -> list[str]:
    """ranking.json, its copies and ranked.png, which was written between them; all or none."""
    path = directory / RANKING
    try:
        ranking = json.loads(path.read_bytes())
        newest = path.stat().st_mtime + CLOCK
        if path.is_symlink() or set(ranking) != RANKING_KEYS:
            return []
        rows = [row for entry in ranking["texts"] for row in entry["pictures"]]
        if not {entry["text"] for entry in ranking["texts"]} <= texts:
            return []
        copies = {row["copy"]: row["file"] for row in rows if row["copy"]}
    except (OSError, ValueError, TypeError, KeyError):
        return []
    for copy, name in copies.items():
        there = directory / copy
        if name not in images or there.is_symlink() or not there.is_file():
            return []
        if there.read_bytes() != (directory / name).read_bytes():
            return []
    grid = [RANKED] if _plain_png(directory / RANKED, newest) else []
    return [RANKING, *grid, *copies]
