"""Images of `Goods`: outlines drawn at four times the size for smooth edges, light and background by the pixel.

The marks are drawn as weights of four materials (body, inner, trim, line), reduced to the image's size,
and only then coloured: colour = sum of weight x material colour, times the light, over the background. The
image's size changes the sampling alone: the same look at 64 and at 128 pixels.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from data_tools.synthetic.shapes import Goods, Mark

SUPERSAMPLE = 4
Pattern = Literal["plain", "striped", "dotted"]
Background = Literal["white", "grey", "wood"]
Color = tuple[int, int, int]
# CMYK merely as four independent 8-bit channels: weights of body, inner, trim and line.
_MATERIALS = {"body": (255, 0, 0, 0), "inner": (0, 255, 0, 0), "trim": (0, 0, 255, 0), "hole": (0, 0, 0, 0)}
_LINE = (0, 0, 0, 255)


@dataclass(frozen=True)
class Look:
    """How one thing is shown. Angles in degrees; lengths in goods units unless said otherwise."""

    color: Color
    accent: Color
    """Of the stripes and dots."""
    trim: Color
    pattern: Pattern
    background: Background
    size: float
    """Half of the longer side of the goods, 1 = half of the image."""
    center: tuple[float, float]
    """Where in the room that is left, each in [-1, 1]."""
    tilt: float
    stretch: float
    """Width over height, relative to the shape's own."""
    flip: bool
    outline: float
    """Width of the outline in pixels of a 64-pixel image; 0 draws none."""
    light: float
    """Direction the light comes from; 90 is straight above."""
    depth: float
    """Strength of the shading, 0 to 1."""
    pattern_period: float
    pattern_angle: float
    background_tone: float
    """In [-1, 1], from dark to light."""
    background_phase: float
    background_angle: float


def render(goods: Goods, look: Look, image_size: int) -> tuple[Image.Image, np.ndarray]:
    """An RGB image of `image_size` pixels a side, and how much of each pixel the goods cover: (S, S) in [0, 1]."""
    matrix, shift = _placement(goods, look)
    weights = _material_weights(goods, look, matrix, shift, image_size)  # (S, S, 4)
    alpha = np.minimum(weights[..., 0] + weights[..., 1] + weights[..., 2] + weights[..., 3], 1.0)  # (S, S)
    body, others = _material_colors(look, _goods_coordinates(matrix, shift, image_size))
    goods_rgb = weights[..., :1] * body + weights[..., 1:] @ others  # (S, S, 3), premultiplied
    goods_rgb = _lit(goods_rgb, alpha, _light(goods, look, alpha, matrix, shift))
    background = _background(look, image_size) * (1.0 - _shadow(goods, look, alpha, matrix, shift))[..., None]
    image = background * (1.0 - alpha)[..., None] + goods_rgb
    return Image.fromarray(np.clip(image + 0.5, 0, 255).astype(np.uint8)), alpha


def _placement(goods: Goods, look: Look) -> tuple[np.ndarray, np.ndarray]:
    """Goods units -> image units in [-1, 1]: `p @ matrix + shift`, so that the goods stay in the frame."""
    points = np.concatenate([mark.points for mark in goods.marks])
    low, high = points.min(axis=0), points.max(axis=0)
    half = (high - low) / 2 * np.array([look.stretch, 1.0])
    angle = np.deg2rad(look.tilt)
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    scale = look.size / half.max()
    matrix = np.diag([-look.stretch if look.flip else look.stretch, 1.0]) @ rotation * scale
    placed = (points - (low + high) / 2) @ matrix
    room = np.maximum(0.96 - np.abs(placed).max(axis=0), 0.0)
    shift = np.asarray(look.center) * np.minimum(room, 0.28) - (low + high) / 2 @ matrix
    return matrix, shift


def _to_pixels(
    points: np.ndarray, matrix: np.ndarray, shift: np.ndarray, side: int
) -> list[tuple[float, float]]:
    return [tuple(p) for p in ((points @ matrix + shift + 1.0) * (side / 2)).tolist()]


def _goods_coordinates(matrix: np.ndarray, shift: np.ndarray, image_size: int) -> np.ndarray:
    """(S, S, 2): goods units of each pixel's centre."""
    axis = (np.arange(image_size) + 0.5) * (2.0 / image_size) - 1.0
    xy = np.stack(np.meshgrid(axis, axis), axis=-1)
    return (xy - shift) @ np.linalg.inv(matrix)


