"""What a training of the generator will cost, before it is started.

    python -m dalle.plan --config configs/goods_128/dalle.yaml
    python -m dalle.plan --config configs/goods_128/dalle.yaml --model.size 340m --gpus 8 --gpu-memory 80
    python -m dalle.plan --config configs/large/dalle_3b.yaml --gpus 64 --gpu-price 2 --num-samples 100000000 \
        --codebook-size 16384 --grid-size 16 --text-vocab-size 21128

Takes every option of train_dalle.py. Without --gpus the hours come from twenty steps measured on this machine.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from common import checkpoint
from common.config import command, parse_options
from common.distributed import batch_plan, pick_device
from common.engines.deepspeed import DeepSpeedConfig
from common.log import clock, say
from common.loop import LoopConfig
from common.machine.memory import free_memory
from common.optim import make_optimizer
from common.precision import Precision, autocast
from dalle import sequence
from dalle.losses import CrossEntropy, dalle_loss
from dalle.model import SIZES, Dalle, DalleConfig
from dalle.text_tokenizer import TextTokenizer
from dalle.training.data import captions, names_images
from dalle.training.options import Options
from data_tools.shards.index import ShardIndex
from kernels import accelerate
from vq.model import KIND as TOKENIZER_KIND

TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022 (Chinchilla), table 3
USEFUL_EPOCHS = 16  # Muennighoff et al. 2023: repeated data lose nearly all value beyond this
SPECIAL_PIECES = 4  # of a SentencePiece model: padding, unknown, begin, end
GIB = 2**30


@dataclass(frozen=True)
class PlanOptions(Options):
    """Price a training of the generator: all options of train_dalle.py, and the hardware."""

    gpus: int = 0
    """GPUs to plan for; 0 measures this machine."""
    gpu_memory: float = 80.0
    """Memory of one GPU in GiB."""
    gpu_tflops: float = 312.0
    """Dense bf16 peak of one GPU in TFLOP/s: A100 312, H100 990, RTX 4090 165."""
    expected_mfu: float = 0.4
    """Share of the peak to plan with."""
    gpu_price: float = 0.0
    """Price of an hour of one GPU, in any currency; 0: no cost is given."""
    link_gbytes: float = 0.0
    """GB/s that a GPU sends to the others; 0: 300 inside a node of 8 (NVLink), 50 between nodes (400 Gbit/s a GPU)."""
    num_samples: int | None = None
    """Training images; None counts those in --data."""
    codebook_size: int | None = None
    """Image codes; None reads the image tokenizer."""
    grid_size: int | None = None
    """Side of the code grid; None reads the image tokenizer."""
    text_vocab_size: int | None = None
    """Text pieces; None reads the text tokenizer."""
    dry_run_steps: int = 20
    """Steps measured on this machine when gpus is 0; 0 measures none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus < 0 or self.dry_run_steps < 0:
            raise ValueError(
                f"gpus and dry_run_steps must not be negative, not {self.gpus}, {self.dry_run_steps}"
            )
        for name in ("num_samples", "codebook_size", "grid_size", "text_vocab_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.gpu_price < 0 or self.link_gbytes < 0:
            raise ValueError("gpu_price and link_gbytes must not be negative")
        if self.gpu_memory <= 0 or self.gpu_tflops <= 0 or not 0 < self.expected_mfu <= 1:
            raise ValueError("gpu_memory and gpu_tflops must be above 0 and expected_mfu lie in (0, 1]")


def train_flops(config: DalleConfig, text_len: int) -> float:
    """Floating-point operations of forward and backward for one sample, recomputation not counted.

    Kaplan et al. 2020, section 2.1, exact for our blocks: 2 a weight and input in the forward pass, twice that in
    the backward pass; causal attention at the half of the square that it needs.
    """
    c = config
    length = text_len + c.num_image_tokens
    block = c.dim * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim + c.dim**2 + 3 * c.dim * c.ffn_dim
    attention = 2 * c.dim * (length + 1) / 2  # scores and mixing, an average query sees half
    body = length * c.num_layers * (block + attention)
    heads = c.num_image_tokens * c.dim * c.codebook_size
    if c.text_head:
        heads += (text_len - 1) * c.text_embed_dim * c.text_vocab_size
    if c.text_embed_dim != c.dim:
        heads += 2 * text_len * c.text_embed_dim * c.dim
    return 3 * 2.0 * (body + heads)


def measure_peak_flops(
    device: torch.device, precision: Precision = "auto", size: int = 2048, repeats: int = 3
) -> float:
    """Operations a second of a square matrix product in the training precision: the best of `repeats`."""
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    with autocast(device, precision), torch.no_grad():
        dtype = nn.functional.linear(a[:8], b).dtype
        a, b = a.to(dtype), b.to(dtype)
        seconds = []
        for _ in range(repeats + 1):  # the first one warms up
            synchronize(device)
            started = time.perf_counter()
            nn.functional.linear(a, b)
            synchronize(device)
            seconds.append(time.perf_counter() - started)
    return 2.0 * size**3 / min(seconds[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_parameters(config: DalleConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Dalle(config).parameters())


def state_bytes(parameters: int, options: Options, processes: int) -> float:
    """Of one process: weights, gradients, both moments, the moving average, the copy that evaluation uses.

    float32 each; ZeRO 1 shards the moments, 2 the gradients too, 3 the weights too, where --engine deepspeed or an
    option of it says that this launcher will be used. A bf16 copy of the weights lives through a step.
    """
    shards = options.engine == "deepspeed" or (
        options.engine == "auto" and options.deepspeed != DeepSpeedConfig()
    )
    stage = options.deepspeed.zero_stage if shards else 0
    shared = [8 * (stage >= 1), 4 * (stage >= 2), 4 * (stage >= 3)]
    whole = 16 - sum(shared) + 2 + 4 + 4 * (options.ema_decay > 0)
    return parameters * (whole + sum(shared) / processes)


def exchange_bytes(parameters: int, options: Options, gpus: int, accumulation: int = 1) -> float:
    """What one GPU sends in a step, in float32: gradients are reduced, and what is sharded is gathered again.

    A ring moves (n - 1) / n of the tensor for a reduce-scatter and as much for an all-gather (Rajbhandari et al. 2020,
    "ZeRO", section 7). Gradients meet once a step, under ZeRO 2 and 3 with each micro-batch; ZeRO 3 gathers the weights
    for each pass, of which there is one more where blocks are computed again.
    """
    stage = options.deepspeed.zero_stage if options.engine == "deepspeed" else 0
    reduced = 4 * (accumulation if stage >= 2 else 1)
    gathered = 4 * accumulation * (2 + options.model.gradient_checkpointing) if stage == 3 else 4
    return parameters * (reduced + gathered) * (gpus - 1) / gpus


def activation_bytes(config: DalleConfig, text_len: int, precision_bytes: int = 2) -> float:
    """What one sample keeps for the backward pass; an estimate, good to about a third."""
    c, length = config, text_len + config.num_image_tokens
    attention = precision_bytes * (6 * c.dim + 4 * c.num_kv_heads * c.head_dim) + 8 * c.dim
    ffn = precision_bytes * (c.dim + 4 * c.ffn_dim) + 8 * c.dim
    block = length * (attention + ffn)
    kept = c.num_layers * length * c.dim * 4 + block if c.gradient_checkpointing else c.num_layers * block
    return kept + c.num_image_tokens * c.codebook_size * (precision_bytes + 8)


def checkpoint_bytes(parameters: int, options: Options) -> float:
    """model.safetensors, and the weights, moments and moving average of training_state."""
    return parameters * (4 + 4 + 8 + 4 * (options.ema_decay > 0))


def num_checkpoints(loop: LoopConfig) -> int:
    """On the disk at once: those kept, that of the best evaluation, and the one being written; 0 keeps all."""
    written = 1 + (loop.num_steps - 1) // loop.save_every if loop.save_every else 1
    return min(written, loop.keep_last + 2) if loop.keep_last else written


def shard_bytes(num_samples: int, views: int, num_image_tokens: int) -> float:
    """Token shards: codes of two bytes, three tar members of 512-byte blocks."""
    return num_samples * (views * num_image_tokens * 2 + 3 * 1024)


def fitting_size(unique_tokens: float, epochs: float) -> str | None:
    """The largest row of the table that the data feed, or None."""
    budget = unique_tokens * min(epochs, USEFUL_EPOCHS) / TOKENS_PER_PARAMETER
    million = {n: float(n[:-1]) * (1000 if n.endswith("b") else 1) for n in SIZES}
    fitting = [n for n in SIZES if million[n] * 1e6 <= budget]
    return fitting[-1] if fitting else None


def vocabularies(options: PlanOptions) -> tuple[int, int, int]:
    """(text_vocab_size, codebook_size, grid_size): as given, as the tokenizers say, else those of the defaults."""
    codebook_size, grid_size, text_vocab_size = (
        options.codebook_size,
        options.grid_size,
        options.text_vocab_size,
    )
    if codebook_size is None or grid_size is None:
        name = options.image_tokenizer
        directory = checkpoint.resolve(name) if name else checkpoint.newest_run(TOKENIZER_KIND)
        if directory is None:
            raise FileNotFoundError(
                "no image tokenizer in runs/ yet: give --codebook-size and --grid-size, or --image-tokenizer DIR"
            )
        from vq.model import ImageTokenizer

        tokenizer = ImageTokenizer.from_pretrained(directory)
        codebook_size, grid_size = codebook_size or tokenizer.codebook_size, grid_size or tokenizer.grid_size
    if text_vocab_size is None:
        named = options.text_tokenizer
        text_vocab_size = (
            TextTokenizer.from_pretrained(named).vocab_size if named else count_characters(options)
        )
    return text_vocab_size, codebook_size, grid_size


def count_characters(options: PlanOptions) -> int:
    """Of the captions, which a training without a named text tokenizer learns; 4,000 where none are on this disk."""
    index = None if options.num_samples is not None else open_data(options)
    if index is None or index.remote:
        return 4000
    return SPECIAL_PIECES + len(set("".join(captions(index, 10_000))))


def open_data(options: PlanOptions) -> ShardIndex:
    return ShardIndex.open(options.data or "data/synthetic", "train", options.remote)


def count_samples(options: PlanOptions) -> int:
    if options.num_samples is not None:
        return options.num_samples
    if options.data and names_images(options.data):
        raise ValueError(
            f"{options.data} holds no shards yet, so its images are not counted: give --num-samples, or make shards "
            f"with `python -m data_tools.shard {options.data} TARGET`"
        )
    return len(open_data(options))


def dry_run(config: DalleConfig, options: PlanOptions, micro_batch_size: int) -> tuple[float, float]:
    """Seconds of a sample and share of the measured peak: `dry_run_steps` steps on random ids on this machine."""
    device = pick_device(options.device)
    peak = measure_peak_flops(device, options.precision)
    torch.manual_seed(0)
    model, cross_entropy = Dalle(config).to(device), CrossEntropy()
    if options.kernels == "auto":
        accelerate(model, cross_entropy, in_bf16=options.precision != "fp32")
    optimizer = make_optimizer(model, options.optim)
    shape = (micro_batch_size, config.max_text_len)
    text_ids = torch.randint(config.text_vocab_size, shape, device=device)
    text_ids[text_ids == config.pad_id] = (config.pad_id + 1) % config.text_vocab_size
    image_ids = torch.randint(
        config.codebook_size, (micro_batch_size, config.num_image_tokens), device=device
    )
    targets = sequence.text_targets(text_ids, config.pad_id)
    seconds = []
    for _ in range(options.dry_run_steps + 2):  # the first two warm up
        synchronize(device)
        started = time.perf_counter()
        with autocast(device, options.precision):
            output = model(text_ids, image_ids)
        dalle_loss(output, image_ids, targets, len(targets), options.loss, cross_entropy).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    each = sorted(seconds[2:])[len(seconds[2:]) // 2] / micro_batch_size
    return each, train_flops(config, config.max_text_len) / each / peak


@dataclass(frozen=True)
class Plan:
    """The metrics, and what to think of them."""

    parameters: int
    samples: int
    epochs: float
    unique_tokens: float
    trained_tokens: float
    flops: float
    hours: float | None
    memory_gib: float
    disk_gib: float
    lines: tuple[str, ...]
    warnings: tuple[str, ...]


def make_plan(options: PlanOptions) -> Plan:
    """Raises FileNotFoundError or ValueError when the data, a tokenizer or a size cannot be."""
    options = options.with_init_tokenizers()
    samples = count_samples(options)
    text_vocab_size, codebook_size, grid_size = vocabularies(options)
    config = options.model_config(text_vocab_size, 0, codebook_size, grid_size)
    loop, processes = options.loop, max(1, options.gpus)
    batches = batch_plan(loop.global_batch_size, processes, loop.micro_batch_size)
    parameters = count_parameters(config)
    seen = loop.num_steps * loop.global_batch_size
    epochs, unique = seen / samples, float(samples * config.num_image_tokens)
    flops = seen * train_flops(config, config.max_text_len)
    state = state_bytes(parameters, options, processes)
    activations = batches.micro_batch_size * activation_bytes(config, config.max_text_len)
    count = num_checkpoints(loop)
    checkpoints = count * checkpoint_bytes(parameters, options)
    disk = checkpoints + shard_bytes(samples, 4, config.num_image_tokens)
    hours, hardware = None, "not measured"
    if options.gpus:
        hours = flops / (options.gpus * options.gpu_tflops * 1e12 * options.expected_mfu) / 3600
        hardware = f"{options.gpus} GPUs of {options.gpu_tflops:g} TFLOP/s at {options.expected_mfu:.0%}"
    elif options.dry_run_steps and state + activations > free_memory(options.device):
        hardware = "not measured: it does not fit into the memory that is free here"
    elif options.dry_run_steps:
        each, mfu = dry_run(config, options, batches.micro_batch_size)
        hours = seen * each / 3600
        hardware = f"measured here: {1 / each:.1f} samples/s, {mfu:.0%} of the machine's peak"
    money = (
        f", {hours * options.gpus * options.gpu_price:,.0f} for the GPU hours"
        if hours and options.gpu_price
        else ""
    )
    c = config
    lines = (
        f"model       {parameters / 1e6:.1f}M parameters: dim {c.dim}, {c.num_layers} layers, {c.num_heads} heads "
        f"({c.num_kv_heads} of keys and values), {c.max_text_len} text and {c.num_image_tokens} image tokens",
        f"data        {samples} images, {unique / 1e6:.1f}M image tokens; {epochs:.1f} epochs see "
        f"{seen * c.num_image_tokens / 1e6:.0f}M",
        f"compute     {flops:.2e} FLOPs, {train_flops(c, c.max_text_len) / 1e9:.1f} GFLOPs a sample",
        f"time        {'?' if hours is None else clock(hours * 3600)} ({hardware}){money}",
        *([limit_line(options, parameters, hours, batches.accumulation)] if options.gpus > 1 else []),
        f"memory      {state / GIB:.2f} GiB of weights and optimizer a process, about {activations / GIB:.2f} GiB of "
        f"activations at {batches.micro_batch_size} samples a pass",
        f"disk        {checkpoints / GIB:.2f} GiB for {count} checkpoints, "
        f"{(disk - checkpoints) / GIB:.2f} GiB for token shards of 4 views",
    )
    memory, seen_tokens = (state + activations) / GIB, float(seen * c.num_image_tokens)
    warnings = tuple(judge(options, parameters, epochs, unique, memory))
    metrics = (parameters, samples, epochs, unique, seen_tokens, flops, hours, memory, disk / GIB)
    return Plan(*metrics, lines, warnings)


def limit_line(options: PlanOptions, parameters: int, hours: float, accumulation: int) -> str:
    """Compute against the exchange of gradients, which overlaps with the backward pass where it is the shorter."""
    link = options.link_gbytes or (300.0 if options.gpus <= 8 else 50.0)
    compute = hours * 3600 / options.loop.num_steps
    exchange = exchange_bytes(parameters, options, options.gpus, accumulation) / link / 1e9
    limit = "compute" if exchange < compute else "the network"
    return (
        f"limit       {limit}: {compute * 1e3:.0f} ms of compute a step, {exchange * 1e3:.0f} ms of gradients over "
        f"{link:g} GB/s a GPU"
    )


def judge(options: PlanOptions, parameters: int, epochs: float, unique: float, memory: float) -> list[str]:
    """Warnings: too little data for the size, or more memory than there is."""
    warnings = []
    useful = unique * min(epochs, USEFUL_EPOCHS)
    if useful < TOKENS_PER_PARAMETER * parameters:
        size = fitting_size(unique, epochs)
        advice = f"the largest size that they feed is {size}" if size else "they feed no size of the table"
        warnings.append(
            f"{unique / 1e6:.1f}M different image tokens, worth {useful / 1e6:.0f}M with repetition, are less than "
            f"{TOKENS_PER_PARAMETER} a parameter: {advice}. It will overfit: use dropout, more views an image and "
            "watch the validation loss (--loop.patience)"
        )
    there, where = options.gpu_memory, "a GPU"
    if not options.gpus:
        there, where = free_memory(options.device) / GIB, "here"
    if memory > 0.9 * there:
        warnings.append(
            f"{memory:.1f} GiB {where} do not fit into {there:.1f}: lower --loop.micro-batch-size, set "
            "--model.gradient-checkpointing, or shard with --engine deepspeed --deepspeed.zero-stage 3"
        )
    return warnings


@command
def main(argv: Sequence[str] | None = None) -> Plan:
    """Print the plan; returns it."""
    plan = make_plan(parse_options(PlanOptions, argv, description=__doc__))
    for line in plan.lines:
        say(line)
    for warning in plan.warnings:
        say(f"warning     {warning}")
    return plan


if __name__ == "__main__":
    main()
