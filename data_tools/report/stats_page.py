"""The page of data_tools.stats: tables, plots and example images, all inside one file."""

import colorsys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.console.html import data_url, render
from common.text.language import Words
from data_tools.images.decode import BadImage, decode, encode, resize
from data_tools.ingest.records import Record
from data_tools.report import svg
from data_tools.report.facts import FORMATS, IMAGE, Facts, aspects
from data_tools.report.likeness import COLOURS, NEAR, Likeness, Row
from data_tools.rules.lexicon import load_lexicon

THUMBNAIL = 112  # pixels, longest side
TOP = 24  # bars of a chart


@dataclass(frozen=True)
class Report:
    """What the page is made of."""

    title: str
    facts: Sequence[Facts]
    alike: Likeness
    shown: Mapping[str, list[Row]]
    """Rows to show, by why."""
    records: Mapping[Row, Record]
    """The records at these rows."""
    numbers: Mapping[str, Any]
    max_text_len: int


@dataclass(frozen=True)
class Chart:
    """An inline SVG ("": none) under a heading."""

    svg: str
    title: str = ""
    said: str = ""
    """Small, behind the title."""


@dataclass(frozen=True)
class Section:
    """A heading, a text, charts side by side, a note."""

    title: str
    text: str = ""
    charts: Sequence[Chart] = ()
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """An image of a gallery: its address, "" where it cannot be decoded for `reason`."""

    caption: str
    name: str
    url: str = ""
    width: int = 0
    height: int = 0
    reason: str = ""


def page(report: Report, words: Words) -> str:
    """The whole page."""
    facts = report.facts
    share = report.numbers["picture_share"]
    drawn = words(" ({share} of them, by the hash of their keys)", share=f"{share:.1%}") if share < 1 else ""
    sections = (
        _captions(report.max_text_len, facts, words),
        _words(facts, words),
        _fields(facts, words),
        _sizes(facts, words),
        _colours(facts, words),
    )
    return render(
        "data_tools/templates/stats.html",
        words,
        title=report.title,
        numbers=report.numbers,
        kept=sum(fact.kept for fact in facts),
        measured=sum(len(fact.rows) for fact in facts),
        drawn=drawn,
        overview=_overview(report.numbers, words),
        sections=[section for section in sections if section],
        faults=_faults(report, words),
        duplicates=_duplicates(report.alike, words),
        pairs=[(bits, _gallery((one, other), report)) for bits, one, other in report.alike.nearest],
        samples=_gallery(report.shown["sample"], report),
    )


def _all(facts: Sequence[Facts]) -> np.ndarray:
    return np.concatenate([fact.images for fact in facts]) if facts else np.zeros(0, IMAGE)


def _joined(facts: Sequence[Facts], name: str, kind: type) -> np.ndarray:
    return np.concatenate([np.array(getattr(fact, name), kind) for fact in facts])


def _overview(numbers: Mapping[str, Any], words: Words) -> list[tuple[str, list[Any]]]:
    """Rows of a name and its values in the splits."""
    rows = []
    for label, value in (
        ("samples", lambda s: s["kept"]),
        ("unreadable rows", lambda s: _counts(s["dropped"])),
        ("without caption", lambda s: s["without_caption"]),
        ("with several captions", lambda s: s["several_captions"]),
        ("duplicate captions", lambda s: s["repeated_captions"]),
        ("caption characters, median / largest", lambda s: _pair(s["caption_chars"], "median", "max")),
        ("caption tokens, median / largest", lambda s: _pair(s["caption_tokens"], "median", "max")),
        (
            "unknown tokens",
            lambda s: f"{s['unknown_token_share']:.3%}" if s["caption_tokens"] else words("not counted"),
        ),
        ("shorter side in pixels, smallest / median", lambda s: _pair(s["shorter_side"], "min", "median")),
        ("mean colour R G B, 0 to 1", lambda s: _rgb(s["mean_rgb"])),
        ("background colour R G B, 0 to 1", lambda s: _rgb(s["ground_rgb"])),
        (
            "white pixels of an image, median",
            lambda s: f"{s['white_area']['median']:.1%}" if s["white_area"] else "-",
        ),
        ("line drawings, unreadable ones", lambda s: _drawings(s["drawings"])),
        ("lines' share of a drawing, median / largest", lambda s: _density(s["drawings"])),
        ("ids, missing between them", lambda s: _ids(s["ids"])),
        ("white backgrounds", lambda s: f"{s['white_grounds']} of {s['pictures']}" if s["pictures"] else "-"),
    ):
        rows.append((label, [value(split) for split in numbers["splits"].values()]))
    return rows


