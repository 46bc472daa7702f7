"""What is alike among measured images, and which of them to show."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_tools.dedup import close_pairs
from data_tools.images.phash import distances
from data_tools.report.facts import Facts

NEAR = 8  # hash bits: images shown as nearest pairs
COLOURS = 32  # levels by which the colours of near images may differ
Row = tuple[int, int]  # split, number of the row in it


@dataclass(frozen=True)
class Likeness:
    """What is twice or nearly so, over all splits."""

    exact: int
    """Images whose hash and colours another image has too."""
    near: int
    """Pairs within NEAR bits, those of equal hashes left out."""
    across: int
    """Pairs of both kinds whose images are in different splits."""
    nearest: list[tuple[int, Row, Row]]
    """(distance, one, other), nearest first, one pair of each two images."""


def likeness(facts: Sequence[Facts], shown: int = 12) -> Likeness:
    """Duplicates and near pairs among the measured images of all splits."""
    images = np.concatenate([f.images for f in facts])
    split = np.repeat(np.arange(len(facts)), [len(f.rows) for f in facts])
    row = np.concatenate([np.array(f.rows, np.int64) for f in facts])
    marks = np.concatenate(
        [images["phash"][:, None].view(np.uint8).reshape(-1, 8), images["colours"]], axis=1
    )
    _, first, inverse, counts = np.unique(
        marks, axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    inverse = inverse.reshape(-1)
    pairs = first[close_pairs(images["phash"][first], images["colours"][first], NEAR, COLOURS)]
    twins = np.flatnonzero(first[inverse] != np.arange(len(images)))
    same = np.stack([first[inverse[twins]], twins], axis=1)
    away = distances(images["phash"][pairs[:, 0]], images["phash"][pairs[:, 1]])
    every = np.concatenate([same, pairs[np.argsort(away, kind="stable")]])
    nearest, seen = [], set()
    for (i, j), d in zip(every, [*[0] * len(same), *np.sort(away, kind="stable")], strict=True):
        if len(nearest) == shown:
            break
        if not {int(i), int(j)} & seen:
            nearest.append((int(d), (int(split[i]), int(row[i])), (int(split[j]), int(row[j]))))
            seen |= {int(i), int(j)}
    across = int((split[every[:, 0]] != split[every[:, 1]]).sum())
    return Likeness(int(counts[counts > 1].sum()), len(pairs), across, nearest)


def examples(facts: Sequence[Facts], count: int = 12) -> dict[str, list[Row]]:
    """Rows to show: some of all, the least sharp, the least contrast, the most tiled."""
    shown: dict[str, list[Row]] = {name: [] for name in ("sample", "blurred", "near_constant", "watermark")}
    for split, fact in enumerate(facts):
        images, rows = fact.images, np.array(fact.rows, np.int64)
        if not len(rows):
            continue
        spaced = np.linspace(0, len(rows) - 1, min(len(rows), 2 * count)).astype(int)
        faults = {"blurred": images["sharpness"] < 0.12, "near_constant": images["contrast"] < 4.0}
        faults["watermark"] = images["tiling"] > 0.06
        faults["blurred"] &= ~faults["near_constant"]
        picks = {"sample": spaced} | {name: np.flatnonzero(bad)[:count] for name, bad in faults.items()}
        for name, chosen in picks.items():
            shown[name] += [(split, int(rows[i])) for i in chosen]
    return {name: rows[: 2 * count if name == "sample" else count] for name, rows in shown.items()}


def flag_counts(facts: Sequence[Facts]) -> dict[str, int]:
    """Images that data_tools.clean --rules shop would flag."""
    images = np.concatenate([fact.images for fact in facts])
    blank = images["contrast"] < 4.0
    blurred = (images["sharpness"] < 0.12) & ~blank
    return {
        "near_constant": int(blank.sum()),
        "blurred": int(blurred.sum()),
        "watermark": int(((images["tiling"] > 0.06) & ~blank).sum()),
    }
