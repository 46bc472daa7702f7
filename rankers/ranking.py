"""An out directory ordered: scores of every image, what they mean, and the files of rerank.py and `generate.py --rank`.

Writes ranking.json, ranked.png and copies rank00.png, rank01.png ... of the best; doing it again gives the same.
"""

import itertools
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from common.console.progress import progress
from common.console.tables import plain_console, shortened
from common.image import make_grid
from common.log import say
from common.outputs.image_list import RANKED, RANKING
from common.outputs.label import joined_arguments
from common.outputs.out_directory import COPY
from common.outputs.record import OutputDirectory
from common.square import resize_square
from rankers.base import identities
from rankers.calibration import Calibration, default_lexicon, hard_negatives
from rankers.outdir import read_image, read_out_directory

TOP_K = 4  # best images of a text that are copied, unless told otherwise


@dataclass(frozen=True)
class Ranked:
    """One image of a text."""

    rank: int
    file: str
    score: float
    percentile: float | None
    """Share of real images with their own captions that score lower, in percent; None without calibration."""
    mismatched_percentile: float | None
    """Share of real images with others' captions that score lower, in percent."""
    margin: float | None
    """Score minus that of the best hard negative; None where the text names no known colour or category."""
    hard_negative: str | None
    """The text with another colour or category that fits best."""
    passed: bool
    copy: str | None
    """The copy's name, for the best that pass."""


def rank_text(
    ranker: Any, text: str, files: Sequence[str], images: Sequence[Image.Image], min_percentile: float
) -> list[Ranked]:
    """The images of one text, best first; equal scores in the order they were generated."""
    scores = ranker.score(text, images).tolist()
    negatives, margins = _margins(ranker, text, images, scores)
    calibration: Calibration | None = ranker.calibration
    order = sorted(range(len(files)), key=lambda i: (-scores[i], i))
    rows = []
    for rank, i in enumerate(order):
        percentile = calibration.percentile(scores[i]) if calibration else None
        rows.append(
            Ranked(
                rank,
                files[i],
                round(scores[i], 6),
                None if percentile is None else round(percentile, 2),
                round(calibration.mismatched_percentile(scores[i]), 2) if calibration else None,
                margins[i],
                negatives[i],
                percentile is None or percentile >= min_percentile,
                None,
            )
        )
    return rows


def _margins(
    ranker: Any, text: str, images: Sequence[Image.Image], scores: Sequence[float]
) -> tuple[list[str | None], list[float | None]]:
    nothing: list[None] = [None] * len(images)
    if not hasattr(ranker, "score_matrix"):  # recorded scores and ranks know no other text
        return nothing, nothing
    wrong = hard_negatives(text, ranker.calibration.lexicon if ranker.calibration else default_lexicon())
    if not wrong:
        return nothing, nothing
    best, rows = ranker.score_matrix(wrong, images).max(0)
    margins = [round(score - float(b), 6) for score, b in zip(scores, best, strict=True)]
    return [wrong[int(r)] for r in rows], margins


def with_copies(ranked: Sequence[Ranked], top_k: int, ending: str) -> list[Ranked]:
    """Names for the copies of the first `top_k` that pass."""
    chosen = [row.file for row in ranked if row.passed][:top_k]
    names = {file: _copy_name(i, ending) for i, file in enumerate(chosen)}
    return [replace(row, copy=names.get(row.file)) for row in ranked]


FEW_TEXTS = 32  # ranked too soon for a progress bar


def rank_directory(
    out: Path, ranker: Any, top_k: int = TOP_K, min_percentile: float = 0.0
) -> dict[str, list[Ranked]]:
    """Every text of the directory with its images, best first."""
    texts: dict[str, list[str]] = {}
    for row in read_out_directory(out):
        texts.setdefault(row.text, []).append(row.file)
    found = {}
    shown = progress(texts.items(), unit="text") if len(texts) >= FEW_TEXTS else texts.items()
    for number, (text, files) in enumerate(shown):
        images = [read_image(out / file) for file in files]
        ranked = rank_text(ranker, text, files, images, min_percentile)
        found[text] = with_copies(ranked, top_k, _ending(number, len(texts)))
    return found


# --- files ---------------------------------------------------------------------------------------------------------

SHEET_TEXTS, SHOWN_TEXTS = 64, 16  # texts of ranked.png, and of the tables


def ranking_names(num_texts: int, num_images: int, top_k: int = TOP_K) -> Iterator[str]:
    """Files that a ranking of so many texts, with up to `num_images` images each, may write."""
    copies = (
        _copy_name(i, _ending(number, num_texts))
        for number in range(num_texts)
        for i in range(min(top_k, num_images))
    )
    return itertools.chain((RANKING, RANKED), copies)


