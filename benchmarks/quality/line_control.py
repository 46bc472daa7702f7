"""How well images follow drawings: edge F1, category, colour, seconds of generator and ControlNet in one table.

    python -m benchmarks.quality.line_control --generator runs/goods_128_lines --controlnet runs/goods_128_controlnet \\
        --judge runs/goods_128_judge
    python -m benchmarks.quality.line_control --like --generator runs/goods_128_lines     # same product, five colours
    python -m benchmarks.quality.line_control --generator runs/line_pairs \\
        --pairs ../shared/data/line_pairs/val/val_data.parquet

Held-out images of `--shards` give drawing (Canny at 128 pixels) and caption. Each system makes one image with the
drawing and one without, of the same seed. Category by the judge's first guess where one is named; colour by the nearest
training images, where the caption's colour is known. `--like`: garments of the validation split in five colours.
"""

import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from common.config import command, parse_options
from common.console.progress import progress
from common.files import write_json
from common.image import make_grid
from common.square import resize_square
from dalle import inpaint
from dalle.lines import LineControl
from dalle.pipeline import TextToImage
from dalle.sampling import SamplingOptions
from data_tools.images.decode import decode
from data_tools.images.line_drawings import LINE_MEMBER, extract, fit_lines, read_drawing
from data_tools.ingest.records import Record
from data_tools.lines import drawing_of
from data_tools.readers.detect import open_source
from data_tools.shards.index import ShardIndex
from data_tools.shards.loader import IMAGE_SUFFIXES
from diffusion.controlnet.pipeline import ControlPipeline
from diffusion.sampling import SamplingOptions as DiffusionSampling
from evaluation.judges.goods import GoodsJudge
from evaluation.metrics.edges import edge_score
from evaluation.metrics.pixel_colors import ColorHistogram, PixelColors

Follow = Callable[[str, np.ndarray | None, int], Image.Image]
"""(text, drawing (S, S) uint8 or None, index of the seed) -> an image."""
COLORS = ("红色", "蓝色", "黑色", "白色", "绿色")
SHOWN = 6  # rows of the grid


@dataclass(frozen=True)
class Options:
    """Measure line control."""

    generator: str = ""
    """Generator that was trained with --lines; empty: none."""
    controlnet: str = ""
    """ControlNet of diffusion.train_controlnet; empty: none."""
    shards: str = "../shared/data/goods"
    """Image shards with a val split."""
    pairs: Path | None = None
    """List of given drawings with titles instead, in any layout of pairs."""
    judge: str = ""
    """Judge of categories; empty: categories are not counted."""
    num_samples: int = 100
    """Drawings."""
    like: bool = False
    """Measure generate.py --like instead: garments in five colours."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """Of the generator."""
    diffusion: DiffusionSampling = field(default_factory=DiffusionSampling)
    """Of the ControlNet's base."""
    out: Path = Path("out/line_control")
    """Numbers go to OUT.json, a grid to OUT.png."""
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        if not (self.generator or self.controlnet) or (self.like and not self.generator):
            raise ValueError("name a --generator (for --like too) or a --controlnet, or both")


@dataclass(frozen=True)
class Sample:
    """A held-out image with its drawing."""

    text: str
    image: Image.Image
    lines: np.ndarray
    category: str
    color: str


def read_samples(options: Options, size: int) -> list[Sample]:
    """The first held-out samples at `size` pixels."""
    if options.pairs:
        found = (item for item in open_source(options.pairs) if isinstance(item, Record) and drawing_of(item))
        return [_pair(record, size) for record in itertools.islice(found, options.num_samples)]
    index = ShardIndex.open(options.shards, "val").require(*IMAGE_SUFFIXES)
    samples = [_sample(index, i, size) for i in range(len(index))]
    if options.like:
        samples = [s for s in samples if s.color and s.category]
    return [s for s in samples if s.lines.any()][: options.num_samples]


def _pair(record: Record, size: int) -> Sample:
    lines = fit_lines(read_drawing(drawing_of(record)).lines, size)
    return Sample(record.captions[0], resize_square(decode(record.image), size), lines, "", "")


def _sample(index: ShardIndex, i: int, size: int) -> Sample:
    members = index.read(i, (*IMAGE_SUFFIXES, LINE_MEMBER, "txt", "json"))
    meta = json.loads(members["json"])
    data = next(d for n, d in members.items() if n in IMAGE_SUFFIXES)
    image = resize_square(decode(data), size)
    text = members["txt"].decode().splitlines()[0]
    return Sample(
        text, image, extract(image, "canny"), meta.get("label_zh") or "", meta.get("color_zh") or ""
    )


def colors_of_reference(shards: str) -> PixelColors:
    """Names colours as the captions of the training images do."""
    index = ShardIndex.open(shards, "train").require(*IMAGE_SUFFIXES)
    images, names = [], []
    for i in range(len(index)):
        name = json.loads(index.read(i, ("json",))["json"]).get("color_zh")
        if name:
            images.append(resize_square(decode(next(iter(index.read(i, IMAGE_SUFFIXES).values()))), 64))
            names.append(name)
    return PixelColors(ColorHistogram().features(images), names)


