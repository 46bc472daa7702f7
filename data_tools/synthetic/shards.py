"""The embedded default: product-like images drawn by us, with Chinese captions, as image shards.

    python -m data_tools.synthetic data/synthetic
    python -m data_tools.synthetic data/synthetic_128 --image-size 128 --num-train 20000

Ten kinds of goods in ten colours, plain, striped or dotted, on white, grey or wooden background, with
proportions, size, place, tilt, light and outline drawn at random, so that no two images are the same.
Sample `index` of `seed` is a pure function of the two; validation samples have indices from VAL_START on.
Nothing is downloaded; the images are CC0.
"""

import functools
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image

from common.config import command, parse_options
from common.files import ensure_writable_directory, read_json, write_json
from common.lock import locked
from data_tools.ingest.records import Record
from data_tools.parallel import BATCH, cpu_count, ordered_map
from data_tools.shards.image_shards import DATASET_FILE, ShardWriter
from data_tools.synthetic.rendering import Background, Look, Pattern, render
from data_tools.synthetic.shapes import SHAPES
from data_tools.synthetic.words import BACKGROUNDS, COLOR_RGB, COLORS, KINDS, PATTERNS, prompt, write_caption

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "COLOR_RGB",
    "EMBEDDED",
    "KINDS",
    "PATTERNS",
    "Sample",
    "embedded_default",
    "ensure_synthetic",
    "prompt",
    "render_goods",
    "render_masked",
    "render_sample",
    "write_caption",
]

EMBEDDED = Path("data/synthetic")
VAL_START = 1_000_000_000
SAMPLES_PER_SHARD = 1000
RECIPE_FILE = "synthetic.json"
WEBP_QUALITY = 92


@dataclass(frozen=True)
class Sample:
    """One image and what it shows; the fields are keys of KINDS, COLORS, PATTERNS and BACKGROUNDS."""

    image: Image.Image
    caption: str
    kind: str
    color: str
    pattern: str
    background: str


@dataclass(frozen=True)
class SyntheticOptions:
    """Which images to draw, and where to."""

    dst: tyro.conf.Positional[Path] = EMBEDDED
    """Folder of the shards."""
    num_train: int = 8000
    """Images to train on."""
    num_val: int = 500
    """Images held out."""
    image_size: int = 64
    """Side in pixels."""
    seed: int = 0
    """Another seed draws other images."""
    num_workers: int = 0
    """Processes that draw; 0 uses every core."""

    def __post_init__(self) -> None:
        if self.num_train < 1 or self.num_val < 0:
            counts = f"{self.num_train} and {self.num_val}"
            raise ValueError(f"num_train must be at least 1 and num_val at least 0, not {counts}")
        if self.num_train > VAL_START:
            raise ValueError(f"num_train must be at most {VAL_START}, not {self.num_train}")
        if not 16 <= self.image_size <= 1024:
            raise ValueError(f"image_size must be 16 to 1024 pixels, not {self.image_size}")
        if self.seed < 0 or self.num_workers < 0:
            raise ValueError(
                f"seed and num_workers must be 0 or more, not {self.seed} and {self.num_workers}"
            )


# --- one sample -------------------------------------------------------------------------------------------


def render_sample(seed: int, index: int, image_size: int = 64) -> Sample:
    """Sample `index` of `seed`: the same whatever else was drawn before, the same scene at any size."""
    rng = np.random.default_rng((seed, index))
    kind, color = _pick(rng, KINDS), _pick(rng, COLORS)
    pattern = _pick(rng, PATTERNS, (0.6, 0.2, 0.2))
    background = _pick(rng, BACKGROUNDS, (0.4, 0.3, 0.3))
    caption = write_caption(rng, kind, color, pattern, background)
    return Sample(
        render_goods(rng, kind, color, pattern, background, image_size),
        caption,
        kind,
        color,
        pattern,
        background,
    )


def render_goods(
    rng: np.random.Generator, kind: str, color: str, pattern: str, background: str, image_size: int = 64
) -> Image.Image:
    """An image of the named goods; the rest is drawn from `rng`. Raises ValueError for unknown names."""
    return render_masked(rng, kind, color, pattern, background, image_size)[0]


