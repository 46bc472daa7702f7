"""Real goods at once from the model that ships, then the same from nothing on the embedded default.

    make demo                                      # or: python -m evaluation.demo
    python -m evaluation.demo --text "一个蓝色的杯子" --language zh

Every stage is a program of its own, started as a user would start it; what is whole is reused. Ends with one table,
what was made, where, how long it took and how good it is, and with report.html, which tells the same in images.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from common.config import command, parse_options, read_mapping
from common.console.programs import run_program
from common.console.tables import plain_console
from common.files import read_json, read_lines
from common.log import clock, say
from common.outputs.image_list import read_list, read_ranking
from common.outputs.record import OutputDirectory
from common.text.language import Language, Words, words_of
from data_tools.rules.colors import find_color

EMBEDDED = Path("data/synthetic")
GENERATOR, RANKER = "pretrained/goods-128/generator", "pretrained/goods-128/ranker"
COLORED = 400  # its training images by which colours are named


@dataclass(frozen=True)
class Options:
    """Run the whole demo."""

    goods: str = "一条蓝色牛仔裤"
    """The sentence for the model that ships, which knows real goods."""
    text: str = "一件红色的连衣裙"
    """The sentence for the model that is trained here, which knows what data_tools.synthetic renders."""
    num_images: int = 8
    """Images to generate and to rank, of each sentence."""
    out: Path = Path("out")
    """Directory for the goods; those of the model that is trained here go into trained/ below it."""
    language: Language = "auto"
    """Of report.html: zh, en, or auto, which follows the locale."""

    @property
    def trained(self) -> Path:
        return self.out / "trained"


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
    program: tuple[str, ...] = ()


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
    return f"text to image recall@1 {row['recall@1']:.0%}, recall@5 {row['recall@5']:.0%}"


def data_quality(folder: Path) -> str:
    return f"{read_json(folder / 'dataset.json')['num_samples']} images with captions"


def goods_quality(out: Path) -> str:
    """Where the best image lies among real ones with their own captions, by the ranker."""
    best = read_ranking(out)["texts"][0]["pictures"][0]
    return f"the best scores above {best['percentile']:.0f} % of real images with their captions"


def ranking_quality(out: Path) -> str:
    """How many of the best four show the colour that the sentence names, by the nearest training images."""
    from evaluation.compare.parts import pixel_colors_of
    from evaluation.metrics.pixel_colors import ColorHistogram
    from evaluation.reference import ReferenceImages

    text = read_list(out)[0][1]["text"]
    train = ReferenceImages.of_split(str(EMBEDDED), "train", 64, limit=COLORED)
    measured = pixel_colors_of(train, range(len(train)), None)
    named = find_color(text, measured.colors)[0] if measured else ""
    best = sorted(out.glob("rank*.png"))[:4]
    if not named or not best:
        return "no colour named"
    seen = measured.named(ColorHistogram().features([Image.open(path) for path in best]))
    return f"{seen.count(named)} of the best {len(best)} are {named}, measured in the pixels"


def run_dir(config: str) -> Path:
    return Path(read_mapping(Path(config))["loop"]["run_dir"])


def stages(options: Options) -> list[Stage]:
    """The commands of the README, in order."""
    vqgan, dalle = run_dir("configs/demo/vqgan.yaml"), run_dir("configs/demo/dalle.yaml")
    ranker = run_dir("configs/demo/ranker.yaml")
    made = ("generate.py", options.text, str(options.num_images), str(options.trained))
    return [
        shipped_goods(options),
        Stage("product-like images rendered here", ("-m", "data_tools.synthetic"), EMBEDDED, data_quality),
        Stage("image tokenizer", ("train_vqgan.py",), vqgan, tokenizer_quality),
        Stage("generator", ("train_dalle.py",), dalle, generator_quality),
        Stage("ranker", ("-m", "rankers.train"), ranker, ranker_quality),
        Stage(
            f"images of {options.text}, ranked",
            (*made, "--checkpoint", str(dalle), "--rank", "--ranker", str(ranker)),
            options.trained,
            ranking_quality,
        ),
    ]


def shipped_goods(options: Options) -> Stage:
    """The first stage: seconds, since nothing is trained."""
    made = ("generate.py", options.goods, str(options.num_images), str(options.out))
    flags = ("--checkpoint", GENERATOR, "--rank", "--ranker", RANKER)
    return Stage(f"real goods: {options.goods}, ranked", (*made, *flags), options.out, goods_quality)


def run(stage: Stage) -> Row:
    """Start the stage's program. Raises ValueError with its command when it fails."""
    say(f"\n== {stage.title}: python {' '.join(stage.program)}")
    started = time.perf_counter()
    code = run_program(stage.program)
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise ValueError(f"`python {' '.join(stage.program)}` ended with code {code}; its last lines say why")
    return Row(
        stage.title, stage.where, time.perf_counter() - started, stage.quality(stage.where), stage.program
    )


