"""How often the demo makes what it was asked for: 10 categories x 10 colours, best of 4 after reranking.

    python -m benchmarks.quality.demo                       # after make demo; also: make bench-demo
    python -m benchmarks.quality.demo --num-images 8 --cfg-scale 4 --checkpoint runs/dalle

Every image is judged twice: evaluation.judges.goods, fitted to the training images, names the category, and the
colour is measured in the pixels. The target is 90 % for each after reranking. Shares come with Wilson's 95 %
intervals, and with those of the images before reranking and of synthetic ones, which show what is judged wrong.
Writes verdicts.png, where the mistakes are framed, and results.json. Without a judge, one is trained first: five
minutes on a core of a CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from PIL import Image, ImageDraw, ImageFont

from common.config import command, parse_options, read_mapping, to_mapping
from common.console.progress import progress
from common.console.tables import plain_console
from common.files import atomic_path, ensure_writable_directory, write_json
from common.log import say
from dalle.pipeline import TextToImage
from dalle.sampling import SamplingOptions
from data_tools.synthetic.shards import COLORS, KINDS, prompt, render_sample
from evaluation import train_judge
from evaluation.compare.parts import pixel_colors_of
from evaluation.judges.goods import GoodsJudge
from evaluation.metrics.pixel_colors import ColorHistogram, PixelColors
from evaluation.metrics.statistics import wilson
from evaluation.reference import ReferenceImages
from rankers import load_ranker

TARGET = 0.9
JUDGE_RECIPE = "configs/demo/judge.yaml"
COLORED = 400  # training images by which colours are named
CATEGORIES = {
    kind.nouns[0]: name for name, kind in KINDS.items()
}  # as shards and judge call them -> as we do
COLOR_NAMES = {f"{word}\u8272": name for name, word in COLORS.items()}
CONTROL_SEED = 999_001  # of synthetic images on which neither the judge nor any generator was trained
NUM_CONTROL = 300


@dataclass(frozen=True)
class Options:
    """Measure the demo."""

    checkpoint: str = "runs/dalle"
    """Checkpoint directory, run directory or hub id of the generator."""
    ranker: str = "runs/ranker"
    """Name of the ranker, see rankers."""
    out: Path = Path("out/demo_quality")
    """Directory for verdicts.png and results.json."""
    num_images: int = 4
    """Images of each prompt, of which the ranker takes the best."""
    num_prompts: int = 100
    """The first so many of the 100 prompts, which alternate between kinds and colours."""
    seed: int = 0
    """Seed of the images."""
    batch_size: int = 20
    """Images generated side by side; does not change them."""
    sampling: Annotated[SamplingOptions, tyro.conf.arg(name="")] = field(default_factory=SamplingOptions)
    """How tokens are sampled."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    judge: str = ""
    """Judge of the synthetic goods; empty: that of configs/demo/judge.yaml, trained where it is missing."""
    data: str = "data/synthetic"
    """Image shards whose training images name colours."""

    def __post_init__(self) -> None:
        if self.num_images < 1 or self.batch_size < 1:
            raise ValueError(
                f"num_images and batch_size must be at least 1, not {self.num_images} and {self.batch_size}"
            )
        if not 1 <= self.num_prompts <= len(KINDS) * len(COLORS):
            raise ValueError(f"num_prompts must be 1 to {len(KINDS) * len(COLORS)}, not {self.num_prompts}")


@dataclass(frozen=True)
class Verdict:
    """What the judges see in one image, and what was asked for."""

    kind: str
    color: str
    kind_seen: str
    color_seen: str

    @property
    def kind_right(self) -> bool:
        return self.kind == self.kind_seen

    @property
    def color_right(self) -> bool:
        return self.color == self.color_seen


def pairs(count: int) -> list[tuple[str, str]]:
    """Kinds and colours in an order of which every part is mixed: the diagonals of the table."""
    kinds, colors = list(KINDS), list(COLORS)
    table = [(kinds[i], colors[(i + d) % len(colors)]) for d in range(len(colors)) for i in range(len(kinds))]
    return table[:count]


@dataclass(frozen=True)
class Judges:
    """What names categories, and what names colours."""

    categories: GoodsJudge
    colors: PixelColors

    @classmethod
    def load(cls, options: Options) -> "Judges":
        """Raises ValueError for a judge of other goods, or shards of too few colours."""
        run_dir = options.judge or read_mapping(Path(JUDGE_RECIPE))["run_dir"]
        if not options.judge and not (Path(run_dir) / "latest").exists():
            train_judge.main(["--config", JUDGE_RECIPE])
        judge = GoodsJudge.from_pretrained(run_dir, options.device)
        unknown = set(CATEGORIES) - set(judge.words.categories)
        if unknown:
            raise ValueError(
                f"{run_dir} is a judge of other goods, it does not know {min(unknown)}: python -m "
                f"evaluation.train_judge --config {JUDGE_RECIPE}"
            )
        train = ReferenceImages.of_split(options.data, "train", 64, limit=COLORED)
        colors = pixel_colors_of(train, range(len(train)), None)
        if colors is None:
            raise ValueError(f"{options.data} has too few images of known colour to name colours by")
        return cls(judge, colors)

    def verdicts(self, asked: Sequence[tuple[str, str]], images: Sequence[Image.Image]) -> list[Verdict]:
        """One an image."""
        features = self.categories.features(images)
        categories = [CATEGORIES.get(row[0], row[0]) for row in self.categories.top_categories(features)]
        named = self.colors.named(ColorHistogram().features(images))
        colors = [COLOR_NAMES.get(name, name) for name in named]
        seen = zip(asked, categories, colors, strict=True)
        return [Verdict(kind, color, kind_seen, color_seen) for (kind, color), kind_seen, color_seen in seen]


