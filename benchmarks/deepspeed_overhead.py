"""What does DeepSpeed cost where it has nothing to shard? One process, the same model, step by step in turn.

    python -m benchmarks.deepspeed_overhead
    python -m benchmarks.deepspeed_overhead --rounds 20 --stages 1

Each round takes one step of the plain engine and one of each ZeRO stage, in an order that rotates, so that all share
the machine's mood. Counts the ratio of the fastest steps; the median of the rounds' ratios tells how noisy they were.
The limit is 1.1 for stage 1.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from common.config import command, parse_options
from common.distributed import World, batch_plan, pick_device
from common.engine import make_engine
from common.engines.deepspeed import DeepSpeedConfig
from common.log import say
from common.optim import OptimConfig, adamw
from common.precision import autocast
from dalle import sequence
from dalle.losses import CrossEntropy, LossConfig, dalle_loss
from dalle.model import Dalle, ModelOptions
from kernels import accelerate

LIMIT = 1.1


@dataclass(frozen=True)
class Options:
    """Time the plain step against ZeRO's."""

    stages: tuple[int, ...] = (1, 2, 3)
    """ZeRO stages to compare with the plain engine."""
    rounds: int = 15
    """Timed steps of each."""
    batch_size: int = 16
    """Samples a step."""
    dim: int = 256
    """Width of the generator."""
    num_layers: int = 8
    """Its blocks."""
    num_heads: int = 8
    """Its attention heads."""
    device: str = "auto"
    """auto, cpu or cuda."""


def make_step(options: Options, stage: int | None) -> Callable[[], None]:
    """One training step as train_dalle.py takes it: 32 text and 256 image tokens, bf16 where the machine has it."""
    device = pick_device(options.device)
    torch.manual_seed(0)
    sizes = ModelOptions(dim=options.dim, num_layers=options.num_layers, num_heads=options.num_heads)
    model = Dalle(sizes.config(8192, 0, 32, 1024, 16)).to(device)
    cross_entropy = CrossEntropy()
    accelerate(model, cross_entropy)
    text_ids = torch.randint(1, 8192, (options.batch_size, 32), device=device)
    image_ids = torch.randint(1024, (options.batch_size, 256), device=device)
    targets = sequence.text_targets(text_ids, 0)
    world, plan = World(0, 1, 0, device, "none"), batch_plan(options.batch_size, 1)
    name = "plain" if stage is None else "deepspeed"
    engine = make_engine(
        model, adamw(model, OptimConfig()), world, plan, 1.0, name, DeepSpeedConfig(zero_stage=stage or 0)
    )

    def step() -> None:
        for _ in engine.micro_batches({"ids": image_ids}):
            with autocast(device):
                output = engine.model(text_ids, image_ids)
            losses = dalle_loss(output, image_ids, targets, len(targets), LossConfig(), cross_entropy)
            engine.backward(losses.total)
        engine.step()  # reads the gradient norm, so a GPU has finished too

    return step


@command
def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    options = parse_options(Options, argv, description=__doc__)
    if set(options.stages) - {1, 2, 3}:
        raise ValueError(
            f"stages must be among 1, 2 and 3, not {options.stages}: stage 0 is the plain engine"
        )
    contenders = {"plain": make_step(options, None)}
    contenders |= {f"zero{stage}": make_step(options, stage) for stage in options.stages}
    names, seconds = list(contenders), {name: [] for name in contenders}
    for round_number in range(options.rounds + 2):
        shift = round_number % len(names)
        for name in names[shift:] + names[:shift]:
            started = time.perf_counter()
            contenders[name]()
            if round_number >= 2:  # the first two warm up allocators and traces
                seconds[name].append(time.perf_counter() - started)
    metrics = {}
    for name in names:
        ratios = [a / b for a, b in zip(seconds[name], seconds["plain"], strict=True)]
        best = min(seconds[name])
        metrics[name] = {
            "ms": round(1e3 * best, 1),
            "ratio": round(best / min(seconds["plain"]), 3),
            "median_ratio": round(statistics.median(ratios), 3),
        }
        say(f"{name:6} {json.dumps(metrics[name])}")
    if "zero1" in metrics:
        ratio = metrics["zero1"]["ratio"]
        say(
            f"zero1 costs {ratio} of the plain step: the limit of {LIMIT} is {'kept' if ratio <= LIMIT else 'MISSED'}"
        )
    return metrics


if __name__ == "__main__":
    main()
