"""The pieces that pages of evaluation are made of, each one self-contained HTML: tables, plots, pictures in the page.

Text stays text, so that the reader's own fonts draw Chinese; every text from outside is escaped.
"""

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from common.files import atomic_path
from common.language import Words
from data_tools.report.stats_page import STYLE
from evaluation.metrics.statistics import Interval
from evaluation.sets import Sample, SampleSet

if TYPE_CHECKING:
    from evaluation.compare.parts import Reference
    from evaluation.metrics.compute import Figure

ENGLISH = Words({}, "en")
THUMBNAIL = 128  # pixels, longest side
OWN_STYLE = """
figure{width:130px}figure img{max-width:128px}
.prompt{margin:.9rem 0 .2rem;font-size:1.05rem;overflow-wrap:anywhere}
.prompt small{overflow-wrap:anywhere}
.arms{display:flex;flex-wrap:wrap;gap:.4rem 1.6rem}.arms h4{margin:0 0 .2rem;font-size:12px;font-weight:500;color:#777}
table{margin:.4rem 0 .8rem}td,th{vertical-align:top}td small{white-space:nowrap}
td.text,th.text{text-align:left;max-width:30rem;overflow-wrap:anywhere}
.best{font-weight:600}.sure{color:#22763a;font-weight:600}.worse{color:#b3261e;font-weight:600}.unsure{color:#777}
.wide{overflow-x:auto}
img.best{outline:3px solid #54a24b}
@media print{h2{break-after:avoid}figure,.arms>div{break-inside:avoid}}
"""


@dataclass(frozen=True)
class Raw:
    """HTML that is put into a table as it is."""

    html: str


def page(title: str, sections: Iterable[str], tag: str = "zh") -> str:
    """The whole document; `tag`: its language, zh or en."""
    name = html.escape(title)
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{name}</title><style>{STYLE}{OWN_STYLE}</style>"
    )
    body = "".join(sections)
    return f'<!doctype html><html lang="{tag}"><head>{head}</head><body><h1>{name}</h1>{body}</body></html>\n'


METRICS, PAGE = "metrics.json", "report.html"  # of the evaluation and of the arena


def write_page(path: Path, title: str, sections: Iterable[str], tag: str = "zh") -> Path:
    """Atomically. Raises OSError when the file cannot be written."""
    text = page(title, sections, tag)
    with atomic_path(path) as temporary:
        temporary.write_text(text, "utf-8")
    return path


def section(title: str, *parts: str) -> str:
    """A heading and what stands below; "" without parts."""
    kept = [part for part in parts if part]
    return f"<h2>{html.escape(title)}</h2>{''.join(kept)}" if kept else ""


def note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>' if text else ""