def draw(
    pipeline: TextToImage, asked: Sequence[tuple[str, str]], options: Options
) -> list[list[Image.Image]]:
    """`num_images` images of each prompt."""
    texts = [prompt(kind, color) for kind, color in asked]
    stream = pipeline.generate(
        texts, options.num_images, options.seed, options.sampling, batch_size=options.batch_size
    )
    total = len(texts) * options.num_images
    images = [p.image for p in progress(stream, desc="generating", total=total, unit="image")]
    return [images[i : i + options.num_images] for i in range(0, total, options.num_images)]


def best_of(
    ranker: Any, asked: Sequence[tuple[str, str]], drawn: Sequence[Sequence[Image.Image]]
) -> list[int]:
    """Which image of each prompt the ranker likes best."""
    pairs_of = zip(asked, drawn, strict=True)
    return [
        int(ranker.score(prompt(*pair), images).argmax())
        for pair, images in progress(list(pairs_of), desc="ranking")
    ]


def control(judges: Judges) -> list[Verdict]:
    """The judges on synthetic images they have not seen: nothing can be measured better than this."""
    samples = [render_sample(CONTROL_SEED, index) for index in range(NUM_CONTROL)]
    return judges.verdicts([(s.kind, s.color) for s in samples], [s.image for s in samples])


def shares(verdicts: Sequence[Verdict]) -> dict[str, dict[str, float]]:
    """Shares right with Wilson's 95 % intervals."""
    hits = {
        "kind": sum(v.kind_right for v in verdicts),
        "color": sum(v.color_right for v in verdicts),
        "both": sum(v.kind_right and v.color_right for v in verdicts),
    }
    result = {}
    for name, count in hits.items():
        interval = wilson(count, len(verdicts))
        result[name] = {"share": interval.value, "low": interval.low, "high": interval.high}
    return {**result, "pictures": {"count": len(verdicts)}}


def verdict_grid(
    asked: Sequence[tuple[str, str]], images: Sequence[Image.Image], verdicts: Sequence[Verdict]
) -> Image.Image:
    """Kinds down, colours across; an image that is not what was asked for is framed and says what is seen."""
    cell, label, left, top = 112, 16, 70, 22
    kinds, colors = list(KINDS), list(COLORS)
    page = Image.new("RGB", (left + len(colors) * cell, top + len(kinds) * (cell + label)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for column, color in enumerate(colors):
        pen.text((left + column * cell + cell // 2, top // 2), color, "black", font, anchor="mm")
    for row, kind in enumerate(kinds):
        pen.text((left - 8, top + row * (cell + label) + cell // 2), kind, "black", font, anchor="rm")
    for (kind, color), image, verdict in zip(asked, images, verdicts, strict=True):
        x, y = left + colors.index(color) * cell, top + kinds.index(kind) * (cell + label)
        page.paste(image.resize((cell - 8, cell - 8), Image.Resampling.BICUBIC), (x + 4, y + 4))
        wrong = [verdict.kind_seen] * (not verdict.kind_right) + [verdict.color_seen] * (
            not verdict.color_right
        )
        if wrong:
            pen.rectangle((x + 1, y + 1, x + cell - 2, y + cell - 2), outline=(210, 30, 30), width=3)
            pen.text(
                (x + cell // 2, y + cell + label // 2 - 2),
                f"seen: {', '.join(wrong)}",
                (210, 30, 30),
                font,
                "mm",
            )
    return page


def show(rows: dict[str, dict[str, dict[str, float]]]) -> None:
    """The table on the console."""
    from rich.table import Table

    table = Table("pictures", "number", "kind right", "colour right", "both")
    for name, row in rows.items():
        cells = [
            f"{row[k]['share']:.1%} [{row[k]['low']:.1%}, {row[k]['high']:.1%}]"
            for k in ("kind", "color", "both")
        ]
        table.add_row(name, str(row["pictures"]["count"]), *cells)
    plain_console(width=110).print(table)


@command
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Prints the table; returns it as results.json holds it."""
    options = parse_options(Options, argv, description=__doc__)
    ensure_writable_directory(options.out)
    pipeline = TextToImage.from_pretrained(options.checkpoint, options.device)
    ranker = load_ranker(options.ranker, options.device)
    judges = Judges.load(options)
    asked = pairs(options.num_prompts)
    drawn = draw(pipeline, asked, options)
    chosen = best_of(ranker, asked, drawn)
    verdicts = [
        judges.verdicts([pair] * len(images), images) for pair, images in zip(asked, drawn, strict=True)
    ]
    best = [row[i] for row, i in zip(verdicts, chosen, strict=True)]
    rows = {
        f"best of {options.num_images} after reranking": shares(best),
        "all, without reranking": shares([v for row in verdicts for v in row]),
        "synthetic ones: what the judges get right": shares(control(judges)),
    }
    page = verdict_grid(asked, [images[i] for images, i in zip(drawn, chosen, strict=True)], best)
    with atomic_path(options.out / "verdicts.png") as temporary:
        page.save(temporary, "PNG")
    prompts = [
        {"text": prompt(v.kind, v.color), **vars(v), "picture": i} for v, i in zip(best, chosen, strict=True)
    ]
    results = {
        "options": to_mapping(options),
        "checkpoint": pipeline.sha256,
        "rows": rows,
        "prompts": prompts,
    }
    write_json(options.out / "results.json", results)
    show(rows)
    for name, word in (("kind", "kind"), ("color", "colour")):
        share = shares(best)[name]["share"]
        say(
            f"{word} right: {share:.0%}, the target of {TARGET:.0%} is {'met' if share >= TARGET else 'MISSED'}"
        )
    say(f"verdicts: {options.out / 'verdicts.png'}")
    return results


if __name__ == "__main__":
    main()