def _drawings(found: Mapping[str, Any] | None) -> str:
    return f"{found['count']}, {found['unreadable']}" if found else "-"


def _density(found: Mapping[str, Any] | None) -> str:
    spread = found["line_density"] if found else None
    return f"{spread['median']:.1%} / {spread['max']:.1%}" if spread else "-"


def _ids(found: Mapping[str, Any] | None) -> str:
    if not found:
        return "-"
    some = ", ".join(map(str, found["missing_first"][:5]))
    more = f" ({some}{' ...' if found['missing'] > 5 else ''})" if some else ""
    return f"{found['first']} to {found['last']}, {found['missing']}{more}"


def _counts(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())) or "0"


def _pair(spread: Mapping[str, float] | None, one: str, other: str) -> str:
    return f"{spread[one]:g} / {spread[other]:g}" if spread else "-"


def _rgb(values: Sequence[float] | None) -> str:
    return " ".join(f"{v:.3f}" for v in values) if values else "-"


def _captions(max_text_len: int, facts: Sequence[Facts], words: Words) -> Section:
    chars, tokens = _joined(facts, "chars", np.int64), _joined(facts, "tokens", np.int64)
    if not len(chars):
        return Section("Captions", words("There are none."))
    limits = (0, float(np.percentile(chars, 99.5)))
    charts = [Chart(svg.histogram(chars, words("characters a caption"), limits=limits))]
    text, note = "", words("Token lengths need --tokenizer.")
    if len(tokens):
        room = max_text_len - 2
        limits = (0, max(float(np.percentile(tokens, 99.5)), room + 2))
        label = words("tokens a caption; red: the longest that fits")
        charts.append(Chart(svg.histogram(tokens, label, limits=limits, mark=room)))
        unknown = sum(fact.captions_with_unknown for fact in facts)
        cut = int((tokens > room).sum())
        note = ""
        text = words(
            "{cut} captions ({share}) have more than {room} tokens and would be cut at max_text_len {most}; {unknown} "
            "({unknown_share}) hold an unknown token.",
            cut=cut,
            share=f"{cut / len(tokens):.2%}",
            room=room,
            most=max_text_len,
            unknown=unknown,
            unknown_share=f"{unknown / len(tokens):.2%}",
        )
    han = _joined(facts, "han", np.float64)
    charts.append(Chart(svg.histogram(han, words("Chinese share of the letters"), bins=20, limits=(0, 1))))
    return Section("Captions", text, charts, note)


def _words(facts: Sequence[Facts], words: Words) -> Section | None:
    counted = sum((fact.words for fact in facts), Counter())
    captions = sum(len(fact.chars) for fact in facts)
    if not counted:
        return None
    most = svg.bars(counted.most_common(TOP), words("words"), width=520)
    charts = [Chart(most, words("Most frequent words"))]
    named = sum((fact.named for fact in facts), Counter())
    for kind in load_lexicon().classes:
        counts = sum((fact.attributes.get(kind, Counter()) for fact in facts), Counter())
        if counts:
            share, rest = f"{named[kind] / captions:.1%}", f"{1 - named[kind] / captions:.1%}"
            said = words("named in {share} of captions, unknown in {rest}", share=share, rest=rest)
            charts.append(Chart(svg.bars(counts.most_common(TOP), kind, width=520), words(kind), said))
    return Section("Words and attributes", words("{count} different words.", count=len(counted)), charts)


def _fields(facts: Sequence[Facts], words: Words) -> Section | None:
    charts = []
    for name in dict.fromkeys(name for fact in facts for name in fact.fields):
        counts = sum((fact.fields.get(name, Counter()) for fact in facts), Counter())
        rest = words(", the first {top} of them", top=TOP) if len(counts) > TOP else ""
        said = words("{count} values", count=len(counts)) + rest
        charts.append(Chart(svg.bars(counts.most_common(TOP), name, width=520), name, said))
    return Section("Labels and other fields", charts=charts) if charts else None