def side_by_side(*charts: str) -> str:
    return '<div class="two">' + "".join(f"<div>{chart}</div>" for chart in charts if chart) + "</div>"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], text_columns: Sequence[int] = (0,)) -> str:
    """Cells are escaped unless they are Raw; `text_columns` are set flush left and may break."""

    def cell(tag: str, column: int, value: Any) -> str:
        kind = ' class="text"' if column in text_columns else ""
        shown = value.html if isinstance(value, Raw) else html.escape(str(value))
        return f"<{tag}{kind}>{shown}</{tag}>"

    head = "".join(cell("th", i, name) for i, name in enumerate(header))
    body = "".join("<tr>" + "".join(cell("td", i, v) for i, v in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def facts(values: Mapping[str, Any]) -> str:
    """Names and what they are, such as the settings of a run."""
    return table(("", ""), [(name, value) for name, value in values.items()], (0, 1))


# --- numbers -------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Four digits, as people write them: 0.8123, 12.35, 1235; - for what is unknown."""
    if not math.isfinite(value):
        return "-"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def interval(value: Interval, best: bool = False) -> Raw:
    """The value over its interval."""
    kind = ' class="best"' if best else ""
    low, high = number(value.low), number(value.high)
    return Raw(f"<span{kind}>{number(value.value)}</span><br><small>{low} .. {high}</small>")


def difference(value: Interval, higher_is_better: bool | None = None) -> Raw:
    """A difference: green where its interval leaves out zero on the good side, red on the other, grey with zero."""
    kind = "unsure"
    if (value.low > 0 or value.high < 0) and higher_is_better is not None:
        kind = "sure" if (value.low > 0) == higher_is_better else "worse"
    shown = f"{value.value:+.4g}"
    return Raw(f'<span class="{kind}">{shown}</span><br><small>{value.low:+.3g} .. {value.high:+.3g}</small>')


# --- pictures ------------------------------------------------------------------------------------------------------


def picture(image: Image.Image, side: int = THUMBNAIL, kind: str = "") -> str:
    """An <img> with the picture inside, its longer side at most `side` pixels."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=82)
    data = base64.b64encode(buffer.getvalue()).decode()
    name = f' class="{kind}"' if kind else ""
    return (
        f'<img alt=""{name} width="{small.width}" height="{small.height}" loading="lazy" '
        f'src="data:image/webp;base64,{data}">'
    )


def figure(image: Image.Image, caption: str, kind: str = "") -> str:
    return f"<figure>{picture(image, kind=kind)}{html.escape(caption)}</figure>"


def prompt_grids(
    sets: Sequence[SampleSet],
    texts: Sequence[str],
    per_text: int = 4,
    marks: Mapping[Path, str] | None = None,
) -> str:
    """The first pictures of every text, the sets side by side; `marks`: a remark below a picture, by its path."""
    marks = marks or {}
    groups = [found.by_prompt() for found in sets]
    parts = []
    for text in texts:
        arms = []
        for found, by_text in zip(sets, groups, strict=True):
            shown = "".join(_sample(sample, marks) for sample in by_text.get(text, [])[:per_text])
            arms.append(f"<div><h4>{html.escape(found.name)}</h4>{shown or '-'}</div>")
        parts.append(
            f'<p class="prompt">{html.escape(shorten(text))}</p><div class="arms">{"".join(arms)}</div>'
        )
    return "".join(parts)


def _sample(sample: Sample, marks: Mapping[Path, str]) -> str:
    return figure(sample.image, marks.get(sample.path, ""))


def shorten(text: str, most: int = 200) -> str:
    """A caption of any length on the page."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


# --- figures of a set ----------------------------------------------------------------------------------------------


def better(higher_is_better: bool | None) -> str:
    return {True: "higher", False: "lower", None: "neither"}[higher_is_better]


def real(value: float | None) -> str:
    return "-" if value is None else number(value)


def figure_table(figures: Sequence["Figure"], words: Words = ENGLISH) -> str:
    """One row a figure, with what real pictures get and all that it depends on."""
    names = ("figure", "value, 95 % interval", "real pictures", "better", "pictures", "by", "remarks")
    header = tuple(map(words, names))
    rows = [
        (
            f.name,
            interval(f.value),
            real(f.real),
            words(better(f.higher_is_better)),
            f.count,
            f.network,
            f.note,
        )
        for f in figures
    ]
    return table(header, rows, (0, 5, 6))


def nearest_training(
    figures: Sequence["Figure"],
    samples: SampleSet,
    reference: "Reference",
    words: Words = ENGLISH,
    most: int = 16,
) -> str:
    """Each generated picture beside the nearest training picture, nearest first, a heading a measure."""
    parts = []
    for found in figures:
        if not found.pairs or reference.train is None:
            continue
        shown = []
        for pair in found.pairs[:most]:
            sample = samples.samples[pair.sample]
            remark = f"{pair.distance:.3g}" + (words(", nearer than the threshold") if pair.is_copy else "")
            made = figure(sample.image, f"{shorten(sample.text, 40)} | {remark}")
            real_one = figure(reference.train.open(pair.row), f"{shorten(pair.caption, 40)} | {pair.key}")
            shown.append(f'<div class="pair">{made}{real_one}</div>')
        parts.append(f"<h3>{html.escape(found.name)}</h3>{note(found.note)}{''.join(shown)}")
    return "".join(parts)


def write_report(
    path: Path,
    samples: SampleSet,
    figures: Sequence["Figure"],
    reference: "Reference",
    settings: Mapping[str, Any],
    remarks: Sequence[str] = (),
    most_texts: int = 24,
    words: Words = ENGLISH,
) -> Path:
    """The page of one set: settings, figures, pictures, nearest training pictures.

    `remarks`: what was left out and why, and what is known of the judges.
    """
    texts = spread(samples.texts, most_texts)
    sections = [
        section(
            words("What was measured"),
            facts({words(k): v for k, v in settings.items()}),
            *(note(line) for line in remarks),
        ),
        section(words("Figures"), figure_table(figures, words)),
        section(words("Pictures"), prompt_grids([samples], texts, 8)),
        section(
            words("Nearest training pictures"),
            nearest_training(figures, samples, reference, words),
            note(words("Left what was drawn, right the training picture that is nearest to it.")),
        ),
        section(words("Pictures that could not be read"), *(note(line) for line in samples.corrupt[:50])),
    ]
    return write_page(path, words("Evaluation of {name}", name=samples.name), sections, words.tag)


def spread(items: Sequence[str], most: int) -> list[str]:
    """At most `most` of them, evenly."""
    if len(items) <= most:
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]