def render_masked(
    rng: np.random.Generator, kind: str, color: str, pattern: str, background: str, image_size: int = 64
) -> tuple[Image.Image, np.ndarray]:
    """The same image and the share of each pixel that the goods cover: (S, S) in [0, 1]; shadows are none of them."""
    for name, table in ((kind, KINDS), (color, COLORS), (pattern, PATTERNS), (background, BACKGROUNDS)):
        if name not in table:
            raise ValueError(f"{name!r} is none of {', '.join(table)}")
    goods = SHAPES[kind](rng)
    return render(goods, _look(rng, color, pattern, background, goods.standing), image_size)


def _look(
    rng: np.random.Generator, color: str, pattern: Pattern, background: Background, standing: bool
) -> Look:
    jitter = rng.uniform(0.93, 1.05) if color != "white" else rng.uniform(0.97, 1.02)
    shade = np.asarray(COLOR_RGB[color]) * jitter + rng.uniform(-6, 6, 3) * (0.3 if color == "white" else 1.0)
    trims = ((222, 220, 214), (70, 70, 76), (150, 152, 158))[
        : 2 if background == "grey" else 3
    ]  # seen on the background
    return Look(
        color=tuple(np.clip(shade, 0, 255).tolist()),
        accent=(150, 154, 164) if color == "white" else (244, 243, 238),
        trim=trims[rng.integers(len(trims))],
        pattern=pattern,
        background=background,
        size=rng.uniform(0.68, 0.88),
        center=tuple(rng.uniform(-1, 1, 2).tolist()),
        tilt=rng.normal() * (2.5 if standing else 6.0),
        stretch=rng.uniform(0.92, 1.09),
        flip=bool(rng.random() < 0.5),
        outline=rng.uniform(0.6, 1.2) if color == "white" or rng.random() < 0.6 else 0.0,
        light=rng.uniform(40, 140),
        depth=rng.uniform(0.7, 1.0),
        pattern_period=rng.uniform(0.34, 0.5),
        pattern_angle=float(rng.choice([0, 0, 90, 45, -45])) + rng.uniform(-4, 4),
        background_tone=rng.uniform(-1, 1),
        background_phase=rng.uniform(0, 10),
        background_angle=rng.uniform(0, 360),
    )


def _pick(rng: np.random.Generator, table: dict[str, Any], weights: tuple[float, ...] | None = None) -> str:
    return str(rng.choice(list(table), p=weights))


# --- shards -----------------------------------------------------------------------------------------------


def make_record(index: int, seed: int, image_size: int) -> Record:
    """Sample `index` of `seed` as WebP bytes with its caption and attributes."""
    sample = render_sample(seed, index, image_size)
    buffer = io.BytesIO()
    sample.image.save(buffer, "WEBP", quality=WEBP_QUALITY, method=2)
    meta = {
        "source": "synthetic",
        "license": "CC0-1.0",
        "label": sample.kind,
        "label_zh": KINDS[sample.kind].nouns[0],
        "kind": sample.kind,
        "color": sample.color,
        "color_zh": COLORS[sample.color] + "色",
        "pattern": sample.pattern,
        "ground": sample.background,
    }
    return Record(f"{index:010d}", buffer.getvalue(), "webp", (sample.caption,), meta, f"synthetic:{index}")


def embedded_default(image_size: int) -> Path:
    """Folder of the embedded default at that side in pixels: what one command renders is in no other one's way."""
    return EMBEDDED if image_size == 64 else EMBEDDED.with_name(f"{EMBEDDED.name}_{image_size}")


def ensure_synthetic(
    dst: Path,
    image_size: int = 64,
    num_train: int = 8000,
    num_val: int = 500,
    seed: int = 0,
    num_workers: int = 0,
) -> Path:
    """Make the shards in `dst` where they are missing, saying so, and return `dst`.

    Whole shards of an interrupted run are kept; of several processes one draws and the others wait. Raises
    ValueError where `dst` holds anything else, or synthetic images of another recipe.
    """
    options = SyntheticOptions(Path(dst), num_train, num_val, image_size, seed, num_workers)
    recipe = _recipe(options)
    _check_destination(options.dst, recipe)
    if _is_whole(options):
        print(f"synthetic images: {num_train} + {num_val} in {options.dst}, reused", flush=True)
        return options.dst
    ensure_writable_directory(options.dst)
    with locked(options.dst, waits=True):  # alone among the processes of this machine
        if not _is_whole(options):  # another process may have drawn them while this one waited
            print(f"synthetic images: drawing {num_train} + {num_val} into {options.dst}", flush=True)
            write_json(options.dst / RECIPE_FILE, recipe)
            _render_missing(options)
    return options.dst