def _ending(number: int, num_texts: int) -> str:
    return f"_text{number:02d}" if num_texts > 1 else ""


def _copy_name(rank: int, ending: str) -> str:
    return f"rank{rank:02d}{ending}.png"


def write_ranking(
    files: OutputDirectory,
    ranker: Any,
    texts: dict[str, list[Ranked]],
    top_k: int = TOP_K,
    min_percentile: float = 0.0,
) -> None:
    """Copies, ranked.png, then ranking.json; what an earlier ranking left is replaced."""
    out = files.path
    for old in files.names():
        if COPY.fullmatch(old):
            files.remove(old)
    for row in (row for rows in texts.values() for row in rows if row.copy):
        with files.writing(row.copy) as temporary:
            shutil.copyfile(out / row.file, temporary)
    shown = itertools.islice(texts.values(), SHEET_TEXTS)
    ranked, image = [out / row.file for rows in shown for row in rows], ranked_grid(out, texts)
    with files.writing(RANKED) as temporary:
        image.save(temporary, "PNG", **joined_arguments(ranked, image, "PNG"))
    calibration = ranker.calibration
    files.write_json(
        RANKING,
        {
            "ranker": ranker.name,
            "encoders": identities(ranker),
            "calibration": calibration and {"data": calibration.data, "num_pictures": calibration.num_images},
            "top_k": top_k,
            "min_percentile": min_percentile,
            "texts": [{"text": t, "pictures": [asdict(r) for r in rows]} for t, rows in texts.items()],
        },
    )


def ranked_grid(out: Path, texts: dict[str, list[Ranked]], side: int = 128, columns: int = 8) -> Image.Image:
    """Images in order, each over its rank and percentile; a new row for every text, pale what did not pass.

    Of many texts the first ones alone: a page that nobody can open helps nobody.
    """
    cells = []
    for rows in itertools.islice(texts.values(), SHEET_TEXTS):
        cells += [_cell(out, row, side) for row in rows]
        cells += [Image.new("RGB", cells[0].size, "white")] * (-len(cells) % columns if len(texts) > 1 else 0)
    return make_grid(cells, columns=min(columns, len(cells)))


def _cell(out: Path, row: Ranked, side: int) -> Image.Image:
    image = resize_square(read_image(out / row.file), side)
    if not row.passed:
        image = Image.blend(image, Image.new("RGB", image.size, "white"), 0.7)
    cell = Image.new("RGB", (side, side + 16), "white")
    cell.paste(image, (0, 0))
    suffix = "" if row.percentile is None else f"  p{row.percentile:.0f}"
    margin = "" if row.margin is None else f"  {row.margin:+.2f}"
    ImageDraw.Draw(cell).text((3, side + 2), f"{row.rank}{suffix}{margin}", fill="black")
    return cell


def show(text: str, ranked: Sequence[Ranked], top: int = 16) -> None:
    """A table: "beats matched" is the percentile among real images with their own captions."""
    from rich.table import Table

    table = Table(title=shortened(text))
    for name in ("rank", "file", "score", "beats matched", "beats mismatched", "margin"):
        table.add_column(name, justify="left" if name == "file" else "right")
    table.add_column("nearest wrong text", overflow="fold")
    for row in ranked[:top]:
        cells = [str(row.rank), row.file, f"{row.score:.3f}", _percent(row.percentile)]
        cells += [_percent(row.mismatched_percentile), "-" if row.margin is None else f"{row.margin:+.3f}"]
        table.add_row(*cells, shortened(row.hard_negative or "-"), style=None if row.passed else "dim")
    plain_console().print(table)
    if len(ranked) > top:
        say(f"... and {len(ranked) - top} more in ranking.json")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} %"


def report(out: Path, ranker: Any, texts: dict[str, list[Ranked]]) -> None:
    """The tables of the first texts, their copies, and where the ranking lies."""
    for text, ranked in itertools.islice(texts.items(), SHOWN_TEXTS):
        show(text, ranked)
        kept = [row.copy for row in ranked if row.copy]
        say(
            f"best: {', '.join(kept)}"
            if kept
            else f"none of the {len(ranked)} images passes: nothing is copied"
        )
    if len(texts) > SHOWN_TEXTS:
        say(f"... and {len(texts) - SHOWN_TEXTS} texts more in ranking.json")
    say(f"ranked by {ranker.name} | {out / 'ranked.png'} | {out / 'ranking.json'}")
