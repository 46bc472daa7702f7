"""How fast does the image tokenizer train, against the published architecture in the same run, and where does time go?

    python -m benchmarks.tokenizer_speed                                       # speed and profile, minutes
    python -m benchmarks.tokenizer_speed --data ../shared/data/goods --train-seconds 600  # quality after equal time

Every round times one full training step of each contender in turn (forward, pixel, perceptual and adversarial losses,
both optimizers, moving average), so that they share the machine's mood; the fastest step of each counts. bf16 autocast,
channels_last, the same batch for all. The published perceptual network is built with random weights where its own are
not on this machine: the cost is the same.

    fast             ours: Haar patches, PatchGAN through one Haar level, own small perceptual network
    taming           the published network at 64 channels (a quarter of its usual work), the same losses as `fast`
    taming_published the published network at 64 channels with the published PatchGAN and LPIPS on VGG16
    taming_full      the same at the published width, 128 channels: minutes a step on a CPU
"""

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from common.config import command, parse_options
from common.distributed import World, batch_plan
from common.files import write_json
from common.log import say
from common.loop import LoopConfig
from common.optim import OptimConfig
from dalle.plan import measure_peak_flops
from data_tools.images.crops import CropFlip
from data_tools.shards.index import ShardIndex
from data_tools.shards.loader import IMAGE_SUFFIXES, DecodeImage, eval_batches, train_batches
from kernels import accelerate
from train_vqgan import TokenizerTask
from vq.encoding import ImageEncoder
from vq.losses.adversary import AdversaryConfig
from vq.losses.discriminator import DiscriminatorConfig
from vq.losses.perceptual import FeatureConfig, PerceptualDistance, load_perceptual
from vq.losses.reconstruction import LossConfig, psnr
from vq.model import ImageTokenizer, TokenizerConfig
from vq.options import Options as TrainOptions
from vq.published.taming import TamingConfig

Contender = Literal["fast", "taming", "taming_published", "taming_full"]
PUBLISHED_JUDGE = DiscriminatorConfig(haar_levels=0, channels=64, layers=3, norm="batch")
GROUPS = {
    "convolutions": ("conv", "mkldnn_convolution"),
    "norms": ("norm",),
    "matrix products": ("mm", "linear", "scaled_dot_product", "attention"),
    "activations": ("silu", "relu", "sigmoid", "softmax", "mul", "add", "div", "sub", "pow", "abs", "clamp"),
    "copies and casts": (
        "copy",
        "cat",
        "to_copy",
        "clone",
        "contiguous",
        "fill",
        "zero",
        "reorder",
        "pad",
        "shuffle",
    ),
    "optimizers and averages": ("adam", "lerp", "foreach"),
}


@dataclass(frozen=True)
class Options:
    """Time training steps of image tokenizers."""

    contenders: tuple[Contender, ...] = ("fast", "taming", "taming_published")
    """Which to time."""
    image_size: int = 128
    """Side in pixels; f8, so the grid is an eighth of it."""
    batch_size: int = 8
    """Images a step."""
    rounds: int = 5
    """Timed rounds after one that warms up."""
    data: str = ""
    """Image shards for --train-seconds."""
    train_seconds: float = 0.0
    """Train each contender for so long and compare validation metrics; 0: speed alone."""
    perceptual: str = "auto"
    """Perceptual network of --train-seconds, for training and for the metric."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu counts this process's CPU seconds: for ratios on a machine that is shared, with --threads 1."""
    threads: int = 0
    """Threads; 0: torch's own choice."""
    out: Path = Path("out/benchmarks/tokenizer_speed.json")
    """File for the metrics."""

    def __post_init__(self) -> None:
        if self.train_seconds and not self.data:
            raise ValueError("--train-seconds needs --data: shards to train on")
        if self.rounds < 1 or self.batch_size < 1:
            raise ValueError("rounds and batch_size must be at least 1")


@dataclass
class Contestant:
    """A task and its fastest step."""

    task: TokenizerTask
    seconds: list[float] = field(default_factory=list)
    flops: float = 0.0


