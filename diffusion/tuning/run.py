"""From options to a run: what diffusion.finetune and diffusion.train_lora do in the same way."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from common.config import to_mapping
from common.distributed import World, batch_plan
from common.files import ensure_writable_directory
from common.log import say
from common.loop import fit
from data_tools.shards.loader import train_batches
from diffusion.base import DiffusionBase, load_base, newest_base
from diffusion.tuning.data import TuneData
from diffusion.tuning.latent_cache import DecodeCached, LatentCache
from diffusion.tuning.memory import require_memory
from diffusion.tuning.options import TuneOptions
from diffusion.tuning.task import Method, TuneTask

MakeMethod = Callable[[DiffusionBase, int], tuple[Method, dict[str, Any]]]
"""(base, resolution) -> the method, which has prepared the base, and what else TuneTask takes."""


def open_base(options: TuneOptions, world: World) -> DiffusionBase:
    """The base on this process's device. Raises FileNotFoundError or ValueError in one sentence."""
    name = options.base or newest_base()
    if name is None:
        raise FileNotFoundError(
            "no base in runs/ yet: name a folder in diffusers' layout or a hub id with --base, or train one with "
            "`python -m diffusion.train_base`"
        )
    base = load_base(name, world.device, options.text_len, options.base_config)
    if world.is_main:
        licence = f"licence {base.licence}" if base.licence else "its card names no licence"
        say(f"base {base.path}: texts of {base.text_len} tokens, {licence}")
    return base


def require_resolution(options: TuneOptions, base: DiffusionBase) -> None:
    """Raises ValueError for sizes that the autoencoder and the UNet cannot halve often enough."""
    factor = base.downsample_factor * 2 ** (len(base.unet.config.block_out_channels) - 1)
    buckets = options.data.buckets
    wrong = [r for r in (*buckets.resolutions, buckets.step) if r % factor]
    if wrong:
        raise ValueError(
            f"images of this base need sides that are multiples of {factor}, not {wrong[0]}: see "
            "--data.buckets.resolutions and --data.buckets.step"
        )


def run(options: TuneOptions, world: World, base: DiffusionBase, make: MakeMethod) -> dict[str, float]:
    """Train; returns the last evaluation."""
    ensure_writable_directory(options.loop.run_dir)
    require_resolution(options, base)
    data = TuneData.open(options.data, options.loop.run_dir, world)
    options = options.with_epochs(data.num_images)
    loop = options.loop
    plan = batch_plan(loop.global_batch_size, world.size, loop.micro_batch_size)
    torch.manual_seed(loop.seed)
    cache = None
    if options.data.cache_latents:
        precision = "fp32" if options.precision == "fp16" else options.precision
        cache = LatentCache.build(data, base.vae, loop.run_dir, world, precision)
    method, more = make(base, data.resolution)
    task = TuneTask(options, world, plan, data, base, method, **more)
    if world.is_main:
        for note in data.notes():
            say(f"note: {note}")
        say(describe(task, options))
    require_memory(task, options, plan, data, world)

    def batches(start_sample: int) -> Iterator[dict[str, Any]]:
        if cache is None:
            return data.train_batches(loop.seed, plan.global_batch_size, world, start_sample)
        decode, order = DecodeCached(cache, data.captions), data.order(loop.seed, plan.global_batch_size)
        arguments = (plan.global_batch_size, world, loop.seed, start_sample, options.data.num_workers)
        return train_batches(data.train, decode, *arguments, order=order)

    kept = to_mapping(options) | {"base": str(base.path)}
    return fit(task, batches, loop, world, kept)


def describe(task: TuneTask, options: TuneOptions) -> str:
    """One line on what is about to be trained."""
    trained = sum(p.numel() for p in task.trained.values())
    whole = sum(p.numel() for p in task.denoiser.parameters())
    seen = options.loop.num_steps * options.loop.global_batch_size
    return (
        f"{task.data.num_images} training and {len(task.data.val)} validation images, {trained / 1e6:.2f}M of "
        f"{whole / 1e6:.1f}M parameters trained, {options.loop.num_steps} steps of {options.loop.global_batch_size}: "
        f"{seen / max(1, task.data.num_images):.1f} passes over the images"
    )
