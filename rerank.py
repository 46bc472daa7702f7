"""Order the pictures that generate.py drew: the best first, with what their scores mean.

    python rerank.py                                     # out/, the ranker trained last
    python rerank.py out/ --ranker pretrained/goods-128/ranker --top-k 4
    python rerank.py out/ --min-percentile 20            # keeps nothing that real pictures would not pass
    python rerank.py out/ --min-percentile 20 --until 4  # draws on until four pass, at most --budget pictures

Writes ranking.json, ranked.png and copies rank00.png, rank01.png ... of the best; doing it again gives the same.
"""

import common  # noqa: F401 (before torch: Ctrl-C meanwhile leaves no traceback)

# isort: split

import itertools
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from PIL import Image, ImageDraw
from tqdm import tqdm

from common.config import command, from_mapping, parse_options
from common.image import make_grid, resize_square
from common.label import LabelOptions, joined_arguments
from common.log import say
from common.out_directory import COPY, RANKED, RANKING, OutDirectory, Request
from common.output import OutputDirectory
from common.precision import Precision
from common.tables import plain_console, shortened
from rankers import default_ranker, load_ranker
from rankers.base import identities
from rankers.calibration import Calibration, default_lexicon, hard_negatives
from rankers.outdir import Row, read_out_directory, read_picture


@dataclass(frozen=True)
class Options:
    """Order the pictures of an out directory."""

    out: tyro.conf.Positional[Path] = Path("out")
    """Directory that generate.py wrote."""
    ranker: str = ""
    """Checkpoint directory, published model or a list of them (see rankers); empty: the newest one trained here,
    else the one that ships."""
    top_k: int = 4
    """Best pictures of a text that are copied to rank00.png ..."""
    min_percentile: float = 0.0
    """A picture passes when it scores above this percentage of real pictures with their own captions; 0: all pass."""
    until: int = 0
    """Draw on until this many pictures of every text pass; 0: draw none."""
    budget: int = 64
    """Pictures of a text in all at which --until gives up."""
    checkpoint: str = ""
    """The generator that draws on for --until; empty: the newest one, else the one that ships."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """auto takes bf16 where the machine has it."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.top_k}")
        if not 0 <= self.min_percentile <= 100:
            raise ValueError(f"min_percentile must lie in [0, 100], not {self.min_percentile}")
        if self.until < 0 or (self.until and not self.min_percentile):
            raise ValueError("--until needs --min-percentile above 0, which says what passes")
        if self.budget < 1:
            raise ValueError(f"budget must be at least 1, not {self.budget}")


@dataclass(frozen=True)
class Ranked:
    """One picture of a text."""

    rank: int
    file: str
    score: float
    percentile: float | None
    """Share of real pictures with their own captions that score lower, in percent; None without calibration."""
    mismatched_percentile: float | None
    """Share of real pictures with others' captions that score lower, in percent."""
    margin: float | None
    """Score minus that of the best hard negative; None where the text names no known colour or kind."""
    hard_negative: str | None
    """The text with another colour or kind that fits best."""
    passed: bool
    copy: str | None
    """The copy's name, for the best that pass."""


def rank_text(
    ranker: Any, text: str, files: Sequence[str], images: Sequence[Image.Image], min_percentile: float
) -> list[Ranked]:
    """The pictures of one text, best first; equal scores in the order they were drawn."""
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


def rank_directory(options: Options, ranker: Any) -> dict[str, list[Ranked]]:
    """Every text of the directory with its pictures, best first."""
    texts: dict[str, list[str]] = {}
    for row in read_out_directory(options.out):
        texts.setdefault(row.text, []).append(row.file)
    found = {}
    for number, (text, files) in enumerate(
        tqdm(texts.items(), unit="text", disable=len(texts) < FEW_TEXTS, dynamic_ncols=True)
    ):
        images = [read_picture(options.out / file) for file in files]
        ranked = rank_text(ranker, text, files, images, options.min_percentile)
        found[text] = with_copies(ranked, options.top_k, _ending(number, len(texts)))
    return found


# --- drawing on ----------------------------------------------------------------------------------------------------