class CountFlops(TorchDispatchMode):
    """Operations of convolutions and matrix products, backward passes included.

    torch's own FlopCounterMode follows modules and so refuses the gradients by a leaf that the task asks for.
    """

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def sizes(name: Contender, image_size: int) -> TokenizerConfig:
    if name == "fast":
        return TokenizerConfig(image_size)
    taming = TamingConfig(
        channels=128 if name == "taming_full" else 64, channel_mults=(1, 2, 2, 4), attention_factors=(8,)
    )
    return TokenizerConfig(image_size, "taming", taming=taming, codebook_dim=256, l2_normalize=False)


def make_task(
    name: Contender, options: Options, perceptual: PerceptualDistance | None, num_steps: int
) -> TokenizerTask:
    """A task with all losses on from the first step; `perceptual` None: of the contender's own kind, random weights."""
    published = name in ("taming_published", "taming_full")
    judge = PUBLISHED_JUDGE if published else DiscriminatorConfig()
    warmup = 0 if perceptual is None else num_steps // 5
    train = TrainOptions(
        preset="vqgan",
        model=sizes(name, options.image_size),
        loss=LossConfig(),
        adversary=AdversaryConfig(judge, warmup_steps=warmup, ramp_steps=warmup // 2, rollback_share=0.0),
        optim=OptimConfig(lr=6e-4 if name == "fast" else 2e-4, warmup_steps=min(100, num_steps // 10)),
        loop=LoopConfig(num_steps=num_steps, global_batch_size=options.batch_size),
        kmeans_step=0 if perceptual is None else 50,
    )
    world = World(0, 1, 0, torch.device("cpu"), "none")
    task = TokenizerTask(train, world, batch_plan(options.batch_size, 1), lambda n: iter(()))
    kind = FeatureConfig(architecture="vgg16" if published else "small")
    task.perceptual = (perceptual or PerceptualDistance(kind)).to(memory_format=torch.channels_last)
    return task


def measure(options: Options) -> dict[str, Contestant]:
    """Interleaved steps on one random batch."""
    batch = {"image": torch.rand(options.batch_size, 3, options.image_size, options.image_size) * 2 - 1}
    found = {name: Contestant(make_task(name, options, None, 10_000)) for name in options.contenders}
    for name, contestant in found.items():
        with CountFlops() as counter:
            contestant.task.train_step(batch, 1)
        contestant.flops = counter.total
        say(f"{name}: {contestant.flops / options.batch_size / 1e9:.1f} GFLOP an image, a step of all losses")
    for number in range(options.rounds):
        for name, contestant in found.items():
            clock = time.perf_counter if options.clock == "wall" else time.process_time
            started = clock()
            contestant.task.train_step(batch, 2 + number)
            contestant.seconds.append(clock() - started)
            say(f"round {number + 1} | {name} | {options.batch_size / contestant.seconds[-1]:.2f} images/s")
    return found


def profile(task: TokenizerTask, batch: dict[str, Tensor]) -> dict[str, float]:
    """Share of a step's own CPU time by kind of operation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        task.train_step(batch, 99)
    totals = dict.fromkeys([*GROUPS, "other"], 0.0)
    for event in profiler.key_averages():
        group = next((g for g, words in GROUPS.items() if any(w in event.key for w in words)), "other")
        totals[group] += event.self_cpu_time_total
    whole = sum(totals.values())
    return {name: value / whole for name, value in totals.items()}


@torch.no_grad()
def encoding(options: Options, batch_size: int = 64) -> dict[str, float]:
    """Images a second: one by one in float32, in bf16 batches by PyTorch, and as vq.encode_shards encodes."""
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    torch.manual_seed(0)
    model = ImageTokenizer(sizes("fast", options.image_size)).eval()
    images = torch.rand(batch_size, 3, options.image_size, options.image_size) * 2 - 1
    fast_model, cpu = copy.deepcopy(model).to(memory_format=torch.channels_last), torch.device("cpu")
    with_kernels = copy.deepcopy(fast_model)
    report = accelerate(with_kernels)
    plain, best = (ImageEncoder(m, cpu, "bf16") for m in (fast_model, with_kernels))

    def one_by_one() -> None:
        for i in range(batch_size // 4):
            model.encode_ids(images[i : i + 1])

    contenders = {"one_by_one_float32": one_by_one}
    contenders |= {"batches_bf16": partial(plain, images), "encode_shards": partial(best, images)}
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.rounds + 1):
        for name, encode in contenders.items():
            started = clock()
            encode()
            number = batch_size // 4 if encode is one_by_one else batch_size
            rates[name].append(number / (clock() - started))
    return {name: max(found[1:]) for name, found in rates.items()} | {
        "compiled": any(t.count for t in report.taken)
    }


def train(name: Contender, options: Options, images_per_second: float) -> dict[str, float]:
    """Validation metrics after `train_seconds` of training from scratch on `data`."""
    perceptual = load_perceptual(options.perceptual)
    num_steps = max(20, int(options.train_seconds * images_per_second / options.batch_size))
    task = make_task(name, options, perceptual, num_steps)
    index = ShardIndex.open(options.data, "train").require(*IMAGE_SUFFIXES)
    batches = train_batches(
        index, DecodeImage(options.image_size, CropFlip()), options.batch_size, task.world, num_workers=1
    )
    started, step = time.perf_counter(), 0
    while step < num_steps and time.perf_counter() - started < options.train_seconds:
        torch.manual_seed(step)
        task.train_step(next(batches), step)
        step += 1
        if step % 50 == 0:
            say(f"{name} | step {step}/{num_steps} | {time.perf_counter() - started:.0f} s")
    return {"steps": step, "seconds": time.perf_counter() - started} | validate(task, options)


@torch.no_grad()
def validate(task: TokenizerTask, options: Options) -> dict[str, float]:
    """PSNR and perceptual distance over the validation shards, with the averaged weights."""
    model = task._saved_model()
    noise, distance = [], []
    for images in _val_images(options):
        images = images.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            reconstruction = model(images)[0].float().clamp(-1, 1)
            distance.append(task.perceptual(reconstruction, images))
        noise.append(psnr(reconstruction, images))
    return {"psnr": float(torch.cat(noise).mean()), "perceptual": float(torch.cat(distance).mean())}


def _val_images(options: Options) -> Iterator[Tensor]:
    index = ShardIndex.open(options.data, "val").require(*IMAGE_SUFFIXES)
    for batch in eval_batches(index, DecodeImage(options.image_size, first_caption=True), 32):
        yield batch["image"]


@command
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write the metrics."""
    options = parse_options(Options, argv, description=__doc__)
    if options.threads:
        torch.set_num_threads(options.threads)
    cpu = torch.device("cpu")
    peak = measure_peak_flops(cpu)
    say(f"bf16 peak measured: {peak / 1e9:.0f} GFLOP/s on {torch.get_num_threads()} threads")
    found = measure(options)
    peak = max(peak, measure_peak_flops(cpu))
    metrics: dict[str, Any] = {"peak_gflops": peak / 1e9, "threads": torch.get_num_threads()}
    batch = {"image": torch.rand(options.batch_size, 3, options.image_size, options.image_size) * 2 - 1}
    for name, contestant in found.items():
        rate = options.batch_size / min(contestant.seconds)
        share = contestant.flops / min(contestant.seconds) / peak
        metrics[name] = {
            "pictures_per_second": rate,
            "share_of_peak": share,
            "where": profile(contestant.task, batch),
        }
        where = ", ".join(
            f"{group} {part:.0%}" for group, part in metrics[name]["where"].items() if part >= 0.02
        )
        say(f"{name:>16} | {rate:6.2f} images/s | {share:.0%} of peak | {where}")
    for name in options.contenders[1:]:
        ratio = metrics["fast"]["pictures_per_second"] / metrics[name]["pictures_per_second"]
        metrics[f"fast_over_{name}"] = ratio
        say(f"fast trains {ratio:.1f} times the images of {name} a second")
    rates = metrics["encoding"] = encoding(options)
    alone = rates["one_by_one_float32"]
    for name, engine in (("batches_bf16", "PyTorch"), ("encode_shards", "as vq.encode_shards does")):
        say(f"encoding: {alone:.1f} images/s one by one, {rates[name]:.1f} in bf16 batches, {engine}: "
            f"{rates[name] / alone:.2f} times")  # fmt: skip
    if options.train_seconds:
        for name in options.contenders:
            result = train(name, options, metrics[name]["pictures_per_second"])
            metrics[name]["after_equal_time"] = result
            say(f"{name}: after {result['seconds']:.0f} s, {result['steps']} steps: {result['psnr']:.2f} dB, "
                f"perceptual {result['perceptual']:.4f}")  # fmt: skip
    write_json(options.out, metrics)
    say(f"wrote {options.out}")
    return metrics


if __name__ == "__main__":
    main()
