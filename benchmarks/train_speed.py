"""How fast is a training step of the generator on this CPU? Against the machine, two peers and DeepSpeed.

    python -m benchmarks.train_speed
    python -m benchmarks.train_speed --rounds 20 --contenders ours llama
    python -m benchmarks.train_speed --device cuda --dim 768 --num-layers 15 --num-heads 12 --batch-size 64 \
        --compile                                                # about 100M parameters on a GPU

Every round runs one step of each contender in turn, so that they share the machine's mood; the fastest step of each
counts, and the median says what a training gets. Same sizes, vocabularies, loss positions, precision (bf16 autocast),
allocator and threads for all. dalle-pytorch takes part where it can be imported, see benchmarks/peer.py.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks import peer
from benchmarks.llama_baseline import LlamaBaseline
from common.config import command, parse_options
from common.distributed import World, batch_plan, pick_device
from common.engine import make_engine
from common.engines.deepspeed import DeepSpeedConfig
from common.files import write_json
from common.log import say
from common.optim import OptimConfig, adamw
from common.precision import Precision, autocast
from dalle import sequence
from dalle.losses import CrossEntropy, LossConfig, dalle_loss
from dalle.model import Dalle, DalleConfig, ModelOptions
from dalle.plan import measure_peak_flops, train_flops
from kernels import accelerate

Contender = Literal["ours", "zero1", "llama", "dalle_pytorch"]


@dataclass(frozen=True)
class Options:
    """Time training steps of the generator and of its peers."""

    batch_size: int = 16
    """Samples a step."""
    dim: int = 256
    """Width."""
    num_layers: int = 8
    """Blocks."""
    num_heads: int = 8
    """Attention heads."""
    text_vocab_size: int = 8192
    """Text pieces."""
    max_text_len: int = 32
    """Text tokens."""
    codebook_size: int = 1024
    """Image codes."""
    grid_size: int = 16
    """Side of the code grid: 256 image tokens."""
    rounds: int = 10
    """Timed steps of each contender."""
    contenders: tuple[Contender, ...] = ("ours", "zero1", "llama", "dalle_pytorch")
    """Who takes part."""
    compile: bool = False
    """Compile our blocks and the baseline's with torch.compile, as train_dalle.py --compile does."""
    device: str = "cpu"
    """cpu or cuda."""
    precision: Precision = "auto"
    """auto takes bf16 autocast where the machine has it."""
    report: Path | None = None
    """JSON file for the metrics."""

    def model_config(self) -> DalleConfig:
        sizes = ModelOptions(dim=self.dim, num_layers=self.num_layers, num_heads=self.num_heads)
        return sizes.config(self.text_vocab_size, 0, self.max_text_len, self.codebook_size, self.grid_size)


@dataclass(frozen=True)
class Batch:
    """Random ids without padding: every position has a loss."""

    text_ids: Tensor  # (B, T)
    image_ids: Tensor  # (B, N)


def make_batch(options: Options) -> Batch:
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch_size, options.max_text_len)
    text_ids = torch.randint(1, options.text_vocab_size, shape, generator=generator)
    shape = (options.batch_size, options.grid_size**2)
    image_ids = torch.randint(options.codebook_size, shape, generator=generator)
    return Batch(text_ids.to(options.device), image_ids.to(options.device))


def our_step(options: Options, batch: Batch, engine_name: str) -> Callable[[], None]:
    """A step as train_dalle.py takes it, under the named engine."""
    device = torch.device(options.device)
    world = World(0, 1, 0, device, "none")
    torch.manual_seed(0)
    model = Dalle(options.model_config()).to(device)
    cross_entropy = CrossEntropy()
    accelerate(model, cross_entropy)
    if options.compile:
        model.compile_blocks()
    engine = make_engine(
        model,
        adamw(model, OptimConfig()),
        world,
        batch_plan(options.batch_size, 1),
        1.0,
        engine_name,
        DeepSpeedConfig(zero_stage=1),
    )
    targets = sequence.text_targets(batch.text_ids, 0)

    def step() -> None:
        for _ in engine.micro_batches({"ids": batch.image_ids}):
            with autocast(device, options.precision):
                output = engine.model(batch.text_ids, batch.image_ids)
            losses = dalle_loss(output, batch.image_ids, targets, len(targets), LossConfig(), cross_entropy)
            engine.backward(losses.total)
        engine.step()

    return step


