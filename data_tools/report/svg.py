"""Small charts as inline SVG. Text stays text: the reader's own fonts draw Chinese, and it can be searched and copied.

Not matplotlib: it measures Chinese labels with whatever font the machine has and cuts them where that lacks the glyphs.
"""

import html
import math
from collections.abc import Sequence

import numpy as np

SERIES = (
    "#4c78a8",
    "#e45756",
    "#54a24b",
    "#b279a2",
    "#f58518",
    "#439894",
    "#9d755d",
    "#79706e",
)  # of several curves
INK, SOFT, FILL, MARK = "#333", "#888", "#4c78a8", "#c4302b"
RGB = tuple[int, int, int]
_FONT = 12


def text_width(text: str) -> float:
    """Pixels, roughly: CJK characters are square, others about half as wide."""
    return sum(_FONT if ord(c) > 0x2E7F else _FONT * 0.66 for c in text)


def colour(rgb: Sequence[float]) -> str:
    """`#rrggbb` of levels 0..255."""
    return "#" + "".join(f"{max(0, min(255, round(v))):02x}" for v in rgb)


def _svg(width: float, height: float, body: Sequence[str], label: str) -> str:
    view = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    name = html.escape(label, quote=True)
    return f'<svg {view} role="img" aria-label="{name}" font-size="{_FONT}">{"".join(body)}</svg>'


def _text(x: float, y: float, text: str, anchor: str = "start", fill: str = INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}">{html.escape(text)}</text>'


def _rect(x: float, y: float, width: float, height: float, fill: str, tip: str, stroke: str = "none") -> str:
    geometry = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}"'
    return f'<rect {geometry} fill="{fill}" stroke="{stroke}"><title>{html.escape(tip)}</title></rect>'


def _line(x1: float, y1: float, x2: float, y2: float, stroke: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}"/>'


