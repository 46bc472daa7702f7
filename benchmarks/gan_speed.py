"""Images a second of the GAN: text to PIL images through the pipeline, and the network alone.

    python -m benchmarks.gan_speed                                     # goods at 128 pixels, the size of the recipe
    python -m benchmarks.gan_speed --checkpoint runs/goods_128_gan     # a trained one
    OMP_NUM_THREADS=1 python -m benchmarks.gan_speed --clock cpu       # on a busy machine: processor time, one thread

Goal: 200 images a second at batch 16 on two cores with AVX512-BF16. Speed does not depend on the weights, so without a
checkpoint they are random. Rounds alternate between batch sizes; the fastest of each counts, since the pipeline's time
has a floor and a shared machine only adds to it. The pipeline always computes 16 images at once, whatever it is asked
for, so one image costs as much as sixteen; the network alone is timed at each batch size.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from common.config import command, parse_options
from common.distributed import pick_device
from common.log import say
from common.precision import autocast
from common.text.bert_text import TextTowerConfig, write_text_tower
from gan.model import GeneratorConfig
from gan.pipeline import GanConfig, TextToGan, build_model
from gan.text import open_tokenizer

GOAL = 200.0
TEXT = "\u4e00\u4ef6\u7ea2\u8272\u7684T\u6064"


@dataclass(frozen=True)
class Options:
    """Time a GAN."""

    checkpoint: str = ""
    """Checkpoint or run directory; empty: random weights of `img_size`."""
    img_size: int = 128
    """Side of the images without a checkpoint."""
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64)
    """Images asked for at once."""
    rounds: int = 10
    """Timed rounds of each."""
    clock: Literal["wall", "cpu"] = "wall"
    """wall: time that passes; cpu: time of this process's threads."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def random_pipeline(img_size: int, device: str) -> TextToGan:
    """As large as the recipe for goods: styles of 256, text vectors of 256, a text tower of 192 x 2 layers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "text"
        write_text_tower(folder, [TEXT], TextTowerConfig(192, 2, 4, 40), None)
        config = GanConfig(GeneratorConfig(img_size=img_size), text_dim=256)
        model = build_model(config, folder).to(pick_device(device))
        return TextToGan(model, config, open_tokenizer(folder))


def timed(function: Callable[[], object], device: torch.device, clock: str) -> float:
    now = time.perf_counter if clock == "wall" else time.process_time
    started = now()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return now() - started


@torch.inference_mode()
def network_alone(pipeline: TextToGan, count: int) -> torch.Tensor:
    """Mapping and synthesis of `count` images at once, the text's vector given."""
    generator, device = pipeline.model.generator, pipeline.device
    z = torch.randn(count, pipeline.config.generator.z_dim, device=device)
    text = torch.zeros(count, pipeline.config.text_dim, device=device)
    labels = torch.zeros(count, dtype=torch.long, device=device)
    with autocast(device):
        return generator(z, text, labels, torch.ones(count, dtype=torch.bool, device=device))


@command
def main(argv: Sequence[str] | None = None) -> float:
    """Prints images a second; returns the pipeline's at batch 16, or at the largest batch."""
    options = parse_options(Options, argv, description=__doc__)
    if options.checkpoint:
        pipeline = TextToGan.from_pretrained(options.checkpoint, options.device)
    else:
        pipeline = random_pipeline(options.img_size, options.device)
    best: dict[tuple[str, int], float] = {}
    for number in range(options.rounds + 2):
        for count in options.batch_sizes:
            found = {
                "pipeline": timed(lambda n=count: pipeline(TEXT, n), pipeline.device, options.clock),
                "network": timed(lambda n=count: network_alone(pipeline, n), pipeline.device, options.clock),
            }
            for name, seconds in found.items() if number >= 2 else ():  # the first rounds warm up
                best[name, count] = min(best.get((name, count), seconds), seconds)
    threads, size = torch.get_num_threads(), pipeline.config.generator.img_size
    say(
        f"{size} px on {pipeline.device}, {threads} threads, {options.clock} time, fastest of {options.rounds} rounds"
    )
    for count in options.batch_sizes:
        rates = " | ".join(
            f"{name} {count / best[name, count]:7.1f} images/s" for name in ("pipeline", "network")
        )
        say(f"batch {count:3d} | {rates} | {best['pipeline', count] * 1e3:7.1f} ms a call")
    count = 16 if 16 in options.batch_sizes else max(options.batch_sizes)
    rate = count / best["pipeline", count]
    reached = "reached" if rate >= GOAL else "not reached"
    say(f"goal {GOAL:.0f} images/s at batch 16 on two cores: {reached} ({rate:.1f})")
    return rate


if __name__ == "__main__":
    main()