ROUND = 8  # pictures of a text drawn before looking again


def draw_until(options: Options, ranker: Any, out: OutDirectory) -> None:
    """Draw on for every text, behind the pictures that stand, until enough pass or the budget is spent."""
    from dalle.sampling import SamplingOptions

    rows = read_out_directory(options.out)
    origin = common_origin(rows, options.out)
    out.require_ours(len(rows) + options.budget * len({row.text for row in rows}))
    pipeline = load_generator(options, origin)
    out.label = from_mapping(LabelOptions, origin["label"] or {}, where=f"{options.out}/images.jsonl")
    out.origin = {name: value for name, value in origin.items() if name not in ("label", "whiten")}
    out.continue_behind_all()
    sampling = from_mapping(SamplingOptions, origin["sampling"], where=f"{options.out}/images.jsonl")
    while requests := wanted(options, rank_directory(options, ranker), read_out_directory(options.out)):
        say(f"drawing {len(requests)} more pictures")
        todo = [Request(text, index) for text, index in requests]
        for picture in pipeline.draw(todo, origin["seed"], sampling, origin["negative"], ROUND):
            out.add(picture)
    if out.count > len(rows):
        out.write_grid()


def wanted(options: Options, texts: dict[str, list[Ranked]], rows: Sequence[Row]) -> list[tuple[str, int]]:
    """(text, index) of the next round: for texts with too few passing pictures and budget left."""
    requests, last = [], {}
    for row in rows:
        last[row.text] = max(last.get(row.text, 0), int(row.values["index"]))
    for text, ranked in texts.items():
        passing, count = sum(row.passed for row in ranked), len(ranked)
        if passing >= options.until:
            continue
        if count >= options.budget:
            say(f"{text}: {passing} of {options.until} pass after {count} pictures, the budget")
            continue
        requests += [(text, last[text] + 1 + i) for i in range(min(ROUND, options.budget - count))]
    return requests


def common_origin(rows: Sequence[Row], out: Path) -> dict[str, Any]:
    """What all pictures share: seed, sampling, checkpoint. Raises ValueError where one run did not draw all."""
    names = (
        *("seed", "sampling", "negative", "source", "engine", "weights", "kernels", "checkpoint"),
        *("label", "whiten"),
    )
    origins = [{name: row.values.get(name) for name in names} for row in rows]
    if any(origin != origins[0] for origin in origins) or "index" not in rows[0].values:
        raise ValueError(
            f"the pictures of {out} were not drawn by one run of generate.py: --until cannot go on"
        )
    if origins[0]["source"]:
        raise ValueError(
            f"the pictures of {out} started from another picture: --until cannot go on from there"
        )
    if origins[0]["whiten"]:
        raise ValueError(f"the pictures of {out} were put on white: --until cannot go on")
    return origins[0]


def load_generator(options: Options, origin: dict[str, Any]) -> Any:
    from dalle.engines import FastOptions
    from dalle.pipeline import TextToImage, default_checkpoint

    checkpoint = options.checkpoint or default_checkpoint()
    off = origin["engine"] == "torch" and "off" in (
        origin["kernels"] or {}
    )  # earlier releases wrote no kernels
    fast = FastOptions(origin["engine"] or "auto", origin["weights"], "off" if off else "auto")
    pipeline = TextToImage.from_pretrained(checkpoint, options.device, fast)
    if pipeline.sha256 != origin["checkpoint"]:
        raise ValueError(
            f"another generator than {checkpoint} drew the pictures of {options.out}: name it with --checkpoint"
        )
    return pipeline


# --- files ---------------------------------------------------------------------------------------------------------

SHEET_TEXTS, SHOWN_TEXTS = 64, 16  # texts of ranked.png, and of the tables


def require_room(options: Options, rows: Sequence[Row], files: OutputDirectory) -> None:
    """Raises ValueError where a file that the ranking would replace is not what an earlier one wrote."""
    count = len({row.text for row in rows})
    endings = [_ending(number, count) for number in range(count)]
    most = range(min(options.top_k, len(rows) + options.budget))
    copies = (_copy_name(i, ending) for ending in endings for i in most)
    files.require_ours(itertools.chain((RANKING, RANKED), copies))


