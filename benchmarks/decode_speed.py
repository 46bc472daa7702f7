"""How fast is decoding? One step of each form of the generator against the floor that the machine sets, and a peer.

    python -m benchmarks.decode_speed
    python -m benchmarks.decode_speed --sizes 26m --batch-sizes 8 --contenders packed_bf16 dalle_pytorch
    python -m benchmarks.decode_speed --device cuda                     # eager and CUDA graphs in turn
    OMP_NUM_THREADS=1 python -m benchmarks.decode_speed --clock cpu     # on a busy machine: processor time, one thread

The floor of a step is the larger of two times: reading a buffer as large as all weights that it reads and the filled
half of the cache, in bfloat16; and as many operations in square products of bfloat16, or of float32 where the machine
has no bfloat16. A token's floor is that and its share of the operations of the text. All are done in turn with the
sampling of whole images, and of each the fastest round counts: what a shared machine's memory gives for a
millisecond is not what it gives for an image. dalle-pytorch 1.6.6 (26m, same widths and vocabularies, its cache
repaired) takes part where it can be imported, see benchmarks/peer.py.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks import peer
from common.config import command, parse_options
from common.distributed import pick_device
from common.files import write_json
from common.log import say
from common.precision import has_native_bf16
from dalle import sequence
from dalle.engines import FastOptions, prepare
from dalle.model import Dalle, DalleConfig, ModelOptions, SizeName
from dalle.plan import synchronize
from dalle.sampling import SamplingOptions, noise_generator, sample_ids

Contender = Literal[
    "torch_fp32", "torch_bf16", "packed_fp32", "packed_bf16", "packed_int8", "cpu_kernel_bf16", "cpu_kernel_int8",
    "cuda_graph_bf16", "dalle_pytorch",
]  # fmt: skip
ON_CPU = ("torch_fp32", "packed_bf16", "packed_int8", "cpu_kernel_bf16", "cpu_kernel_int8", "dalle_pytorch")
ON_GPU = ("torch_bf16", "cuda_graph_bf16", "dalle_pytorch")
TYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}
TEXT_VOCAB, TEXT_LEN, CODES, GRID = 8192, 32, 1024, 16


@dataclass(frozen=True)
class Options:
    """Time decoding."""

    sizes: tuple[SizeName, ...] = ("26m", "110m")
    """Rows of the size table."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Images generated side by side."""
    cfg_scales: tuple[float, ...] = (1.0, 3.0)
    """1 is without guidance; else every image takes two rows."""
    contenders: tuple[Contender, ...] = ()
    """Who takes part; empty: all that make sense on the device."""
    rounds: int = 3
    """Timed rounds."""
    device: str = "cpu"
    """cpu or cuda."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: processor time of this process, meaningful with one thread alone."""
    report: Path | None = None
    """JSON file for the metrics."""

    def __post_init__(self) -> None:
        if self.clock == "cpu" and (torch.get_num_threads() > 1 or self.device != "cpu"):
            raise ValueError("--clock cpu needs one thread on a CPU: set OMP_NUM_THREADS=1")

    @property
    def names(self) -> tuple[Contender, ...]:
        return self.contenders or (ON_CPU if self.device == "cpu" else ON_GPU)

    def seconds(self, work: Callable[[], object]) -> float:
        """Time of one call."""
        clock = time.process_time if self.clock == "cpu" else time.perf_counter
        synchronize(torch.device(self.device))
        started = clock()
        work()
        synchronize(torch.device(self.device))
        return clock() - started