def show(rows: Sequence[Row]) -> None:
    from rich.table import Table

    table = Table(title="What was made")
    for column in ("what", "where", "time", "how good"):
        table.add_column(column)
    for row in rows:
        table.add_row(row.title, str(row.where), clock(row.seconds), row.quality)
    table.add_row("in all", "", clock(sum(r.seconds for r in rows)), "", style="bold")
    plain_console().print(table)


# --- the page ------------------------------------------------------------------------------------------------------

SHOWN_DATA, SHOWN_STEPS = 16, 4  # training images, and grids of a training from its first to its last


def write_demo_page(options: Options, rows: Sequence[Row]) -> Path:
    """report.html beside the goods: data, reconstructions, samples while training, rankings and times, in images."""
    from evaluation.report import page

    words = words_of(options.language, "demo")
    vqgan, dalle = run_dir("configs/demo/vqgan.yaml"), run_dir("configs/demo/dalle.yaml")
    parts = [
        _shown(words("Real goods from the model that ships"), options.goods, [options.out / "ranked.png"]),
        _data(words),
        _shown(
            words("Reconstructions by the image tokenizer"),
            words("Above the originals, below what is left of them after 8 x 8 tokens."),
            first_to_last(vqgan / "samples"),
        ),
        _shown(
            words("Samples while the generator is trained"),
            words("The same texts and seeds, from the first steps to the last."),
            first_to_last(dalle / "samples"),
        ),
        _shown(words("What was trained here, best first"), options.text, [options.trained / "ranked.png"]),
        _times(words, rows),
    ]
    with OutputDirectory(options.out) as files:
        return files.write_text("report.html", page(words("The demo, from data to images"), parts, words))


def first_to_last(folder: Path, most: int = SHOWN_STEPS) -> list[Path]:
    """Grids of a training, evenly from the first to the last; maps of the loss beside them are left out."""
    found = sorted(p for p in folder.glob("*.png") if not p.name.startswith("position_bits"))
    if len(found) <= most:
        return found
    return [found[round(i * (len(found) - 1) / (most - 1))] for i in range(most)]


def _shown(title: str, text: str, paths: Sequence[Path]) -> str:
    from evaluation.report import named_image, note, section

    shown = [named_image(path, side=1040) for path in paths if path.is_file()]
    return section(title, note(text), *shown) if shown else ""


def _data(words: Words) -> str:
    from evaluation.reference import ReferenceImages
    from evaluation.report import captioned, section

    train = ReferenceImages.of_split(str(EMBEDDED), "train", 128, limit=SHOWN_DATA)
    shown = [captioned(train.open(i), train.facts(i).caption) for i in range(len(train))]
    return section(words("The training data: images with Chinese captions"), *shown)


def _times(words: Words, rows: Sequence[Row]) -> str:
    from data_tools.report import svg
    from evaluation.report import section, side_by_side, table

    header = [words(name) for name in ("what", "where", "time", "how good", "command")]
    lines = [
        (words(row.title), row.where, clock(row.seconds), row.quality, f"python {' '.join(row.program)}")
        for row in rows
    ]
    lines.append((words("in all"), "", clock(sum(row.seconds for row in rows)), "", ""))
    bars = svg.bars([(words(row.title), row.seconds) for row in rows], words("seconds"), width=720)
    times = side_by_side([("", bars)])
    return section(words("What was made, and how long it took"), times, table(header, lines, (0, 1, 3, 4)))


@command
def main(argv: Sequence[str] | None = None) -> list[Row]:
    options = parse_options(Options, argv, description=__doc__)
    if options.num_images < 1:
        raise ValueError(f"num_images must be at least 1, not {options.num_images}")
    first, *others = stages(options)
    rows = [run(first)]
    say(f"\nreal goods: {(options.out / 'ranked.png').absolute()}")
    say("now the same from nothing; look at that file meanwhile")
    rows += [run(stage) for stage in others]
    show(rows)
    page = write_demo_page(options, rows)
    say(f"real goods      {options.out / 'ranked.png'}")
    say(f"trained here    {options.trained / 'ranked.png'}")
    say(f"the whole story {page.absolute()}")
    say(f'more goods: python generate.py "一双黑色的鞋" 8 out/ --rank --checkpoint {GENERATOR}')
    return rows


if __name__ == "__main__":
    main()