def _ending(number: int, num_texts: int) -> str:
    return f"_text{number:02d}" if num_texts > 1 else ""


def _copy_name(rank: int, ending: str) -> str:
    return f"rank{rank:02d}{ending}.png"


def write_ranking(
    files: OutputDirectory, options: Options, ranker: Any, texts: dict[str, list[Ranked]]
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
    ranked, image = [out / row.file for rows in shown for row in rows], sheet(out, texts)
    with files.writing(RANKED) as temporary:
        image.save(temporary, "PNG", **joined_arguments(ranked, image, "PNG"))
    calibration = ranker.calibration
    files.write_json(
        RANKING,
        {
            "ranker": ranker.name,
            "encoders": identities(ranker),
            "calibration": calibration
            and {"data": calibration.data, "num_pictures": calibration.num_pictures},
            "top_k": options.top_k,
            "min_percentile": options.min_percentile,
            "texts": [{"text": t, "pictures": [asdict(r) for r in rows]} for t, rows in texts.items()],
        },
    )


def sheet(out: Path, texts: dict[str, list[Ranked]], side: int = 128, columns: int = 8) -> Image.Image:
    """Pictures in order, each over its rank and percentile; a new row for every text, pale what did not pass.

    Of many texts the first ones alone: a page that nobody can open helps nobody.
    """
    cells = []
    for rows in itertools.islice(texts.values(), SHEET_TEXTS):
        cells += [_cell(out, row, side) for row in rows]
        cells += [Image.new("RGB", cells[0].size, "white")] * (-len(cells) % columns if len(texts) > 1 else 0)
    return make_grid(cells, columns=min(columns, len(cells)))


def _cell(out: Path, row: Ranked, side: int) -> Image.Image:
    picture = resize_square(read_picture(out / row.file), side)
    if not row.passed:
        picture = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.7)
    cell = Image.new("RGB", (side, side + 16), "white")
    cell.paste(picture, (0, 0))
    place = "" if row.percentile is None else f"  p{row.percentile:.0f}"
    margin = "" if row.margin is None else f"  {row.margin:+.2f}"
    ImageDraw.Draw(cell).text((3, side + 2), f"{row.rank}{place}{margin}", fill="black")
    return cell


def show(text: str, ranked: Sequence[Ranked], top: int = 16) -> None:
    """A table: "beats matched" is the percentile among real pictures with their own captions."""
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


@command
def main(argv: Sequence[str] | None = None) -> dict[str, list[Ranked]]:
    """Rank; returns what ranking.json holds."""
    options = parse_options(Options, argv, description=__doc__)
    read_out_directory(options.out)
    with OutDirectory(options.out) as out:
        return rank_all(options, out)


def rank_all(options: Options, out: OutDirectory) -> dict[str, list[Ranked]]:
    """Draw what --until asks for, rank, write and show."""
    require_room(options, read_out_directory(options.out), out.files)
    name = options.ranker or str(default_ranker())
    ranker = load_ranker(name, options.device, options.precision)
    if options.min_percentile and ranker.calibration is None:
        raise ValueError(
            f"the ranker {name} has no calibration, so --min-percentile means nothing: make one with "
            f"`python -m rankers.calibration --ranker {name}`"
        )
    if options.until:
        draw_until(options, ranker, out)
    texts = rank_directory(options, ranker)
    write_ranking(out.files, options, ranker, texts)
    for text, ranked in itertools.islice(texts.items(), SHOWN_TEXTS):
        show(text, ranked)
        kept = [row.copy for row in ranked if row.copy]
        say(
            f"best: {', '.join(kept)}"
            if kept
            else f"none of the {len(ranked)} pictures passes: nothing is copied"
        )
    if len(texts) > SHOWN_TEXTS:
        say(f"... and {len(texts) - SHOWN_TEXTS} texts more in ranking.json")
    say(f"ranked by {ranker.name} | {options.out / 'ranked.png'} | {options.out / 'ranking.json'}")
    return texts


if __name__ == "__main__":
    main()
