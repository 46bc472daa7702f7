"""The page of data_tools.stats: tables, plots and example pictures, all inside one file."""

import base64
import colorsys
import html
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.language import Words
from data_tools.images.decode import BadImage, decode, encode, resize
from data_tools.ingest.records import Record
from data_tools.report import svg
from data_tools.report.facts import FORMATS, PICTURE, Facts, aspects
from data_tools.report.likeness import COLOURS, NEAR, Likeness, Row
from data_tools.rules.lexicon import load_lexicon

THUMBNAIL = 112  # pixels, longest side
TOP = 24  # bars of a chart
STYLE = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,"Noto Sans CJK SC","Noto Sans SC","PingFang SC","Microsoft YaHei",sans-serif;
margin:2rem auto;max-width:76rem;padding:0 1rem;color:#222;background:#fff}
svg text{font-family:inherit}h1{font-size:1.5rem;margin:0 0 .5rem}
h2{font-size:1.2rem;margin:2.2rem 0 .6rem;border-bottom:1px solid #ddd}h3{font-size:1rem;margin:1rem 0 .3rem;color:#444}
table{border-collapse:collapse}td,th{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #eee}
td:first-child,th:first-child{text-align:left}th{color:#666;font-weight:500}
.two{display:flex;flex-wrap:wrap;gap:1rem 2.5rem;align-items:flex-start}.two>div{max-width:100%;overflow-x:auto}
figure{display:inline-block;margin:0 8px 10px 0;width:112px;vertical-align:top;font-size:11px;
line-height:1.3;color:#555}
figure img{display:block;max-width:112px;background:#f4f4f4;border:1px solid #ddd}
.pair{display:inline-block;border:1px solid #eee;padding:6px 0 0 6px;margin:0 10px 10px 0}
small,.note{color:#777}p{margin:.3rem 0}
"""


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


def page(report: Report, words: Words) -> str:
    """The whole page; every text of the source is escaped."""
    title, facts = html.escape(report.title), report.facts
    body = [
        f"<h1>{title}</h1><p>{_what(report, words)}</p>",
        _overview(report.numbers, words),
        _captions(report.max_text_len, facts, words),
        _words(facts, words),
        _fields(facts, words),
        _sizes(facts, words),
        _colours(facts, words),
        _faults(report, words),
        _likeness(report, words),
        f"<h2>{words('Samples')}</h2>" + _gallery(report.shown["sample"], report),
    ]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="{words.tag}"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _what(report: Report, words: Words) -> str:
    measured, kept = sum(len(fact.rows) for fact in report.facts), sum(fact.kept for fact in report.facts)
    share = report.numbers["picture_share"]
    drawn = words(" ({share} of them, by the hash of their keys)", share=f"{share:.1%}") if share < 1 else ""
    return words(
        "Recognised as {format}. {kept} samples; {measured} pictures measured{drawn}.",
        format=f"<b>{report.numbers['format']}</b>",
        kept=kept,
        measured=measured,
        drawn=drawn,
    )


def _all(facts: Sequence[Facts]) -> np.ndarray:
    return np.concatenate([fact.pictures for fact in facts]) if facts else np.zeros(0, PICTURE)


def _joined(facts: Sequence[Facts], name: str, kind: type) -> np.ndarray:
    return np.concatenate([np.array(getattr(fact, name), kind) for fact in facts])


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = "".join(f"<th>{html.escape(str(name))}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(v))}</td>" for v in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"


def _overview(numbers: Mapping[str, Any], words: Words) -> str:
    names = list(numbers["splits"])
    rows = []
    for label, value in (
        ("samples", lambda s: s["kept"]),
        ("unreadable rows", lambda s: _counts(s["dropped"])),
        ("without caption", lambda s: s["without_caption"]),
        ("with several captions", lambda s: s["several_captions"]),
        ("captions that come again", lambda s: s["repeated_captions"]),
        ("caption characters, median / largest", lambda s: _pair(s["caption_chars"], "median", "max")),
        ("caption tokens, median / largest", lambda s: _pair(s["caption_tokens"], "median", "max")),
        (
            "unknown tokens",
            lambda s: f"{s['unknown_token_share']:.3%}" if s["caption_tokens"] else words("not counted"),
        ),
        ("shorter side in pixels, smallest / median", lambda s: _pair(s["shorter_side"], "min", "median")),
        ("mean colour R G B, 0 to 1", lambda s: _rgb(s["mean_rgb"])),
        ("ground colour R G B, 0 to 1", lambda s: _rgb(s["ground_rgb"])),
        (
            "white pixels of a picture, median",
            lambda s: f"{s['white_area']['median']:.1%}" if s["white_area"] else "-",
        ),
        ("line drawings, unreadable ones", lambda s: _drawings(s["drawings"])),
        ("lines' share of a drawing, median / largest", lambda s: _density(s["drawings"])),
        ("ids, missing between them", lambda s: _ids(s["ids"])),
        ("white grounds", lambda s: f"{s['white_grounds']} of {s['pictures']}" if s["pictures"] else "-"),
    ):
        rows.append([words(label), *(value(numbers["splits"][name]) for name in names)])
    return _table(["", *names], rows)


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


def _two(*charts: str) -> str:
    return '<div class="two">' + "".join(f"<div>{chart}</div>" for chart in charts if chart) + "</div>"


def _captions(max_text_len: int, facts: Sequence[Facts], words: Words) -> str:
    chars, tokens = _joined(facts, "chars", np.int64), _joined(facts, "tokens", np.int64)
    if not len(chars):
        return f"<h2>{words('Captions')}</h2><p>{words('There are none.')}</p>"
    charts = [
        svg.histogram(chars, words("characters a caption"), limits=(0, float(np.percentile(chars, 99.5))))
    ]
    note = f"<p class=note>{words('Token lengths need --tokenizer.')}</p>"
    if len(tokens):
        room = max_text_len - 2
        limits = (0, max(float(np.percentile(tokens, 99.5)), room + 2))
        charts.append(
            svg.histogram(
                tokens, words("tokens a caption; red: the longest that fits"), limits=limits, mark=room
            )
        )
        unknown = sum(fact.captions_with_unknown for fact in facts)
        cut = int((tokens > room).sum())
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
        note = f"<p>{text}</p>"
    han = _joined(facts, "han", np.float64)
    charts.append(svg.histogram(han, words("Chinese share of the letters"), bins=20, limits=(0, 1)))
    return f"<h2>{words('Captions')}</h2>{_two(*charts)}{note}"


def _words(facts: Sequence[Facts], words: Words) -> str:
    counted = sum((fact.words for fact in facts), Counter())
    captions = sum(len(fact.chars) for fact in facts)
    if not counted:
        return ""
    parts = [
        f"<h2>{words('Words and attributes')}</h2><p>{words('{count} different words.', count=len(counted))}</p>"
    ]
    charts = [
        f"<h3>{words('Most frequent words')}</h3>"
        + svg.bars(counted.most_common(TOP), words("words"), width=520)
    ]
    named = sum((fact.named for fact in facts), Counter())
    for kind in load_lexicon().classes:
        counts = sum((fact.attributes.get(kind, Counter()) for fact in facts), Counter())
        if counts:
            unknown = 1 - named[kind] / captions
            said = words(
                "named in {share} of captions, unknown in {rest}",
                share=f"{1 - unknown:.1%}",
                rest=f"{unknown:.1%}",
            )
            title = f"<h3>{words(kind)} <small>{said}</small></h3>"
            charts.append(title + svg.bars(counts.most_common(TOP), kind, width=520))
    return parts[0] + _two(*charts)


def _fields(facts: Sequence[Facts], words: Words) -> str:
    names = list(dict.fromkeys(name for fact in facts for name in fact.fields))
    charts = []
    for name in names:
        counts = sum((fact.fields.get(name, Counter()) for fact in facts), Counter())
        rest = words(", the first {top} of them", top=TOP) if len(counts) > TOP else ""
        values = words("{count} values", count=len(counts))
        title = f"<h3>{html.escape(name)} <small>{values}{rest}</small></h3>"
        charts.append(title + svg.bars(counts.most_common(TOP), name, width=520))
    return f"<h2>{words('Labels and other fields')}</h2>" + _two(*charts) if charts else ""


def _sizes(facts: Sequence[Facts], words: Words) -> str:
    pictures = _all(facts)
    if not len(pictures):
        return ""
    shorter = np.minimum(pictures["width"], pictures["height"]).astype(np.int64)
    formats = Counter(FORMATS[i] for i in pictures["format"])
    charts = [
        svg.scatter(pictures["width"], pictures["height"], words("width"), words("height in pixels")),
        svg.histogram(
            shorter, words("shorter side in pixels"), limits=(0, float(np.percentile(shorter, 99.5)))
        ),
        svg.histogram(
            np.log2(aspects(pictures)), words("log2 of width over height: 0 is square"), limits=(-2, 2)
        ),
        svg.histogram(
            pictures["bytes"] / 1024,
            words("file size in KiB"),
            limits=(0, np.percentile(pictures["bytes"], 99.5) / 1024),
        ),
        svg.bars(formats.most_common(), words("formats"), width=320),
    ]
    return f"<h2>{words('Picture sizes')}</h2>" + _two(*charts)


def _colours(facts: Sequence[Facts], words: Words) -> str:
    pictures = _all(facts)
    if not len(pictures):
        return ""
    white = (pictures["white"] >= 0.9).mean()
    charts = [
        f"<h3>{words('Mean colours of pictures')}</h3>"
        + svg.strip(_palette(pictures["mean"]), words("mean colours")),
        f"<h3>{words('Colours of the grounds')}</h3>"
        + svg.strip(_palette(pictures["ground"]), words("ground colours")),
        _ground_bars(pictures["ground"], words),
        svg.histogram(
            pictures["mean"].mean(1) / 255, words("mean brightness of a picture, 0 to 1"), limits=(0, 1)
        ),
        svg.histogram(
            pictures["ground"].mean(1) / 255, words("brightness of the ground, 0 to 1"), limits=(0, 1)
        ),
        svg.histogram(pictures["white"], words("white share of the outer ring"), bins=20, limits=(0, 1)),
    ]
    said = words("{share} stand on a white ground.", share=f"{white:.1%}")
    return f"<h2>{words('Colours and grounds')}</h2><p>{said}</p>{_two(*charts)}"


def _palette(colours: np.ndarray, count: int = 140) -> list[svg.RGB]:
    """A fair sample, greys first by brightness, then by hue."""
    picked = colours[np.linspace(0, len(colours) - 1, min(count, len(colours))).astype(int)]

    def order(rgb: Sequence[float]) -> tuple[float, ...]:
        hue, saturation, value = colorsys.rgb_to_hsv(*(v / 255 for v in rgb))
        return (0.0, value, 0.0) if saturation < 0.15 else (1.0, round(hue * 12) / 12, value)

    return [tuple(round(float(v)) for v in rgb) for rgb in sorted(picked.tolist(), key=order)]


def _ground_bars(grounds: np.ndarray, words: Words) -> str:
    """The most frequent grounds, in steps of 32 levels."""
    cells, counts = np.unique((grounds // 32).astype(np.int64), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:12]
    colours = [svg.colour(np.minimum(cells[i] * 32 + 16, 255)) for i in order]
    rows = [(name, float(counts[i]) / len(grounds)) for name, i in zip(colours, order, strict=True)]
    return f"<h3>{words('Most frequent grounds, as shares')}</h3>" + svg.bars(
        rows, words("grounds"), colours, width=420
    )


def _faults(report: Report, words: Words) -> str:
    meaning = {
        "near_constant": "blank or nearly so",
        "blurred": "blurred or enlarged",
        "watermark": "with a repeated pattern: an overlay, or a print of the goods",
    }
    parts = [f"<h2>{words('Doubtful pictures')}</h2>"]
    for name, count in report.numbers["flags"].items():
        parts.append(f"<h3>{count} {words(meaning[name])}</h3>" + _gallery(report.shown[name], report))
    return (
        "".join(parts) + f"<p class=note>{words('data_tools.clean --rules shop flags or drops these.')}</p>"
    )


def _likeness(report: Report, words: Words) -> str:
    alike = report.alike
    text = words(
        "{exact} pictures look exactly like another one, {near} pairs nearly so (at most {bits} of 64 hash bits and "
        "{levels} of 255 levels of colour); {across} pairs lie in different splits.",
        exact=alike.exact,
        near=alike.near,
        bits=NEAR,
        levels=COLOURS,
        across=alike.across,
    )
    pairs = []
    for distance, one, other in alike.nearest:
        both = _gallery([one, other], report)
        pairs.append(
            f'<div class="pair">{both}<br><small>{words("{count} bits apart", count=distance)}</small></div>'
        )
    return f"<h2>{words('Duplicates and nearest pairs')}</h2><p>{text}</p>{''.join(pairs)}"


def _gallery(rows: Sequence[Row], report: Report) -> str:
    figures = []
    for row in rows:
        if row in report.records:
            record = report.records[row]
            caption = html.escape(record.captions[0][:60] if record.captions else "")
            name = html.escape(f"{record.key} ({report.facts[row[0]].split})")
            figures.append(f"<figure>{_image(record.image)}{caption}<br><small>{name}</small></figure>")
    return "".join(figures)


def _image(data: bytes) -> str:
    try:
        picture = resize(decode(data, near=2 * THUMBNAIL), "longest", THUMBNAIL)
    except BadImage as error:
        return f"<b>{error.reason}</b>"
    text = base64.b64encode(encode(picture, "webp", 80)).decode()
    return (
        f'<img alt="" width="{picture.width}" height="{picture.height}" src="data:image/webp;base64,{text}">'
    )