def _sizes(facts: Sequence[Facts], words: Words) -> Section | None:
    images = _all(facts)
    if not len(images):
        return None
    shorter = np.minimum(images["width"], images["height"]).astype(np.int64)
    formats = Counter(FORMATS[i] for i in images["format"])
    kib = images["bytes"] / 1024
    charts = [
        svg.scatter(images["width"], images["height"], words("width"), words("height in pixels")),
        svg.histogram(
            shorter, words("shorter side in pixels"), limits=(0, float(np.percentile(shorter, 99.5)))
        ),
        svg.histogram(
            np.log2(aspects(images)), words("log2 of width over height: 0 is square"), limits=(-2, 2)
        ),
        svg.histogram(kib, words("file size in KiB"), limits=(0, np.percentile(kib, 99.5))),
        svg.bars(formats.most_common(), words("formats"), width=320),
    ]
    return Section("Image sizes", charts=[Chart(chart) for chart in charts])


def _colours(facts: Sequence[Facts], words: Words) -> Section | None:
    images = _all(facts)
    if not len(images):
        return None
    means, backgrounds = images["mean"], images["background"]
    bright, background = (
        words("mean brightness of an image, 0 to 1"),
        words("brightness of the background, 0 to 1"),
    )
    ring = words("white share of the outer ring")
    charts = [
        Chart(svg.strip(_palette(means), words("mean colours")), words("Mean colours of images")),
        Chart(
            svg.strip(_palette(backgrounds), words("background colours")), words("Colours of the backgrounds")
        ),
        Chart(_background_bars(backgrounds, words), words("Most frequent backgrounds, as shares")),
        Chart(svg.histogram(means.mean(1) / 255, bright, limits=(0, 1))),
        Chart(svg.histogram(backgrounds.mean(1) / 255, background, limits=(0, 1))),
        Chart(svg.histogram(images["white"], ring, bins=20, limits=(0, 1))),
    ]
    said = words("{share} stand on a white background.", share=f"{(images['white'] >= 0.9).mean():.1%}")
    return Section("Colours and backgrounds", said, charts)


def _palette(colours: np.ndarray, count: int = 140) -> list[svg.RGB]:
    """A fair sample, greys first by brightness, then by hue."""
    picked = colours[np.linspace(0, len(colours) - 1, min(count, len(colours))).astype(int)]

    def order(rgb: Sequence[float]) -> tuple[float, ...]:
        hue, saturation, value = colorsys.rgb_to_hsv(*(v / 255 for v in rgb))
        return (0.0, value, 0.0) if saturation < 0.15 else (1.0, round(hue * 12) / 12, value)

    return [tuple(round(float(v)) for v in rgb) for rgb in sorted(picked.tolist(), key=order)]


def _background_bars(backgrounds: np.ndarray, words: Words) -> str:
    """The most frequent backgrounds, in steps of 32 levels."""
    cells, counts = np.unique((backgrounds // 32).astype(np.int64), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:12]
    colours = [svg.colour(np.minimum(cells[i] * 32 + 16, 255)) for i in order]
    rows = [(name, float(counts[i]) / len(backgrounds)) for name, i in zip(colours, order, strict=True)]
    return svg.bars(rows, words("backgrounds"), colours, width=420)


def _faults(report: Report, words: Words) -> list[tuple[str, list[Cell]]]:
    meaning = {
        "near_constant": "blank or nearly so",
        "blurred": "blurred or enlarged",
        "watermark": "with a repeated pattern: an overlay, or a print of the goods",
    }
    flags = report.numbers["flags"]
    return [(f"{flags[n]} {words(meaning[n])}", _gallery(report.shown[n], report)) for n in flags]


def _duplicates(alike: Likeness, words: Words) -> str:
    return words(
        "{exact} images look exactly like another one, {near} pairs nearly so (at most {bits} of 64 hash bits and "
        "{levels} of 255 levels of colour); {across} pairs lie in different splits.",
        exact=alike.exact,
        near=alike.near,
        bits=NEAR,
        levels=COLOURS,
        across=alike.across,
    )


def _gallery(rows: Sequence[Row], report: Report) -> list[Cell]:
    return [_cell(report.records[row], report.facts[row[0]].split) for row in rows if row in report.records]


def _cell(record: Record, split: str) -> Cell:
    texts = (record.captions[0][:60] if record.captions else "", f"{record.key} ({split})")
    try:
        image = resize(decode(record.image, near=2 * THUMBNAIL), "longest", THUMBNAIL)
    except BadImage as error:
        return Cell(*texts, reason=error.reason)
    return Cell(*texts, data_url(encode(image, "webp", 80)), *image.size)
