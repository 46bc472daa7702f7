"""What scoring costs over the bare image tower: 64 images, batched, against one forward pass of the same batch.

    python -m benchmarks.ranker_speed                       # the newest ranker, else the one that ships
    python -m benchmarks.ranker_speed --ranker runs/ranker --rounds 20

Limit: 1.15 times the bare forward. Rounds alternate between the two and the ratio is that of the medians, of wall time
and of processor time; the latter holds on a machine that does other things meanwhile. Every round scores images
never seen, so the cache does not help; a last line shows what it saves.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from common.config import command, parse_options
from common.log import say
from rankers import default_ranker, load_ranker

LIMIT = 1.15


@dataclass(frozen=True)
class Options:
    """Measure a ranker."""

    ranker: str = ""
    """Name, see rankers; empty: the newest one trained here, else the one that ships."""
    num_images: int = 64
    """Images of one call."""
    rounds: int = 15
    """Timed rounds of each."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def noise(count: int, size: int, rng: np.random.Generator) -> list[Image.Image]:
    pixels = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(p) for p in pixels]


def seconds(function: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Wall time and this process's processor time of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


@command
def main(argv: Sequence[str] | None = None) -> float:
    """Prints both times; returns their ratio."""
    options = parse_options(Options, argv, description=__doc__)
    ranker = load_ranker(options.ranker or default_ranker(), options.device)
    towers, rng = ranker.towers, np.random.default_rng(0)
    ranker.batch_size = options.num_images
    size = towers.config.image_size
    text = "\u4e00\u4ef6\u7ea2\u8272\u7684\u8fde\u8863\u88d9"
    times: dict[str, list[tuple[float, float]]] = {"bare": [], "score": [], "cached": []}
    for number in range(options.rounds + 2):
        images = noise(options.num_images, size, rng)
        pixels = towers.preprocess(images)

        def bare(pixels: torch.Tensor = pixels) -> None:
            with torch.inference_mode():
                towers.encode_images(pixels)

        def score(images: list[Image.Image] = images) -> None:
            ranker.score(text, images)

        found = {"bare": seconds(bare, towers.device), "score": seconds(score, towers.device)}
        found["cached"] = seconds(score, towers.device)
        if number >= 2:  # the first rounds warm up
            for name, value in found.items():
                times[name].append(value)
    wall = {name: statistics.median(v[0] for v in values) * 1e3 for name, values in times.items()}
    cpu = {name: statistics.median(v[1] for v in values) * 1e3 for name, values in times.items()}
    ratio = wall["score"] / wall["bare"]
    say(f"{options.num_images} images of {size} px on {towers.device}, median of {options.rounds} rounds")
    say(f"bare forward of the image tower {wall['bare']:8.1f} ms, processors {cpu['bare']:8.1f} ms")
    say(f"score of one text               {wall['score']:8.1f} ms, processors {cpu['score']:8.1f} ms")
    say(
        f"ratio                           {ratio:8.3f}, processors {cpu['score'] / cpu['bare']:8.3f} (limit {LIMIT})"
    )
    say(f"the same images again         {wall['cached']:8.1f} ms")
    return ratio


if __name__ == "__main__":
    main()