def _material_weights(
    goods: Goods, look: Look, matrix: np.ndarray, shift: np.ndarray, image_size: int
) -> np.ndarray:
    side = image_size * SUPERSAMPLE
    canvas = Image.new("CMYK", (side, side))
    draw = ImageDraw.Draw(canvas)
    unit = float(np.sqrt(abs(np.linalg.det(matrix)))) * side / 2  # pixels of the canvas in a goods unit
    line = look.outline * side / 64
    for mark in goods.marks:
        _draw_mark(draw, mark, _to_pixels(mark.points, matrix, shift, side), unit, line)
    return np.asarray(canvas.reduce(SUPERSAMPLE), dtype=np.float64) / 255.0


def _draw_mark(draw: ImageDraw.ImageDraw, mark: Mark, points: list, unit: float, line: float) -> None:
    outline = line if mark.outlined else 0.0
    if mark.width > 0:
        width = max(mark.width * unit, 1.0)
        if outline > 0:
            _stroke(draw, points, width + outline, _LINE)
        _stroke(draw, points, width - outline if outline > 0 else width, _MATERIALS[mark.material])
        return
    draw.polygon(points, fill=_MATERIALS[mark.material])
    if outline > 0:
        _stroke(draw, [*points, points[0]], outline, _LINE)