@dataclass(frozen=True)
class Floor:
    """What a token costs at least, on average over the positions of an image."""

    num_bytes: float
    operations: float
    text_operations: float

    def reading(self, options: Options) -> Callable[[], object]:
        """Reads as many bytes as an image's steps must."""
        buffer = torch.ones(int(self.num_bytes) // 4, device=options.device)
        return lambda: [buffer.sum() for _ in range(GRID**2)]

    @staticmethod
    def computing(options: Options, operations: float, size: int = 2048) -> Callable[[], object]:
        """Square products with as many operations as an image's steps, in bfloat16 where the machine has it."""
        device = torch.device(options.device)
        dtype = torch.bfloat16 if has_native_bf16(device) else torch.float32
        a = torch.randn(size, size, device=device).to(dtype)
        times = operations * GRID**2 / (2.0 * size**3)
        rest = a[: max(1, round(size * (times % 1)))]
        return lambda: [a @ a for _ in range(int(times))] + [rest @ a]


def floor(model: Dalle, rows: int, texts: int) -> Floor:
    c = model.config
    weights = sum(m.weight.numel() for m in model.blocks.modules() if isinstance(m, nn.Linear))
    weights += c.codebook_size * c.dim
    filled = TEXT_LEN + c.num_image_tokens / 2
    cache = 2 * c.num_layers * rows * c.num_kv_heads * filled * c.head_dim
    operations = 2 * rows * weights + 4 * c.num_layers * rows * c.num_heads * filled * c.head_dim
    # without the head; null rows are all alike and need it once
    text_operations = 2 * texts * (TEXT_LEN + 1) * (weights - c.codebook_size * c.dim) / c.num_image_tokens
    return Floor(2 * (weights + cache), operations, text_operations)


def our_sampler(
    options: Options, model: Dalle, name: str, batch_size: int, cfg_scale: float
) -> Callable[[], Tensor]:
    """Samples the tokens of `batch_size` images."""
    engine, weights = name.rsplit("_", 1)
    decoder = prepare(model, FastOptions(engine, TYPES[weights]))
    text = torch.randint(1, TEXT_VOCAB, (batch_size, TEXT_LEN), device=options.device)
    null = sequence.null_captions(batch_size, TEXT_LEN, 0, options.device)
    sampling = SamplingOptions(cfg_scale=cfg_scale)

    def generate() -> Tensor:
        return sample_ids(
            decoder, text, null, [noise_generator(0, i) for i in range(batch_size)], sampling
        ).ids

    return generate


def peer_sampler(options: Options, config: DalleConfig, batch_size: int, cfg_scale: float) -> Callable | None:
    """dalle-pytorch with the same widths and vocabularies; None where it is not installed."""
    if not peer.is_installed():
        return None
    model = peer.make_dalle(config).eval().to(options.device)
    text = torch.randint(1, TEXT_VOCAB, (batch_size, TEXT_LEN), device=options.device)
    return lambda: model.generate_images(text.clone(), filter_thres=0.9, cond_scale=cfg_scale, use_cache=True)


def race(options: Options, contenders: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of the fastest run of each; one round warms up."""
    best = dict.fromkeys(contenders, float("inf"))
    for turn in range(options.rounds + 1):
        for name, generate in contenders.items():
            seconds = options.seconds(generate)
            if turn:
                best[name] = min(best[name], seconds)
    return best


def measure(options: Options, size: SizeName, batch_size: int, cfg_scale: float) -> dict[str, float]:
    """One setting: prints its lines and returns its metrics."""
    torch.manual_seed(0)
    config = ModelOptions(size=size, text_embed_dim=64).config(TEXT_VOCAB, 0, TEXT_LEN, CODES, GRID)
    model = Dalle(config).eval().to(options.device)
    rows = batch_size * (1 if cfg_scale == 1 else 2)
    samplers: dict[str, Callable | None] = {}
    for name in options.names:
        if name == "dalle_pytorch":
            samplers[name] = peer_sampler(options, config, batch_size, cfg_scale) if size == "26m" else None
        else:
            samplers[name] = our_sampler(options, model, name, batch_size, cfg_scale)
    least = floor(model, rows, batch_size + (cfg_scale != 1))
    limits = {
        "memory": least.reading(options),
        "operations": least.computing(options, least.operations),
        "text": least.computing(options, least.text_operations),
    }
    best = race(options, limits | {name: run for name, run in samplers.items() if run})
    memory, compute, text = (best.pop(name) / GRID**2 for name in limits)
    at_least = max(memory, compute) + text
    say(
        f"{size}, batch {batch_size}, {'with' if cfg_scale != 1 else 'without'} guidance ({rows} rows) | floor "
        f"{at_least * 1e3:.2f} ms a token (memory {memory * 1e3:.2f}, operations {compute * 1e3:.2f}, "
        f"text {text * 1e3:.2f})"
    )
    metrics = {"floor": at_least}
    for name, seconds in best.items():
        token = seconds / GRID**2
        metrics[name] = token
        say(
            f"    {name:16} {token * 1e3:7.2f} ms a token | {token / at_least:5.2f} times the floor | "
            f"{batch_size / token:7.0f} image tokens/s | {batch_size / seconds:6.2f} images/s"
        )
    return metrics


@command
def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Print and return the metrics."""
    options = parse_options(Options, argv, description=__doc__)
    say(f"{torch.get_num_threads()} threads, {options.clock} clock, {pick_device(options.device)}")
    if "dalle_pytorch" in options.names and not peer.is_installed():
        say("dalle-pytorch is not installed: left out")
    metrics = {}
    for size in options.sizes:
        for batch_size in options.batch_sizes:
            for cfg_scale in options.cfg_scales:
                metrics[f"{size}/{batch_size}/{cfg_scale:g}"] = measure(options, size, batch_size, cfg_scale)
    if options.report:
        write_json(options.report, metrics)
    say(json.dumps(metrics))
    return metrics


if __name__ == "__main__":
    main()
