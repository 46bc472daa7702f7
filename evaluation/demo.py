"""From nothing to ranked pictures of a Chinese sentence, on the embedded default, by the commands of the README.

    make demo                                      # or: python -m evaluation.demo
    python -m evaluation.demo --text "一个蓝色的杯子"

Every stage is a program of its own, started as a user would start it; what is whole is reused. Ends with one table:
what was made, where, how long it took, how good it is.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from common.config import command, parse_options, read_mapping
from common.files import read_json, read_lines
from common.log import clock, say
from common.tables import plain_console

EMBEDDED = Path("data/synthetic")
COLORED = 400  # its training images by which colours are named


@dataclass(frozen=True)
class Options:
    """Run the whole demo."""

    text: str = "一件红色的连衣裙"
    """The sentence to draw."""
    num_images: int = 8
    """Pictures to draw and to rank."""
    out: Path = Path("out")
    """Directory for the pictures."""


@dataclass(frozen=True)
class Stage:
    """One program of the demo."""

    title: str
    program: tuple[str, ...]
    where: Path
    quality: Callable[[Path], str]


@dataclass(frozen=True)
class Row:
    """One line of the closing table."""

    title: str
    where: Path
    seconds: float
    quality: str


def last_validation(run_dir: Path) -> dict[str, float]:
    """The last evaluation in a run's metrics.jsonl. Raises ValueError when there is none."""
    lines = read_lines(run_dir / "metrics.jsonl")
    rows = [row for row in map(json.loads, lines) if row["kind"] == "val"]
    if not rows:
        raise ValueError(f"{run_dir}/metrics.jsonl holds no evaluation")
    return rows[-1]


def tokenizer_quality(run_dir: Path) -> str:
    row = last_validation(run_dir)
    return f"{row['psnr']:.1f} dB, {row['usage']:.0%} of the codes used"


def generator_quality(run_dir: Path) -> str:
    row = last_validation(run_dir)
    return f"{row['image_bits']:.2f} bits a token, {row['text_gain_bits']:.2f} of them saved by the text"


def ranker_quality(run_dir: Path) -> str:
    row = last_validation(run_dir)
    return f"text to picture recall@1 {row['recall@1']:.0%}, recall@5 {row['recall@5']:.0%}"


def data_quality(folder: Path) -> str:
    return f"{read_json(folder / 'dataset.json')['num_samples']} pictures with captions"


def pictures_quality(out: Path) -> str:
    return f"{len(read_lines(out / 'images.jsonl'))} pictures"


def ranking_quality(out: Path) -> str:
    """How many of the best four show the colour that the sentence names, by the nearest training images."""
    from evaluation.parts import pixel_colors_of
    from evaluation.pixel_colors import ColorHistogram
    from evaluation.reference import ReferencePictures

    text = json.loads(read_lines(out / "images.jsonl")[0])["text"]
    train = ReferencePictures.of_split(str(EMBEDDED), "train", 64, limit=COLORED)
    measured = pixel_colors_of(train, range(len(train)), None)
    named = [color for color in measured.colors if color in text] if measured else []
    best = sorted(out.glob("rank*.png"))[:4]
    if not named or not best:
        return "no colour named"
    seen = measured.named(ColorHistogram().features([Image.open(path) for path in best]))
    return f"{seen.count(named[0])} of the best {len(best)} are {named[0]}, measured in the pixels"


def run_dir(config: str) -> Path:
    return Path(read_mapping(Path(config))["loop"]["run_dir"])


def stages(options: Options) -> list[Stage]:
    """The commands of the README, in order."""
    vqgan, dalle = run_dir("configs/demo/vqgan.yaml"), run_dir("configs/demo/dalle.yaml")
    ranker = run_dir("configs/demo/ranker.yaml")
    draw = (
        "generate.py",
        options.text,
        str(options.num_images),
        str(options.out),
        "--checkpoint",
        str(dalle),
    )
    rank = ("rerank.py", str(options.out), "--ranker", str(ranker))
    return [
        Stage(
            "product pictures drawn by us",
            ("-m", "data_tools.synthetic"),
            EMBEDDED,
            data_quality,
        ),
        Stage("image tokenizer", ("train_vqgan.py",), vqgan, tokenizer_quality),
        Stage("generator", ("train_dalle.py",), dalle, generator_quality),
        Stage("ranker", ("-m", "rankers.train"), ranker, ranker_quality),
        Stage(f"pictures of {options.text}", draw, options.out, pictures_quality),
        Stage("their ranking", rank, options.out / "ranked.png", lambda _: ranking_quality(options.out)),
    ]


def run(stage: Stage) -> Row:
    """Start the stage's program. Raises ValueError with its command when it fails."""
    say(f"\n== {stage.title}: python {' '.join(stage.program)}")
    started = time.perf_counter()
    code = subprocess.run([sys.executable, *stage.program]).returncode
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise ValueError(f"`python {' '.join(stage.program)}` ended with code {code}; its last lines say why")
    return Row(stage.title, stage.where, time.perf_counter() - started, stage.quality(stage.where))


def show(rows: Sequence[Row]) -> None:
    from rich.table import Table

    table = Table(title="What was made")
    for column in ("what", "where", "time", "how good"):
        table.add_column(column)
    for row in rows:
        table.add_row(row.title, str(row.where), clock(row.seconds), row.quality)
    table.add_row("in all", "", clock(sum(r.seconds for r in rows)), "", style="bold")
    plain_console().print(table)


@command
def main(argv: Sequence[str] | None = None) -> list[Row]:
    options = parse_options(Options, argv, description=__doc__)
    if options.num_images < 1:
        raise ValueError(f"num_images must be at least 1, not {options.num_images}")
    rows = [run(stage) for stage in stages(options)]
    show(rows)
    say(f"look at {options.out / 'ranked.png'}")
    return rows


if __name__ == "__main__":
    main()
