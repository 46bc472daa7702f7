"""The summary of an arena as a table in Markdown: a row a measure, a column a system.

    python -m evaluation.arena_table out/arena
    python -m evaluation.arena_table out/arena --language zh > table.md

Quality with 95 % intervals over prompts, best of n by the ranker, and what each system costs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from common.config import command, parse_options
from common.files import read_json
from common.text.language import Language, Words, words_of

METRICS = "metrics.json"
SHARES = ("category right", "colour right", "colour right, pixels", "all that is named right")
OTHERS = (  # start of a metric's name, how it is called, digits
    ("FID", "FID", 1),
    ("frechet_distance", "Frechet distance", 1),
    ("coverage", "coverage", 3),
    ("diversity", "diversity of a prompt", 3),
)


@dataclass(frozen=True)
class Options:
    """Print the table of an arena."""

    out: Annotated[Path, tyro.conf.Positional] = Path("out/arena")
    """Directory of an arena."""
    language: Language = "en"
    """zh, en, or auto, which follows the locale."""


@dataclass(frozen=True)
class Row:
    """A measure of every system; None where there is none."""

    name: str
    cells: tuple[str | None, ...]
    best: frozenset[int] = frozenset()
    real: str | None = None


def summary(found: dict[str, Any], words: Words) -> list[Row]:
    """Rows of what metrics.json of an arena holds."""
    systems = list(found["systems"].values())
    rows = [*_shares(systems, words), *_others(systems, words)]
    costs = [system["costs"] for system in systems]
    seconds = [system["seconds_per_image"] for system in systems]
    rows.append(_row(words("seconds an image"), seconds, "{:.3g}", False))
    memory = [None if c.get("memory_bytes") is None else c["memory_bytes"] / 2**20 for c in costs]
    rows.append(_row(words("peak memory, MiB"), memory, "{:,.0f}", False))
    count = [None if c.get("parameters") is None else c["parameters"] / 1e6 for c in costs]
    rows.append(_row(words("parameters, million"), count, "{:.1f}", None))
    rows.append(_row(words("training hours"), [c.get("training_hours") for c in costs], "{:.2f}", None))
    rows.append(_row(words("images seen in training"), [c.get("images_seen") for c in costs], "{:,}", None))
    return [row for row in rows if any(cell is not None for cell in row.cells)]


def hours_notes(found: dict[str, Any]) -> list[str]:
    """Which parts are not counted in the hours, `SYSTEM: ...`."""
    systems = found["systems"].items()
    return [f"{name}: {s['costs']['note']}" for name, s in systems if s["costs"].get("note")]


def _shares(systems: Sequence[dict[str, Any]], words: Words) -> list[Row]:
    """What the judge finds right, by the width of the choice."""
    rows = []
    for name in SHARES:
        widths = sorted(
            {p["width"] for s in systems for p in s["best_of"].get(name, {"points": ()})["points"]}
        )
        for width in widths:
            points = [
                next(
                    (p for p in s["best_of"].get(name, {"points": ()})["points"] if p["width"] == width), None
                )
                for s in systems
            ]
            shown = words(name) if width == 1 else f"{words(name)}, {words('best of {n}').format(n=width)}"
            cells = [None if p is None else _percent(p["value"]) for p in points]
            values = [None if p is None else p["value"]["value"] for p in points]
            rows.append(Row(shown, tuple(cells), best_of(values, True)))
    return rows


def _others(systems: Sequence[dict[str, Any]], words: Words) -> list[Row]:
    rows = []
    for start, name, digits in OTHERS:
        metrics = [next((m for m in s["metrics"] if m["name"].startswith(start)), None) for s in systems]
        first = next((m for m in metrics if m), None)
        if first is None:
            continue
        cells = [None if m is None else _interval(m, digits) for m in metrics]
        values = [None if m is None else m["value"] for m in metrics]
        better = first["higher_is_better"]
        direction = "" if better is None else f" ({words('higher' if better else 'lower')})"
        real = None if first["real"] is None else f"{first['real']:.{digits}f}"
        rows.append(Row(words(name) + direction, tuple(cells), best_of(values, better), real))
    return rows


def _row(name: str, values: Sequence[float | None], form: str, higher: bool | None) -> Row:
    cells = tuple(None if v is None else form.format(v) for v in values)
    return Row(name, cells, best_of(values, higher))


def best_of(values: Sequence[float | None], higher: bool | None) -> frozenset[int]:
    """Places of the best value; none where all are equal, or no direction is better."""
    known = {value for value in values if value is not None}
    if higher is None or len(known) < 2:
        return frozenset()
    best = max(known) if higher else min(known)
    return frozenset(i for i, value in enumerate(values) if value == best)


def _percent(value: dict[str, float]) -> str:
    return f"{value['value']:.1%} [{value['low']:.0%}, {value['high']:.0%}]"


def _interval(metric: dict[str, Any], digits: int) -> str:
    text = f"{metric['value']:.{digits}f}"
    if metric["low"] is None or metric["high"] is None:
        return text
    return f"{text} [{metric['low']:.{digits}f}, {metric['high']:.{digits}f}]"


def header_of(found: dict[str, Any], words: Words) -> list[str]:
    """Names of the columns."""
    return [words("metric"), *found["systems"], words("real images")]


def to_markdown(found: dict[str, Any], words: Words) -> str:
    """The table, and below it what it is over."""
    header = header_of(found, words)
    lines = [header, ["---"] * len(header)]
    for row in summary(found, words):
        cells = ["-" if c is None else f"**{c}**" if i in row.best else c for i, c in enumerate(row.cells)]
        lines.append([row.name, *cells, row.real or ""])
    options = found["options"]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    told = (
        f"{found['prompts']} {words('prompts')}, {options['num_images']} {words('images of each prompt')}, "
        f"{words('seed')} {options['seed']}"
    )
    notes = hours_notes(found)
    hours = f" {words('Hours: {notes}.').format(notes='; '.join(notes))}" if notes else ""
    return f"{table}\n\n{told}.{hours}\n"


def read_arena(out: Path) -> dict[str, Any]:
    """What metrics.json of an arena holds. Raises FileNotFoundError or ValueError where there is none."""
    path = out / METRICS if out.is_dir() else out
    if not path.is_file():
        raise FileNotFoundError(f"no arena in {out}: run python -m evaluation.arena --out {out}")
    found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("systems"), dict):
        raise ValueError(f"{path} was not written by evaluation.arena")
    return found


@command
def main(argv: Sequence[str] | None = None) -> str:
    """Prints the table; returns it."""
    options = parse_options(Options, argv, description=__doc__)
    text = to_markdown(read_arena(options.out), words_of(options.language, "arena"))
    print(text, end="")
    return text


if __name__ == "__main__":
    main()
