"""Measured of pairs of a drawing and an image: how dense the lines are, how white the images, which ids miss."""

import re
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_tools.images.decode import BadImage, ImageLimits
from data_tools.images.line_drawings import line_density, read_drawing
from data_tools.ingest.records import Record
from data_tools.lines import drawing_of

NO_DRAWING, NOT_A_DRAWING = -1.0, -2.0  # in the place of a density
SHOWN = 20  # missing ids that are listed
_NUMBER = re.compile(r"(\d{1,15})$")


def drawing_density(record: Record, limits: ImageLimits) -> float:
    """Mean ink of the record's drawing, 0 to 1; NO_DRAWING without one, NOT_A_DRAWING for an empty or damaged one."""
    data = drawing_of(record)
    if data is None:
        return NO_DRAWING
    try:
        return line_density(read_drawing(data, limits).lines)
    except (BadImage, ValueError):
        return NOT_A_DRAWING


def number_of(record: Record) -> int:
    """The number that the record's id ends in, -1 for none."""
    found = _NUMBER.search(str(record.meta.get("id", record.key)))
    return int(found[1]) if found else -1


def missing_ids(numbers: array) -> dict[str, Any] | None:
    """First and last number and the gaps between them; None unless every id ends in a number of its own."""
    found = np.unique(np.asarray(numbers, np.int64))
    if not len(found) or found[0] < 0 or len(found) < len(numbers):
        return None
    gaps = np.diff(found) - 1
    holes: list[int] = []
    for at in np.flatnonzero(gaps):
        holes += range(int(found[at]) + 1, min(int(found[at + 1]), int(found[at]) + 1 + SHOWN))
        if len(holes) >= SHOWN:
            break
    return {
        "first": int(found[0]),
        "last": int(found[-1]),
        "missing": int(gaps.sum()),
        "missing_first": holes[:SHOWN],
    }


def densities(values: np.ndarray) -> tuple[Sequence[float], int]:
    """Densities of the drawings that were read, and how many could not be."""
    return values[values >= 0].tolist(), int((values == NOT_A_DRAWING).sum())
