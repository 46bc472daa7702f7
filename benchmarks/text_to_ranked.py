"""How long from a text to ranked PNG files, once everything is loaded? The goal on a GPU is under one second for 8.

    python -m benchmarks.text_to_ranked                                   # the newest generator and ranker
    python -m benchmarks.text_to_ranked --checkpoint runs/dalle --ranker runs/ranker --device cuda

A service's view: models are loaded and warm, every round takes a new seed, samples, decodes, scores, orders and writes
rank00.png ... to a temporary folder. Prints the median and the slowest round, and where the time goes.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from common.config import command, parse_options
from common.log import say
from dalle import default_checkpoint
from dalle.engines import FastOptions
from dalle.pipeline import TextToImage
from dalle.sampling import SamplingOptions
from rankers import default_ranker, load_ranker

GOAL = 1.0


@dataclass(frozen=True)
class Options:
    """Time a text's way to ranked images."""

    text: str = "一件红色的连衣裙"
    """What to generate."""
    num_images: int = 8
    """Images generated side by side."""
    checkpoint: str = ""
    """Generator; empty: the newest, else the one that ships."""
    ranker: str = ""
    """Name of a ranker; empty: the newest, else the one that ships."""
    rounds: int = 5
    """Timed rounds after one that warms up."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    sampling: Annotated[SamplingOptions, tyro.conf.arg(name="")] = field(default_factory=SamplingOptions)
    fast: FastOptions = field(default_factory=FastOptions)

    def __post_init__(self) -> None:
        if self.num_images < 1 or self.rounds < 1:
            raise ValueError(
                f"num_images and rounds must be at least 1, not {self.num_images}, {self.rounds}"
            )


@command
def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Print and return the metrics."""
    options = parse_options(Options, argv, description=__doc__)
    checkpoint = options.checkpoint or default_checkpoint()
    pipeline = TextToImage.from_pretrained(checkpoint, options.device, options.fast)
    ranker = load_ranker(options.ranker or default_ranker(), options.device)
    stages: dict[str, list[float]] = {"draw": [], "rank": [], "write": [], "all": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.rounds + 1):
            times = [time.perf_counter()]
            drawn = pipeline.generate(
                [options.text], options.num_images, seed, options.sampling, batch_size=options.num_images
            )
            images = [image.image for image in drawn]
            times.append(time.perf_counter())
            order = ranker.score(options.text, images).argsort(descending=True).tolist()
            times.append(time.perf_counter())
            for rank, i in enumerate(order):
                images[i].save(Path(folder) / f"rank{rank:02d}.png")
            times.append(time.perf_counter())
            if seed:
                for name, start, end in (("draw", 0, 1), ("rank", 1, 2), ("write", 2, 3), ("all", 0, 3)):
                    stages[name].append(times[end] - times[start])
    metrics = {name: statistics.median(seconds) for name, seconds in stages.items()}
    metrics["slowest"] = max(stages["all"])
    shown = ", ".join(f"{name} {metrics[name]:.3f} s" for name in ("draw", "rank", "write"))
    verdict = "reached" if metrics["all"] < GOAL else "missed"
    if pipeline.device.type != "cuda":
        verdict = "not measured here"
    say(
        f"{options.num_images} ranked images in {metrics['all']:.3f} s (slowest {metrics['slowest']:.3f} s) on "
        f"{pipeline.device}: {shown}; the goal of {GOAL:g} s on a GPU: {verdict}"
    )
    say(json.dumps(metrics))
    return metrics


if __name__ == "__main__":
    main()
