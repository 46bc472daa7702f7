"""The pieces that pages of evaluation are made of, each one self-contained HTML: tables, plots, images in the page.

Text stays text, so that the reader's own fonts draw Chinese. The HTML stands in templates/: what these functions return
is markup that goes into a page as it is, and everything else is escaped there.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from common.console.html import data_url, image_url, macros, render
from common.files import atomic_path
from common.text.language import Words
from evaluation.metrics.statistics import Interval
from evaluation.sets import SampleSet

if TYPE_CHECKING:
    from evaluation.compare.parts import Reference
    from evaluation.metrics.compute import Metric

ENGLISH = Words({}, "en")
THUMBNAIL = 128  # pixels, longest side
METRICS, PAGE = "metrics.json", "report.html"  # of the evaluation and of the arena


def _parts() -> Any:
    return macros("evaluation/templates/parts.html")


def page(title: str, sections: Iterable[str], words: Words) -> str:
    """The whole document."""
    return render("evaluation/templates/report.html", words, title=title, sections=sections)


def write_page(path: Path, title: str, sections: Iterable[str], words: Words) -> Path:
    """Atomically. Raises OSError when the file cannot be written."""
    text = page(title, sections, words)
    with atomic_path(path) as temporary:
        temporary.write_text(text, "utf-8")
    return path


def section(title: str, *parts: str) -> str:
    """A heading and what stands below; "" without parts."""
    kept = [part for part in parts if part]
    return _parts().section(title, kept) if kept else ""


def group(title: str, *parts: str) -> str:
    """The same one level down, where a title of "" leaves the heading out."""
    kept = [part for part in parts if part]
    return _parts().group(title, kept) if kept else ""


def note(text: str) -> str:
    return _parts().note(text)


def side_by_side(charts: Sequence[tuple[str, str]]) -> str:
    """(title, SVG) of each chart."""
    return _parts().side_by_side([chart for chart in charts if chart[1]])


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], text_columns: Sequence[int] = (0,)) -> str:
    """`text_columns` are set flush left and may break."""
    return _parts().table(header, rows, text_columns)


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


def marked(text: str, is_best: bool) -> str:
    return _parts().marked(text, "best" if is_best else "")


def interval(value: Interval, best: bool = False) -> str:
    """The value over its interval."""
    below = f"{number(value.low)} .. {number(value.high)}"
    return _parts().marked(number(value.value), "best" if best else "", below)


def difference(value: Interval, higher_is_better: bool | None = None) -> str:
    """A difference: green where its interval leaves out zero on the good side, red on the other, grey with zero."""
    kind = "unsure"
    if (value.low > 0 or value.high < 0) and higher_is_better is not None:
        kind = "sure" if (value.low > 0) == higher_is_better else "worse"
    return _parts().marked(f"{value.value:+.4g}", kind, f"{value.low:+.3g} .. {value.high:+.3g}")


# --- images ------------------------------------------------------------------------------------------------------


def inline_image(image: Image.Image, side: int = THUMBNAIL) -> str:
    """An <img> with the image inside, its longer side at most `side` pixels."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return _parts().image(image_url(small, 82), *small.size)


def captioned(image: Image.Image, caption: str) -> str:
    return _parts().captioned(inline_image(image), caption)


def named_image(path: Path, side: int) -> str:
    """An image file over its name."""
    with Image.open(path) as image:
        return _parts().shown(inline_image(image, side), path.name)


def plot(path: Path) -> str:
    """A PNG file, in the page."""
    return _parts().plot(data_url(path.read_bytes(), "png"), path.name)


def prompt_grids(
    sets: Sequence[SampleSet],
    texts: Sequence[str],
    per_text: int = 4,
    marks: Mapping[Path, str] | None = None,
) -> str:
    """The first images of every text, the sets side by side; `marks`: a remark below an image, by its path."""
    marks = marks or {}
    groups = [found.by_prompt() for found in sets]
    rows = []
    for text in texts:
        systems = []
        for found, by_text in zip(sets, groups, strict=True):
            samples = by_text.get(text, [])[:per_text]
            systems.append((found.name, [captioned(s.image, marks.get(s.path, "")) for s in samples]))
        rows.append((shorten(text), systems))
    return _parts().prompt_grids(rows)


def shorten(text: str, most: int = 200) -> str:
    """A caption of any length on the page."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


# --- metrics of a set ----------------------------------------------------------------------------------------------


def better(higher_is_better: bool | None) -> str:
    return {True: "higher", False: "lower", None: "neither"}[higher_is_better]


def real(value: float | None) -> str:
    return "-" if value is None else number(value)


def metric_table(metrics: Sequence["Metric"], words: Words = ENGLISH) -> str:
    """One row a metric, with what real images get and all that it depends on."""
    names = ("metric", "value, 95 % interval", "real images", "better", "images", "by", "remarks")
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
        for f in metrics
    ]
    return table(header, rows, (0, 5, 6))


def nearest_training(
    metrics: Sequence["Metric"],
    samples: SampleSet,
    reference: "Reference",
    words: Words = ENGLISH,
    most: int = 16,
) -> str:
    """Each generated image beside the nearest training image, nearest first, a heading a measure."""
    parts = []
    for found in metrics:
        if not found.pairs or reference.train is None:
            continue
        shown = []
        for pair in found.pairs[:most]:
            sample = samples.samples[pair.sample]
            remark = f"{pair.distance:.3g}" + (words(", nearer than the threshold") if pair.is_copy else "")
            made = captioned(sample.image, f"{shorten(sample.text, 40)} | {remark}")
            real_one = captioned(reference.train.open(pair.row), f"{shorten(pair.caption, 40)} | {pair.key}")
            shown.append(_parts().pair(made, real_one))
        parts.append(group(found.name, note(found.note), *shown))
    return group("", *parts)


def write_report(
    path: Path,
    samples: SampleSet,
    metrics: Sequence["Metric"],
    reference: "Reference",
    settings: Mapping[str, Any],
    remarks: Sequence[str] = (),
    most_texts: int = 24,
    words: Words = ENGLISH,
) -> Path:
    """The page of one set: settings, metrics, images, nearest training images.

    `remarks`: what was left out and why, and what is known of the judges.
    """
    texts = spread(samples.texts, most_texts)
    sections = [
        section(
            words("What was measured"),
            facts({words(k): v for k, v in settings.items()}),
            *(note(line) for line in remarks),
        ),
        section(words("Metrics"), metric_table(metrics, words)),
        section(words("Images"), prompt_grids([samples], texts, 8)),
        section(
            words("Nearest training images"),
            nearest_training(metrics, samples, reference, words),
            note(words("Left what was generated, right the training image that is nearest to it.")),
        ),
        section(words("Images that could not be read"), *(note(line) for line in samples.corrupt[:50])),
    ]
    return write_page(path, words("Evaluation of {name}", name=samples.name), sections, words)


def spread(items: Sequence[str], most: int) -> list[str]:
    """At most `most` of them, evenly."""
    if len(items) <= most:
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]
