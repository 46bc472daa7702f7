"""Outlines of the ten kinds of goods that the synthetic images show, as numbers and without any pixels.

A shape function draws its proportions from a generator and returns `Goods`: marks in painter's order plus
creases for the shading. Coordinates are goods units, x to the right and y down, roughly in [-1, 1]; the
renderer fits them to the frame. A mark is made of one of four materials: `body` (takes the colour and the
pattern), `inner` (a darker shade of the colour), `trim` (neutral: soles, caps, metal) and `hole` (the
background shows through).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

Material = Literal["body", "inner", "trim", "hole"]
Rng = np.random.Generator


@dataclass(frozen=True)
class Mark:
    """A filled polygon or, where `width` is set, a round stroke along the points."""

    points: np.ndarray
    """(P, 2) goods units."""
    material: Material = "body"
    width: float = 0.0
    """Stroke width in goods units; 0 fills the polygon."""
    outlined: bool = True


@dataclass(frozen=True)
class Crease:
    """A line of shading: a fold, a seam, a highlight."""

    points: np.ndarray
    """(P, 2) goods units."""
    strength: float
    """-1 darkens to black, 1 lightens to white."""
    width: float = 0.05


@dataclass(frozen=True)
class Goods:
    """One thing to draw."""

    marks: tuple[Mark, ...]
    creases: tuple[Crease, ...] = ()
    standing: bool = False
    """Stands on the background (a shadow at its foot) instead of lying flat (a shadow all around)."""


def rounded(points: list[tuple[float, float]], times: int = 2) -> np.ndarray:
    """A closed polygon with its corners cut `times` times (Chaikin 1974)."""
    p = np.asarray(points, dtype=np.float64)
    for _ in range(times):
        following = np.roll(p, -1, axis=0)
        p = np.stack([0.75 * p + 0.25 * following, 0.25 * p + 0.75 * following], axis=1).reshape(-1, 2)
    return p


def mirrored(right_half: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """A polygon symmetric about x = 0 from its right half, listed from top to bottom."""
    return right_half + [(-x, y) for x, y in reversed(right_half)]


def arc(cx: float, cy: float, rx: float, ry: float, start: float = 0.0, stop: float = 360.0) -> np.ndarray:
    """Points of an ellipse from `start` to `stop` degrees; 0 is right, 90 is down."""
    angles = np.deg2rad(np.linspace(start, stop, 28))
    return np.stack([cx + rx * np.cos(angles), cy + ry * np.sin(angles)], axis=1)


def path(*points: tuple[float, float]) -> np.ndarray:
    """A polyline."""
    return np.asarray(points, dtype=np.float64)


def tshirt(rng: Rng) -> Goods:
    """Short sleeves, round neck, straight hem."""
    chest, neck = rng.uniform(0.50, 0.62), rng.uniform(0.20, 0.27)
    reach, drop = rng.uniform(0.26, 0.36), rng.uniform(0.40, 0.58)
    hem, length = chest * rng.uniform(0.92, 1.08), rng.uniform(0.72, 0.95)
    shoulder, cuff_top = (chest * 0.98, -0.72), (chest + reach, -0.72 + drop)
    cuff_low, armpit = (chest + reach - 0.22, cuff_top[1] + 0.15), (chest, -0.32)
    right = [(neck, -0.88), shoulder, cuff_top, cuff_low, armpit, armpit, (hem, length), (hem, length)]
    collar = arc(0, -0.86, neck, rng.uniform(0.14, 0.26), 0, 180)
    cuffs = [[(s * (p[0] - 0.045), p[1] - 0.05) for p in (cuff_top, cuff_low)] for s in (-1, 1)]
    marks = [Mark(rounded(mirrored(right), 2)), Mark(collar, "inner")]
    marks += [Mark(path(*cuff), "inner", 0.03, False) for cuff in cuffs]
    creases = [Crease(path((s * chest * 0.9, -0.66), (s * chest * 0.86, -0.3)), -0.28, 0.04) for s in (-1, 1)]
    for _ in range(rng.integers(2, 5)):
        x, y = rng.uniform(-0.8, 0.8) * chest, rng.uniform(-0.1, 0.6)
        creases.append(
            Crease(path((x, y), (x * 0.6 + rng.uniform(-0.1, 0.1), y + rng.uniform(0.15, 0.4))), -0.2, 0.07)
        )
    return Goods(tuple(marks), tuple(creases))


def dress(rng: Rng) -> Goods:
    """A fitted top, a waist, a wide skirt with a wavy hem."""
    top, waist = rng.uniform(0.27, 0.33), rng.uniform(0.19, 0.25)
    flare, waist_y = rng.uniform(0.56, 0.80), rng.uniform(-0.28, -0.12)
    right = [(top * 0.55, -0.96), (top * 0.85, -0.96), (top, -0.62), (waist, waist_y), (waist, waist_y)]
    if rng.random() < 0.5:  # cap sleeves
        right[1:3] = [(top * 1.0, -0.94), (top * 1.6, -0.66), (top * 1.2, -0.56), (top * 0.98, -0.66)]
    hem = [(flare * t, 0.9 + 0.05 * (-1) ** i) for i, t in enumerate((1.0, 0.75, 0.5, 0.25))]
    right += [(flare * 0.62, 0.25), (flare, 0.86), *hem]
    neckline = [(top * 0.55, -0.98), (0.0, rng.uniform(-0.78, -0.62)), (-top * 0.55, -0.98)]
    belt = path((-waist * 0.98, waist_y), (0, waist_y + 0.03), (waist * 0.98, waist_y))
    marks = (
        Mark(rounded(mirrored(right), 2)),
        Mark(rounded(neckline, 1), "hole"),
        Mark(belt, "inner", rng.uniform(0.05, 0.09), False),
    )
    folds = np.linspace(-0.75, 0.75, int(rng.integers(3, 6))) + rng.uniform(-0.06, 0.06)
    creases = [
        Crease(path((f * waist, waist_y + 0.1), (f * flare * 0.95, 0.88)), -0.3 if i % 2 == 0 else 0.22, 0.08)
        for i, f in enumerate(folds)
    ]
    return Goods(marks, tuple(creases))


def trousers(rng: Rng) -> Goods:
    """Two long legs, a waistband, pockets."""
    waist, hip = rng.uniform(0.32, 0.38), rng.uniform(0.42, 0.48)
    ankle, gap = rng.uniform(0.44, 0.62), rng.uniform(0.20, 0.27)
    crotch = rng.uniform(-0.32, -0.18)
    ankle = max(ankle, gap + 0.22)
    right = [
        (waist, -0.95),
        (waist, -0.95),
        (hip, -0.5),
        (ankle, 0.94),
        (ankle, 0.94),
        (gap, 0.94),
        (gap, 0.94),
    ]
    right += [(0.03, crotch)]
    band = [(-waist, -0.95), (waist, -0.95), (waist + 0.02, -0.82), (-waist - 0.02, -0.82)]
    marks = (
        Mark(rounded(mirrored(right), 2)),
        Mark(path(*band), "inner"),
        Mark(path((0, -0.82), (0, crotch)), "inner", 0.025, False),
        Mark(path((waist * 0.55, -0.80), (hip * 0.85, -0.58)), "inner", 0.025, False),
        Mark(path((-waist * 0.55, -0.80), (-hip * 0.85, -0.58)), "inner", 0.025, False),
        Mark(path((gap, 0.87), (ankle, 0.87)), "inner", 0.025, False),
        Mark(path((-gap, 0.87), (-ankle, 0.87)), "inner", 0.025, False),
    )
    middle = (gap + ankle) / 2
    creases = [
        Crease(path((s * hip * 0.5, -0.4), (s * middle, 0.85)), rng.choice([-0.25, 0.2]), 0.06)
        for s in (-1, 1)
    ]
    creases += [Crease(path((s * 0.06, crotch), (s * hip * 0.7, crotch - 0.14)), -0.3, 0.06) for s in (-1, 1)]
    return Goods(marks, tuple(creases))


def shoe(rng: Rng) -> Goods:
    """A sneaker from the side, toe to the right: sole, upper, laces."""
    collar, toe = rng.uniform(-0.42, -0.28), rng.uniform(0.0, 0.08)
    sole = rng.uniform(0.13, 0.2)
    upper = [(-0.84, 0.32), (-0.88, 0.0), (-0.84, collar), (-0.84, collar), (-0.5, collar + 0.14)]
    upper += [
        (-0.22, collar - 0.04),
        (-0.12, collar - 0.04),
        (0.2, -0.12),
        (0.62, toe),
        (0.95, 0.16),
        (0.95, 0.34),
    ]
    under = [(-0.9, 0.3), (0.4, 0.3), (0.98, 0.27), (0.98, 0.3 + sole), (-0.9, 0.3 + sole)]
    opening = [(-0.8, collar + 0.03), (-0.5, collar + 0.17), (-0.2, collar), (-0.5, collar - 0.06)]
    heel = [(-0.86, 0.3), (-0.87, -0.08), (-0.68, -0.04), (-0.62, 0.3)]
    laces = [
        Mark(path((x, y - 0.05), (x - 0.14, y + 0.10)), "trim", 0.06, False)
        for x, y in ((-0.02, collar + 0.08), (0.12, collar + 0.17), (0.26, collar + 0.24))
    ]
    marks = [Mark(rounded(upper, 2)), Mark(rounded(opening, 2), "inner"), Mark(rounded(under, 1), "trim")]
    if rng.random() < 0.6:
        marks.insert(2, Mark(rounded(heel, 1), "inner"))
    creases = (
        Crease(path((0.5, -0.02), (0.42, 0.28)), -0.25, 0.05),
        Crease(path((-0.55, 0.05), (0.1, 0.2)), 0.2, 0.09),
        Crease(path((0.6, 0.1), (0.85, 0.2)), 0.25, 0.08),
    )
    return Goods((*marks, *laces), creases, standing=True)


def bag(rng: Rng) -> Goods:
    """A handbag with one arched handle, a flap and a clasp."""
    top, bottom = rng.uniform(0.55, 0.72), rng.uniform(0.72, 0.9)
    shoulder, foot = rng.uniform(-0.22, -0.08), rng.uniform(0.68, 0.85)
    body = [(-top, shoulder), (top, shoulder), (bottom, foot), (-bottom, foot)]
    reach, height = top * rng.uniform(0.5, 0.7), rng.uniform(0.5, 0.75)
    flap_y = shoulder + (foot - shoulder) * rng.uniform(0.4, 0.55)
    seam = path(
        (-top * 1.05, shoulder + 0.1), (-top * 0.7, flap_y), (top * 0.7, flap_y), (top * 1.05, shoulder + 0.1)
    )
    marks = (
        Mark(arc(0, shoulder + 0.04, reach, height, 180, 360), "inner", rng.uniform(0.09, 0.13)),
        Mark(rounded(_dense(body), 2)),
        Mark(seam, "inner", 0.04, False),
        Mark(arc(0, flap_y, 0.09, 0.08), "trim"),
    )
    creases = (
        Crease(path((-bottom * 0.85, foot - 0.07), (bottom * 0.85, foot - 0.07)), -0.25, 0.1),
        Crease(path((-top * 0.7, shoulder + 0.08), (top * 0.7, shoulder + 0.08)), 0.25, 0.08),
    )
    return Goods(marks, creases, standing=True)


def cup(rng: Rng) -> Goods:
    """A mug with an elliptic mouth and a handle on the right."""
    rim, foot = rng.uniform(0.50, 0.60), rng.uniform(0.40, 0.56)
    top, bottom = rng.uniform(-0.72, -0.55), rng.uniform(0.58, 0.75)
    mouth = rng.uniform(0.10, 0.17)
    side = np.concatenate([arc(0, bottom, foot, mouth * 0.9, 0, 180), arc(0, top, rim, mouth, 180, 360)])
    reach, middle = rng.uniform(0.28, 0.4), (top + bottom) / 2
    marks = (
        Mark(
            arc(rim * 0.9, middle - 0.02, reach, (bottom - top) * 0.3, -88, 88),
            "body",
            rng.uniform(0.11, 0.15),
        ),
        Mark(side),
        Mark(arc(0, top, rim, mouth), "body"),
        Mark(arc(0, top + 0.015, rim * 0.86, mouth * 0.76), "inner", outlined=False),
    )
    creases = (
        Crease(path((-rim * 0.62, top + 0.22), (-foot * 0.62, bottom - 0.08)), 0.4, 0.1),
        Crease(path((rim * 0.86, top + 0.15), (foot * 0.86, bottom - 0.02)), -0.35, 0.16),
    )
    return Goods(marks, creases, standing=True)


def lamp(rng: Rng) -> Goods:
    """A table lamp: conical shade, thin pole, round foot."""
    crown, rim = rng.uniform(0.24, 0.38), rng.uniform(0.56, 0.72)
    low, foot = rng.uniform(-0.15, 0.05), rng.uniform(0.32, 0.44)
    shade = np.concatenate([arc(0, low, rim, 0.09, 0, 180), arc(0, -0.92, crown, 0.05, 180, 360)])
    base = np.concatenate([arc(0, 0.88, foot, 0.08, 0, 180), arc(0, 0.84, foot, 0.14, 180, 360)])
    marks = (
        Mark(path((0, low), (0, 0.86)), "trim", rng.uniform(0.07, 0.12)),
        Mark(base),
        Mark(shade),
        Mark(arc(0, -0.92, crown, 0.05), "inner"),
    )
    creases = (
        Crease(path((-crown * 0.5, -0.85), (-rim * 0.5, low)), 0.35, 0.14),
        Crease(path((crown * 0.85, -0.85), (rim * 0.85, low)), -0.3, 0.14),
        Crease(path((-foot * 0.5, 0.8), (foot * 0.1, 0.78)), 0.3, 0.06),
    )
    return Goods(marks, creases, standing=True)


def chair(rng: Rng) -> Goods:
    """A chair from the front: slatted or full back, seat, four legs."""
    back, seat = rng.uniform(0.36, 0.44), rng.uniform(0.5, 0.58)
    seat_y, top = rng.uniform(0.0, 0.12), -0.97
    legs_material: Material = "trim" if rng.random() < 0.5 else "body"
    width = rng.uniform(0.10, 0.13)
    rest_y = seat_y - 0.22
    marks = [
        Mark(path((s * back * 0.85, rest_y - 0.1), (s * back * 0.9, seat_y)), legs_material, width)
        for s in (-1, 1)
    ]
    marks += [
        Mark(path((s * seat * 0.7, seat_y), (s * seat * 0.72, 0.78)), legs_material, width * 0.8)
        for s in (-1, 1)
    ]
    rest = [(-back, top), (back, top), (back * 1.02, rest_y), (-back * 1.02, rest_y)]
    marks.append(Mark(rounded(_dense(rest), 2)))
    if rng.random() < 0.4:
        for x in (-0.42, 0.0, 0.42):
            slot = [(back * x - 0.055, top + 0.2), (back * x + 0.055, top + 0.2)]
            slot += [(back * x + 0.055, rest_y - 0.14), (back * x - 0.055, rest_y - 0.14)]
            marks.append(Mark(path(*slot), "hole"))
    marks += [
        Mark(path((s * seat * 0.95, seat_y + 0.25), (s * seat * 1.02, 0.97)), legs_material, width)
        for s in (-1, 1)
    ]
    front = seat_y + 0.2
    marks.append(
        Mark(
            path(
                (-seat * 1.12, front),
                (seat * 1.12, front),
                (seat * 1.1, front + 0.1),
                (-seat * 1.1, front + 0.1),
            ),
            "inner",
        )
    )
    marks.append(
        Mark(path((-seat * 0.85, seat_y), (seat * 0.85, seat_y), (seat * 1.12, front), (-seat * 1.12, front)))
    )
    creases = (
        Crease(path((-back * 0.8, top + 0.12), (back * 0.5, top + 0.12)), 0.3, 0.1),
        Crease(path((-seat * 0.6, seat_y + 0.06), (seat * 0.6, seat_y + 0.06)), -0.2, 0.08),
    )
    return Goods(tuple(marks), creases, standing=True)


def bottle(rng: Rng) -> Goods:
    """A slim bottle with a neck, a cap and sometimes a label."""
    neck, girth = rng.uniform(0.11, 0.15), rng.uniform(0.30, 0.38)
    shoulder = rng.uniform(-0.42, -0.2)
    right = [
        (neck, -0.8),
        (neck, -0.8),
        (neck, shoulder - 0.12),
        (girth, shoulder + 0.12),
        (girth, 0.9),
        (girth, 0.95),
    ]
    cap = [(-neck * 1.25, -0.98), (neck * 1.25, -0.98), (neck * 1.25, -0.76), (-neck * 1.25, -0.76)]
    marks = [Mark(rounded(mirrored(right), 2)), Mark(path(*cap), "trim")]
    if rng.random() < 0.4:
        top, bottom = rng.uniform(0.15, 0.25), rng.uniform(0.48, 0.6)
        marks.append(Mark(path((-girth, top), (girth, top), (girth, bottom), (-girth, bottom)), "trim"))
        marks.append(
            Mark(
                path((-girth * 0.5, (top + bottom) / 2), (girth * 0.5, (top + bottom) / 2)),
                "inner",
                0.06,
                False,
            )
        )
    creases = (
        Crease(path((-girth * 0.6, shoulder + 0.2), (-girth * 0.6, 0.8)), 0.5, 0.08),
        Crease(path((girth * 0.8, shoulder + 0.15), (girth * 0.8, 0.88)), -0.35, 0.14),
        Crease(path((-neck * 0.4, -0.72), (-neck * 0.4, shoulder - 0.1)), 0.4, 0.06),
    )
    return Goods(tuple(marks), creases, standing=True)


def hat(rng: Rng) -> Goods:
    """A hat with a round brim, a crown with a dent and a ribbon."""
    brim, crown = rng.uniform(0.88, 1.0), rng.uniform(0.44, 0.54)
    height, tilt = rng.uniform(0.62, 0.85), rng.uniform(0.18, 0.27)
    top = 0.3 - height
    dome = [
        (0.0, top + 0.10),
        (crown * 0.55, top - 0.04),
        (crown * 0.9, top + 0.06),
        (crown, 0.1),
        (crown * 1.04, 0.36),
    ]
    dome += [(crown * 0.5, 0.42)]
    band_top, band_low = 0.30 - height * 0.3, 0.36
    band = np.concatenate(
        [arc(0, band_top, crown, 0.07, 0, 180)[::-1], arc(0, band_low, crown * 1.03, 0.08, 0, 180)]
    )
    marks = (
        Mark(arc(0, 0.36, brim, tilt)),
        Mark(rounded(mirrored(dome), 2)),
        Mark(band, "trim" if rng.random() < 0.5 else "inner"),
    )
    creases = (
        Crease(arc(0, 0.36, brim * 0.78, tilt * 0.75, 20, 160), 0.25, 0.07),
        Crease(arc(0, 0.42, crown * 1.1, 0.1, 0, 180), -0.35, 0.08),
        Crease(path((-crown * 0.55, top + 0.16), (-crown * 0.6, 0.0)), 0.3, 0.14),
        Crease(path((0.0, top + 0.1), (crown * 0.06, top + 0.3)), -0.25, 0.08),
    )
    return Goods(marks, creases, standing=True)


def _dense(corners: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points near each corner, so that rounding touches the corners alone and leaves the sides straight."""
    p = np.asarray(corners, dtype=np.float64)
    before, after = np.roll(p, 1, axis=0), np.roll(p, -1, axis=0)
    near = np.stack([0.82 * p + 0.18 * before, p, 0.82 * p + 0.18 * after], axis=1)
    return [tuple(q) for q in near.reshape(-1, 2)]


SHAPES: dict[str, Callable[[Rng], Goods]] = {
    "tshirt": tshirt,
    "dress": dress,
    "trousers": trousers,
    "shoe": shoe,
    "bag": bag,
    "cup": cup,
    "lamp": lamp,
    "chair": chair,
    "bottle": bottle,
    "hat": hat,
}