def peer_step(options: Options, model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """A plain loop around a peer: autocast, backward, clip, AdamW as its trainer makes it."""
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-4, betas=(0.9, 0.95)
    )

    def step() -> None:
        with autocast(torch.device(options.device), options.precision):
            value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def llama_step(options: Options, batch: Batch) -> Callable[[], None]:
    torch.manual_seed(0)
    model = LlamaBaseline(options.model_config()).to(options.device)
    for block in model.blocks if options.compile else ():
        block.compile(dynamic=False)
    return peer_step(options, model, lambda: model.loss(batch.text_ids, batch.image_ids))


def dalle_pytorch_step(options: Options, batch: Batch) -> Callable[[], None] | None:
    """dalle-pytorch 1.6.6 with the same widths and vocabularies; None where it is not installed."""
    if not peer.is_installed():
        say("dalle-pytorch is not installed: left out (benchmarks/peer.py says how to install it)")
        return None
    torch.manual_seed(0)
    model = peer.make_dalle(options.model_config()).to(options.device)
    return peer_step(options, model, lambda: model(batch.text_ids, batch.image_ids, return_loss=True))


def contenders(options: Options, batch: Batch) -> dict[str, Callable[[], None]]:
    makers = {
        "ours": lambda: our_step(options, batch, "plain"),
        "zero1": lambda: our_step(options, batch, "deepspeed"),
        "llama": lambda: llama_step(options, batch),
        "dalle_pytorch": lambda: dalle_pytorch_step(options, batch),
    }
    steps = {name: makers[name]() for name in options.contenders}
    return {name: step for name, step in steps.items() if step is not None}


def race(steps: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every step of each, one step each in turn; two turns warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - started)
    return seconds


@command
def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Print and return the metrics."""
    options = parse_options(Options, argv, description=__doc__)
    device = pick_device(options.device)
    batch = make_batch(options)
    steps = contenders(options, batch)
    peaks = [measure_peak_flops(device, size=4096)]
    raced = race(steps, options.rounds, device)
    best = {name: min(seconds) for name, seconds in raced.items()}
    middle = {name: statistics.median(seconds) for name, seconds in raced.items()}
    peaks.append(measure_peak_flops(device, size=4096))
    flops = options.batch_size * train_flops(options.model_config(), options.max_text_len)
    metrics = {"peak_tflops": max(peaks) / 1e12, "threads": torch.get_num_threads()}
    say(
        f"{options.batch_size} samples a step, {torch.get_num_threads()} threads, peak {max(peaks) / 1e12:.2f} TFLOP/s"
    )
    for name, seconds in best.items():
        metrics |= {f"{name}_seconds": seconds, f"{name}_mfu": flops / seconds / max(peaks)}
        metrics[f"{name}_median_seconds"] = middle[name]
        ratio = ""
        if name != "ours" and "ours" in best:
            of_median = middle[name] / middle["ours"]
            ratio = f", {seconds / best['ours']:.2f} times our step ({of_median:.2f} by medians)"
        say(
            f"{name:14} {seconds * 1000:8.1f} ms a step | {options.batch_size / seconds:7.1f} samples/s | "
            f"{flops / seconds / max(peaks):.1%} of the peak for our operations{ratio}"
        )
    if options.report:
        write_json(options.report, metrics)
    say(json.dumps(metrics))
    return metrics


if __name__ == "__main__":
    main()
