"""How well and how fast `border` finds products: 200 synthetic ones with known masks on plain backgrounds.

    python -m benchmarks.quality.whiten                               # one core: taskset -c 0 python -m ...
    python -m benchmarks.quality.whiten --background wood --method grabcut --num-images 50

IoU at a matte of a half; `white`: pixels without any product that are exactly 255 in the result; images/s by the
process's own CPU time, so that other work on the core does not count.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from common.config import command, parse_options
from data_tools.synthetic.shards import COLORS, KINDS, PATTERNS, render_masked
from diffusion.saliency import open_saliency
from diffusion.white_background import Whitener, WhitenOptions


@dataclass(frozen=True)
class Options:
    """Measure a method without weights."""

    num_images: int = 200
    """Products."""
    size: int = 256
    """Side in pixels."""
    background: Literal["plain", "white", "grey", "wood"] = "plain"
    """plain: white and grey in turn."""
    method: Literal["border", "grabcut"] = "border"
    """Method to measure."""
    seed: int = 5
    """Of the products."""


def product(seed: int, index: int, background: str, size: int) -> tuple[Image.Image, np.ndarray, str]:
    """Image, how much of each pixel the product covers (S, S), and whether it is a white one on white."""
    rng = np.random.default_rng((seed, index))
    name = ("white", "grey")[index % 2] if background == "plain" else background
    color = str(rng.choice(list(COLORS)))
    pattern = str(rng.choice(list(PATTERNS), p=(0.6, 0.2, 0.2)))
    image, cover = render_masked(rng, str(rng.choice(list(KINDS))), color, pattern, name, size)
    return image, cover, "white on white" if color == name == "white" else "others"


def measure(options: Options) -> dict[str, Any]:
    """Means over all products, and over those that are not white on white."""
    saliency = open_saliency(options.method)
    whitener = Whitener(WhitenOptions(method=options.method), saliency)
    rows: dict[str, list[tuple[float, float]]] = {"white on white": [], "others": []}
    seconds = 0.0
    for i in range(options.num_images):
        image, cover, group = product(options.seed, i, options.background, options.size)
        started = time.process_time()
        found = whitener(image)
        seconds += time.process_time() - started
        marked, true = saliency.mask(image) > 0.5, cover > 0.5
        iou = (marked & true).sum() / max(1, (marked | true).sum())
        white = (np.asarray(found.image)[cover == 0] == 255).all(1).mean()
        rows[group].append((float(iou), float(white)))
    every = rows["white on white"] + rows["others"]
    result: dict[str, Any] = {"images_per_second": options.num_images / seconds}
    for name, values in (("all", every), *rows.items()):
        if values:
            iou, white = np.mean(values, axis=0)
            result[name] = {"count": len(values), "iou": float(iou), "white": float(white)}
    return result


@command
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Print the measurements."""
    options = parse_options(Options, argv, description=__doc__)
    result = measure(options)
    print(f"{options.method} | {options.background} | {result['images_per_second']:.1f} images/s")
    for name in ("all", "others", "white on white"):
        if name in result:
            row = result[name]
            print(f"  {name:<16} {row['count']:>4} | IoU {row['iou']:.4f} | white {row['white']:.4%}")
    return result


if __name__ == "__main__":
    main()