def systems(options: Options) -> tuple[dict[str, Follow], int]:
    """Each system as a function, and the side of their images."""
    found: dict[str, Follow] = {}
    sizes = set()
    if options.generator:
        pipeline = TextToImage.from_pretrained(options.generator, options.device)
        sizes.add(pipeline.image_tokenizer.image_size)

        def follow(text: str, lines: np.ndarray | None, index: int) -> Image.Image:
            control = None if lines is None else LineControl(lines)
            return next(pipeline.generate([text], 1, index, options.sampling, line=control)).image

        found["generator"] = follow
    if options.controlnet:
        control_pipeline = ControlPipeline.open(options.controlnet, device=options.device)
        sizes.add(control_pipeline.image_size)
        side = control_pipeline.image_size

        def follow_control(text: str, lines: np.ndarray | None, index: int) -> Image.Image:
            drawing = np.zeros((side, side), np.uint8) if lines is None else lines
            scale = 0.0 if lines is None else 1.0
            return control_pipeline(text, drawing, 1, 0, options.diffusion, scale, first=index)[0]

        found["controlnet"] = follow_control
    if len(sizes) > 1:
        raise ValueError(f"the two systems make images of {sorted(sizes)} pixels: measure them apart")
    return found, sizes.pop()


def score(
    images: Sequence[Image.Image], samples: Sequence[Sample], options: Options, colors: PixelColors | None
) -> dict[str, float]:
    """Edge F1, and the shares whose category and colour are those of the sample."""
    edges = [edge_score(image, s.lines) for image, s in zip(images, samples, strict=True)]
    result = {"edge_f1": float(np.mean([e.f1 for e in edges]))}
    result["edge_recall"] = float(np.mean([e.recall for e in edges]))
    named = [i for i, s in enumerate(samples) if colors and s.color in colors.colors]
    if named:
        found = colors.named(ColorHistogram().features([images[i] for i in named]))
        result["color"] = float(np.mean([f == samples[i].color for f, i in zip(found, named, strict=True)]))
    if options.judge:
        judge = GoodsJudge.from_pretrained(options.judge)
        named = judge.top_categories(judge.features(images))
        known = [i for i, s in enumerate(samples) if s.category in judge.words.categories]
        if not known:
            raise ValueError(f"{options.judge} knows no category of the drawings: leave --judge out")
        result["category"] = float(np.mean([named[i] == [samples[i].category] for i in known]))
    return result


def measure_control(options: Options) -> dict[str, Any]:
    """Every system with and without drawings."""
    found, size = systems(options)
    samples = read_samples(options, size)
    colors = None if options.pairs else colors_of_reference(options.shards)
    rows: dict[str, Any] = {"samples": len(samples)}
    grid = [
        [s.image for s in samples[:SHOWN]],
        [Image.fromarray(s.lines).convert("RGB") for s in samples[:SHOWN]],
    ]
    for name, follow in found.items():
        for way in ("without", "with"):
            started = time.perf_counter()
            images = [
                follow(s.text, s.lines if way == "with" else None, i)
                for i, s in enumerate(progress(samples, desc=f"{name} {way}", unit="image"))
            ]
            seconds = (time.perf_counter() - started) / len(samples)
            rows[f"{name} {way}"] = score(images, samples, options, colors) | {"seconds": seconds}
            grid.append(images[:SHOWN])
    _write(options, rows, grid)
    return rows


def measure_like(options: Options) -> dict[str, Any]:
    """Each garment in five colours: the share of images whose pixels have the text's colour, and edge F1."""
    pipeline = TextToImage.from_pretrained(options.generator, options.device)
    samples = read_samples(options, pipeline.image_tokenizer.image_size)
    colors = colors_of_reference(options.shards)
    images, asked, edges = [], [], []
    grid = []
    for i, sample in enumerate(progress(samples, unit="garment")):
        source = inpaint.keep_background(pipeline.image_tokenizer, sample.image)
        row = [sample.image]
        for color in COLORS:
            text = (
                sample.text.replace(sample.color, color)
                if sample.color in sample.text
                else color + sample.text
            )
            line = LineControl(sample.lines)
            made = next(pipeline.generate([text], 1, i, options.sampling, source=source, line=line)).image
            images.append(made)
            asked.append(color)
            edges.append(edge_score(made, sample.lines).f1)
            row.append(made)
        grid += [row] if len(grid) < SHOWN else []
    named = colors.named(ColorHistogram().features(images))
    right = [found == color for found, color in zip(named, asked, strict=True)]
    rows = {"garments": len(samples), "color": float(np.mean(right)), "edge_f1": float(np.mean(edges))}
    rows |= {
        color: float(np.mean([r for r, a in zip(right, asked, strict=True) if a == color]))
        for color in COLORS
    }
    _write(options, rows, grid)
    return rows


def _write(options: Options, rows: dict[str, Any], grid: list[list[Image.Image]]) -> None:
    write_json(options.out.with_suffix(".json"), rows)
    make_grid([image for row in grid for image in row], columns=len(grid[0])).save(
        options.out.with_suffix(".png")
    )


@command
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Print and write the measurements."""
    options = parse_options(Options, argv, description=__doc__)
    rows = measure_like(options) if options.like else measure_control(options)
    for name, row in rows.items():
        values = row if isinstance(row, dict) else {"": row}
        print(f"{name:<20} " + " | ".join(f"{n} {v:.3f}" for n, v in values.items()))
    return rows


if __name__ == "__main__":
    main()