def _stroke(draw: ImageDraw.ImageDraw, points: list, width: float, fill: tuple[int, ...]) -> None:
    """A line with round ends and joints."""
    width = max(round(width), 1)
    draw.line(points, fill=fill, width=width)
    if width > 3:
        radius = width / 2 - 0.5
        for x, y in points:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _material_colors(look: Look, uv: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the body, (S, S, 3) with its pattern, and of inner, trim and line, (3, 3)."""
    base, accent = np.asarray(look.color, float), np.asarray(look.accent, float)
    body = base + _pattern(look, uv)[..., None] * (accent - base)
    line = np.clip(base * 0.54 - 4, 0, 255)
    return body, np.stack([base * 0.78, np.asarray(look.trim, float), line])


def _pattern(look: Look, uv: np.ndarray) -> np.ndarray:
    """(S, S) in [0, 1]: how much of the accent shows, with soft edges; less than half of the area."""
    if look.pattern == "plain":
        return np.zeros(uv.shape[:2])
    angle = np.deg2rad(look.pattern_angle)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    pq = uv @ turn / look.pattern_period  # periods
    pixel = float(np.abs(uv[0, 1] - uv[0, 0]).max()) / look.pattern_period
    if look.pattern == "striped":
        distance = 0.20 - np.abs((pq[..., 1] + 0.25) % 1.0 - 0.5)
        return np.clip(distance / pixel + 0.5, 0, 1)
    if look.pattern == "dotted":
        row = np.floor(pq[..., 1])
        local = np.stack([(pq[..., 0] + 0.5 * (row % 2)) % 1.0, pq[..., 1] - row], axis=-1) - 0.5
        return np.clip((0.29 - np.hypot(local[..., 0], local[..., 1])) / pixel + 0.5, 0, 1)
    raise ValueError(f"pattern must be plain, striped or dotted, not {look.pattern!r}")


def _blurred(field: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur of a field in [0, 1]; `radius` in pixels."""
    image = Image.fromarray((np.clip(field, 0, 1) * 255 + 0.5).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float64) / 255.0


def _slopes(height: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Down and right per image side, over a step wide enough that the 8 bits of the blur leave no grain."""
    size = height.shape[0]
    step = max(size // 32, 1)
    padded = np.pad(height, step, mode="edge")
    down = padded[2 * step :, step:-step] - padded[: -2 * step, step:-step]
    right = padded[step:-step, 2 * step :] - padded[step:-step, : -2 * step]
    return down * (size / (2 * step)), right * (size / (2 * step))


def _light(goods: Goods, look: Look, alpha: np.ndarray, matrix: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """(S, S): light on the goods, 0 neutral, negative darker: a cushion-like relief plus the creases."""
    size = alpha.shape[0]
    height = _blurred(alpha, size * 0.07)
    angle = np.deg2rad(look.light)
    slope_y, slope_x = _slopes(height)
    relief = (np.cos(angle) * -slope_x + np.sin(angle) * slope_y) * 0.075
    side = size * 2
    canvas = Image.new("L", (side, side), 128)
    draw = ImageDraw.Draw(canvas)
    unit = float(np.sqrt(abs(np.linalg.det(matrix)))) * side / 2
    for crease in goods.creases:
        fill = round(128 + 127 * float(np.clip(crease.strength * look.depth, -1, 1)))
        _stroke(draw, _to_pixels(crease.points, matrix, shift, side), crease.width * unit, (fill,))
    canvas = canvas.reduce(2).filter(ImageFilter.GaussianBlur(size / 50))
    return look.depth * relief + (np.asarray(canvas, dtype=np.float64) - 128.0) / 127.0


def _lit(rgb: np.ndarray, alpha: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Darker multiplies; lighter moves a part of the way to white, which also shows on black goods."""
    dark = 1.0 + np.minimum(light, 0.0)[..., None]
    bright = np.clip(light, 0.0, 1.0)[..., None] * 0.75
    return rgb * dark * (1.0 - bright) + 255.0 * alpha[..., None] * bright


def _shadow(goods: Goods, look: Look, alpha: np.ndarray, matrix: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """(S, S) in [0, 1]: how much of the background's light is taken away."""
    size = alpha.shape[0]
    angle = np.deg2rad(look.light)
    away = np.array([-np.cos(angle), np.sin(angle)]) * size * 0.035
    dx, dy = (round(float(a)) for a in away)
    cast = np.zeros_like(alpha)
    cast[max(dy, 0) : size + min(dy, 0), max(dx, 0) : size + min(dx, 0)] = alpha[
        max(-dy, 0) : size + min(-dy, 0), max(-dx, 0) : size + min(-dx, 0)
    ]
    shadow = _blurred(cast, size * 0.035) * (0.22 if goods.standing else 0.32)
    if not goods.standing:
        return shadow
    points = np.concatenate([m.points for m in goods.marks if m.material != "hole"]) @ matrix + shift
    foot = points[points[:, 1] > points[:, 1].max() - 0.12]
    canvas = Image.new("L", (size, size))
    left, right, y = ((v + 1) * size / 2 for v in (foot[:, 0].min(), foot[:, 0].max(), points[:, 1].max()))
    ImageDraw.Draw(canvas).ellipse((left - 2, y - size * 0.05, right + 2, y + size * 0.03), fill=255)
    contact = _blurred(np.asarray(canvas, dtype=np.float64) / 255.0, size * 0.025) * 0.42
    return np.maximum(shadow, contact)


def _background(look: Look, image_size: int) -> np.ndarray:
    """(S, S, 3) in 0..255."""
    axis = (np.arange(image_size) + 0.5) * (2.0 / image_size) - 1.0
    x, y = np.meshgrid(axis, axis)
    if look.background == "wood":
        return _wood(look, x, y)
    if look.background == "white":
        center, span = np.array([250.0, 250.0, 249.0]), 4.0
    elif look.background == "grey":
        center, span = np.array([176.0, 178.0, 181.0]) + 18.0 * look.background_tone, 12.0
    else:
        raise ValueError(f"background must be white, grey or wood, not {look.background!r}")
    angle = np.deg2rad(look.background_angle)
    slope = (np.cos(angle) * x + np.sin(angle) * y) / 1.4
    return np.minimum(center + (span * slope)[..., None], 255.0)


def _wood(look: Look, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Planks of light oak with fine grain, along the rows or along the columns."""
    along, across = (x, y) if look.background_angle % 180 < 120 else (y, x)
    phase = look.background_phase
    plank = np.floor(across * 1.7 + phase)
    seam = np.abs((across * 1.7 + phase) % 1.0 - 0.5) > 0.475
    offset = np.sin(plank * 12.9898 + phase * 78.233)  # a number in [-1, 1] for each plank
    warp = 0.35 * np.sin(along * (1.3 + 0.4 * offset) + plank * 2.1 + phase)
    grain = np.sin((across * 9 + warp * 3) + plank * 4.0) + 0.6 * np.sin((across * 23 + warp * 8) + phase * 9)
    tone = 1.0 + 0.05 * look.background_tone + 0.035 * offset + 0.022 * grain - 0.16 * seam
    return np.array([219.0, 190.0, 152.0]) * tone[..., None]