def _is_whole(options: SyntheticOptions) -> bool:
    dataset, expected = options.dst / DATASET_FILE, _expected_shards(options)
    there = dataset.is_file() and all((options.dst / name).is_file() for name in expected)
    return there and read_json(dataset)["shards"] == expected


def _recipe(options: SyntheticOptions) -> dict[str, Any]:
    names = ("num_train", "num_val", "image_size", "seed")
    return {**{n: getattr(options, n) for n in names}, "drawing": drawing_fingerprint()}


@functools.cache
def drawing_fingerprint() -> str:
    """Changes when the drawing code, or Pillow's, draws other images or writes other captions."""
    digest = hashlib.sha256()
    for index in range(16):
        sample = render_sample(0, index, 32)
        digest.update(sample.image.tobytes() + sample.caption.encode())
    return digest.hexdigest()[:16]


def _check_destination(dst: Path, recipe: dict[str, Any]) -> None:
    if not dst.exists():
        return
    if not dst.is_dir():
        raise ValueError(f"{dst} is a file: name a folder for the synthetic images")
    file = dst / RECIPE_FILE
    if not file.is_file():
        if any(dst.glob("*.tar")):
            raise ValueError(f"{dst} holds other shards: name another folder for the synthetic images")
        return
    found = read_json(file)
    differing = [f"{k} {found.get(k)} instead of {v}" for k, v in recipe.items() if found.get(k) != v]
    if differing:
        raise ValueError(
            f"{dst} holds synthetic images with {', '.join(differing)}: delete it or name another folder"
        )


def _splits(options: SyntheticOptions) -> list[tuple[str, int, int]]:
    return [("train", 0, options.num_train), ("val", VAL_START, options.num_val)]


def _expected_shards(options: SyntheticOptions) -> dict[str, int]:
    counts = {}
    for split, _, total in _splits(options):
        for i, start in enumerate(range(0, total, SAMPLES_PER_SHARD)):
            counts[f"{split}-{i:05d}.tar"] = min(SAMPLES_PER_SHARD, total - start)
    return counts


def _render_missing(options: SyntheticOptions) -> None:
    from common.console.progress import progress

    expected = _expected_shards(options)
    whole = {name: count for name, count in expected.items() if (options.dst / name).is_file()}
    total = options.num_train + options.num_val
    workers = options.num_workers or cpu_count()
    draw = functools.partial(_draw, seed=options.seed, image_size=options.image_size)
    with progress(total=total, desc="rendering", unit=" images") as bar:
        for split, first, count in _splits(options):
            kept = _leading(whole, split)
            done = sum(kept.values())
            bar.update(done)
            missing = range(first + done, first + count)
            batches = ((None, missing[i : i + BATCH]) for i in range(0, len(missing), BATCH))
            with ShardWriter(options.dst, split, SAMPLES_PER_SHARD, shards=kept) as writer:
                for _, records in ordered_map(draw, batches, workers, _crashed):
                    for record in records:
                        writer.write(record)
                    bar.update(len(records))


def _draw(indices: Sequence[int], seed: int, image_size: int) -> list[Record]:
    return [make_record(index, seed, image_size) for index in indices]


def _crashed(index: int) -> Record:
    raise RuntimeError(f"the process that rendered image {index} was killed, perhaps for want of memory")


def _leading(whole: dict[str, int], split: str) -> dict[str, int]:
    """The unbroken run of shards from number 0 on: the writer continues behind it."""
    kept: dict[str, int] = {}
    while (name := f"{split}-{len(kept):05d}.tar") in whole:
        kept[name] = whole[name]
    return kept


@command
def main(argv: list[str] | None = None) -> None:
    """Draw the synthetic data set."""
    options = parse_options(SyntheticOptions, argv, description=__doc__.split("\n\n", 1)[0])
    ensure_synthetic(**vars(options))