def short(value: float) -> str:
    """A number as people write it on an axis: 1200 -> 1200, 0.25 -> 0.25, 3e6 -> 3M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            scale = size if unit != "k" else 1e3
            return f"{value / scale:.3g}{unit}"
    return f"{value:.4g}"


def bars(rows: Sequence[tuple[str, float]], label: str, fills: Sequence[str] = (), width: int = 560) -> str:
    """Horizontal bars, one a row, with the label left and the number right."""
    if not rows:
        return ""
    left = min(max(text_width(name) for name, _ in rows) + 8, width * 0.5)
    right = max(text_width(short(value)) for _, value in rows) + 8
    most = max(value for _, value in rows) or 1
    step, body = 20, []
    for i, (name, value) in enumerate(rows):
        y, size = i * step, (width - left - right) * value / most
        body.append(_text(left - 6, y + 14, name, "end"))
        fill = fills[i] if fills else FILL
        stroke = "#ccc" if fills else "none"
        body.append(_rect(left, y + 3, max(size, 1), step - 6, fill, f"{name}: {value:g}", stroke))
        body.append(_text(left + max(size, 1) + 4, y + 14, short(value), fill=SOFT))
    return _svg(width, step * len(rows) + 2, body, label)


def histogram(
    values: np.ndarray,
    label: str,
    bins: int = 40,
    limits: tuple[float, float] | None = None,
    mark: float | None = None,
    fill: str = FILL,
    width: int = 560,
    height: int = 190,
) -> str:
    """Counts (N,) in equal bins; whole numbers get whole bins, outliers go to the ends; `mark` draws a red line."""
    if not len(values):
        return ""
    low, high = limits or (float(values.min()), float(values.max()))
    whole = np.issubdtype(values.dtype, np.integer)
    if whole:
        size = max(1, math.ceil((high - low + 1) / bins))
        edges = np.arange(low, high + size + 1, size) - 0.5 * (size == 1)
    else:
        edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    left, bottom, top = text_width(short(int(counts.max()))) + 8, 38, 8
    across, tall = width - left - 10, height - bottom - top

    def at(value: float) -> float:
        return left + across * (value - edges[0]) / (edges[-1] - edges[0])

    body = [_line(left, top + tall, width - 10, top + tall, SOFT)]
    for i, count in enumerate(counts):
        size = tall * count / counts.max()
        single = whole and edges[1] - edges[0] == 1
        span = short(edges[i] + 0.5) if single else f"{short(edges[i])} - {short(edges[i + 1])}"
        wide = across / len(counts) - 1
        body.append(_rect(at(edges[i]) + 0.5, top + tall - size, wide, size, fill, f"{span}: {count}"))
    body.append(_text(left - 4, top + 10, short(int(counts.max())), "end", SOFT))
    for tick in _ticks(edges[0], edges[-1]):
        body.append(_line(at(tick), top + tall, at(tick), top + tall + 4, SOFT))
        body.append(_text(at(tick), top + tall + 17, short(tick), "middle", SOFT))
    if mark is not None and edges[0] <= mark <= edges[-1]:
        body.append(_line(at(mark), top, at(mark), top + tall, MARK))
        body.append(_text(at(mark) + 3, top + 10, short(mark), fill=MARK))
    body.append(_text(left + across / 2, height - 4, label, "middle"))
    return _svg(width, height, body, label)


def _ticks(low: float, high: float, count: int = 7) -> list[float]:
    """Round numbers inside the range."""
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw)
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step) + 1)]


def scatter(
    x: np.ndarray, y: np.ndarray, x_label: str, y_label: str, side: int = 320, most: int = 3000
) -> str:
    """Points on equal scales from 0; more than `most` are thinned evenly."""
    if not len(x):
        return ""
    pick = np.linspace(0, len(x) - 1, min(len(x), most)).astype(int)
    top = float(max(x.max(), y.max(), 1)) * 1.05
    left, bottom = 48, 38
    size = side - left - 10

    def to_pixels(value: float) -> float:
        return size * value / top

    body = [_line(left, 8 + size, left + size, 8 + size, SOFT), _line(left, 8, left, 8 + size, SOFT)]
    for tick in _ticks(0, top, 5):
        body.append(_text(left + to_pixels(tick), 8 + size + 15, short(tick), "middle", SOFT))
        body.append(_text(left - 4, 12 + size - to_pixels(tick), short(tick), "end", SOFT))
    points = "".join(
        f'<circle cx="{left + to_pixels(a):.1f}" cy="{8 + size - to_pixels(b):.1f}" r="2"/>'
        for a, b in sorted({(float(x[i]), float(y[i])) for i in pick})
    )
    body.append(f'<g fill="{FILL}" fill-opacity="0.35">{points}</g>')
    body.append(_text(left + size / 2, 8 + size + 32, f"{x_label} / {y_label}", "middle"))
    return _svg(side, 8 + size + bottom, body, f"{x_label} and {y_label}")


def strip(colours: Sequence[RGB], label: str, width: int = 560, height: int = 36) -> str:
    """Colours side by side in the given order."""
    if not colours:
        return ""
    size = width / len(colours)
    body = [_rect(i * size, 0, size + 0.3, height, colour(c), colour(c)) for i, c in enumerate(colours)]
    return _svg(width, height, body, label)


def curves(
    series: Sequence[tuple[str, Sequence[Sequence[float]]]],
    x_label: str,
    y_label: str,
    log_x: bool = False,
    width: int = 560,
    height: int = 300,
) -> str:
    """Named curves of points (x, y, low, high), low and high the ends of an interval; a legend below.

    `log_x`: equal steps for equal ratios of x, which must be positive.
    """
    points = np.array([p for _, curve in series for p in curve], dtype=np.float64)
    if not len(points):
        return ""
    low, high = float(points[:, 1:].min()), float(points[:, 1:].max())
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - room, high + room
    xs = np.unique(points[:, 0])
    first, last = (np.log(xs[[0, -1]]) if log_x else xs[[0, -1]]).tolist()
    left, bottom, top = 56, 42, 10
    across, tall = width - left - 16, height - bottom - top

    def at(x: float, y: float) -> tuple[float, float]:
        share = ((math.log(x) if log_x else x) - first) / (last - first) if last > first else 0.5
        return left + across * share, top + tall * (high - y) / (high - low)

    body = [
        _line(left, top, left, top + tall, SOFT),
        _line(left, top + tall, left + across, top + tall, SOFT),
    ]
    for tick in _ticks(low, high, 5):
        y = at(xs[0], tick)[1]
        body += [_line(left, y, left + across, y, "#eee"), _text(left - 5, y + 4, short(tick), "end", SOFT)]
    for tick in xs if len(xs) <= 10 else _ticks(xs[0], xs[-1]):
        body.append(_text(at(tick, low)[0], top + tall + 16, short(tick), "middle", SOFT))
    for i, (name, curve) in enumerate(series):
        body.append(_curve([(at(p[0], p[1]), at(p[0], p[2]), at(p[0], p[3]), p) for p in curve], name, i))
    body.append(_text(left + across / 2, height - 6, x_label, "middle"))
    body.append(_text(left + 6, top + 10, y_label))
    legend, x = [], left
    for i, (name, _) in enumerate(series):
        legend.append(_rect(x, height + 6, 12, 12, SERIES[i % len(SERIES)], name))
        legend.append(_text(x + 17, height + 16, name))
        x += 17 + text_width(name) + 16
    return _svg(max(width, x), height + 24, body + legend, f"{y_label} over {x_label}")


def _curve(points: Sequence[tuple], name: str, i: int) -> str:
    """A band, a line and a dot a point, each with its numbers as a tip."""
    colour_of = SERIES[i % len(SERIES)]
    band = [low for _, low, _, _ in points] + [high for _, _, high, _ in reversed(points)]
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in band)
    path = " ".join(f"{x:.1f},{y:.1f}" for (x, y), *_ in points)
    parts = [f'<polygon points="{corners}" fill="{colour_of}" fill-opacity="0.13"/>']
    parts.append(f'<polyline points="{path}" fill="none" stroke="{colour_of}" stroke-width="2"/>')
    for (x, y), (_, y_low), (_, y_high), (value_x, value, low, high) in points:
        tip = html.escape(f"{name}, {short(value_x)}: {value:.4g} [{low:.4g}, {high:.4g}]")
        parts.append(_line(x, y_low, x, y_high, colour_of))
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour_of}"><title>{tip}</title></circle>'
        )
    return "".join(parts)
