"""Train a base of our own from scratch, in Taiyi's layout: autoencoder, latents, then text encoder and UNet.

    python -m diffusion.train_base --config configs/diffusion/base_128.yaml
    torchrun --nproc_per_node 2 -m diffusion.train_base --config configs/diffusion/base_128.yaml
    deepspeed --module diffusion.train_base --config configs/diffusion/base_128.yaml --deepspeed.zero-stage 2
    python -m diffusion.train_base --config configs/diffusion/base_tiny.yaml          # minutes, to see it work

Three stages in one run directory: autoencoder/ (stage A), latents/ (stage B, encoded once) and the checkpoints of
stage C, each an ordinary StableDiffusionPipeline folder. The same command started again goes on where it was.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import checkpoint
from common.config import command, parse_options, to_mapping
from common.distributed import World, batch_plan, start_world, stop_world
from common.files import atomic_directory, ensure_writable_directory, read_json, write_json
from common.log import say
from common.loop import fit
from common.training_state import require_same_config
from data_tools.shards.captions import CaptionChoice, pick_caption
from data_tools.shards.encode import Views
from data_tools.shards.holdout import open_splits
from data_tools.shards.index import ShardIndex, ShardSource
from data_tools.shards.loader import IMAGE_SUFFIXES, DecodeImage, eval_batches, train_batches
from data_tools.synthetic.shards import embedded_default, ensure_synthetic
from diffusion.base import quiet
from diffusion.scratch.autoencoder_task import KIND as AUTOENCODER_KIND
from diffusion.scratch.autoencoder_task import AutoencoderTask, StageA
from diffusion.scratch.latents import (
    DecodeLatents,
    autoencoder_sha256,
    channel_statistics,
    encode_latents,
    encode_moments,
    fold_statistics_,
    require_latents,
)
from diffusion.scratch.options import Options
from diffusion.scratch.unet_task import StageC, UnetTask, describe

STATISTICS_IMAGES = 512  # that mean and deviation of the latents are taken of
COSTS_FILE = "costs.json"
MIN_COLOR_SLOPE = 0.8  # below it colours are washed out, and latents would keep them so


# --- stage A -------------------------------------------------------------------------------------------------------


def train_autoencoder(options: Options, source: str, world: World) -> None:
    """Train the autoencoder in run_dir/autoencoder, or go on."""
    config, loop = options.stage_a, options.loop
    size = options.autoencoder.image_size
    train, val = (index.require(*IMAGE_SUFFIXES) for index in open_splits(source, options.remote))
    plan = batch_plan(config.global_batch_size, world.size)

    def val_batches(limit: int) -> Iterator[dict[str, Any]]:
        return eval_batches(val, DecodeImage(size, first_caption=True), 32, limit)

    def batches(start_sample: int) -> Iterator[dict[str, Any]]:
        decode = DecodeImage(size, options.augment)
        return train_batches(
            train, decode, plan.global_batch_size, world, loop.seed, start_sample, options.num_workers
        )

    run_dir = loop.run_dir / "autoencoder"
    task = AutoencoderTask(options, StageA(world, plan, val_batches, run_dir))
    if world.is_main:
        count = sum(p.numel() for p in task.model.parameters()) / 1e6
        say(f"stage A: autoencoder of {count:.1f}M parameters on {len(train)} images")
    own = replace(
        loop,
        run_dir=run_dir,
        num_steps=config.num_steps,
        global_batch_size=config.global_batch_size,
        micro_batch_size=None,
        patience=0,
    )
    found = fit(task, batches, own, world, to_mapping(options))
    if world.is_main and found and found["color_slope"] < MIN_COLOR_SLOPE:
        say(
            f"note: colours of reconstructions have {found['color_slope']:.0%} of the originals' strength, and the "
            "UNet will learn them so: train stage A longer, or raise --stage-a.color-weight"
        )


def finished_autoencoder(options: Options, source: str, world: World) -> nn.Module:
    """The autoencoder of stage A with latents of mean 0 and deviation 1, written once to run_dir/vae."""
    from diffusers import AutoencoderKL

    folder, stage_a = options.loop.run_dir / "vae", checkpoint.resolve(options.loop.run_dir / "autoencoder")
    stored = checkpoint.read_config(stage_a, AUTOENCODER_KIND)["model"]
    require_same_config(options.loop.run_dir, stored, to_mapping(options.autoencoder))
    if world.is_main and not folder.is_dir():
        vae = options.autoencoder.build()
        checkpoint.load_weights(vae, stage_a)
        vae.eval()
        moments = _some_moments(vae, options, source)
        fold_statistics_(vae, *channel_statistics(moments))
        with atomic_directory(folder) as temporary:
            vae.save_pretrained(str(temporary))
    world.barrier()
    with quiet():
        vae = AutoencoderKL.from_pretrained(str(folder), local_files_only=True)
    return vae.requires_grad_(False).eval().to(world.device, memory_format=torch.channels_last)


def _some_moments(vae: nn.Module, options: Options, source: str) -> torch.Tensor:
    index = ShardIndex.open(source, "train", options.remote).require(*IMAGE_SUFFIXES)
    decode = DecodeImage(options.autoencoder.image_size, first_caption=True)
    batches = eval_batches(index, decode, options.stage_b.batch_size, STATISTICS_IMAGES)
    return torch.cat([encode_moments(vae, batch["image"], options.precision) for batch in batches])


# --- stage B -------------------------------------------------------------------------------------------------------


def prepare_latents(options: Options, vae: nn.Module, source: str, world: World) -> Path:
    """Latent shards in run_dir/latents; whole ones are kept."""
    target, started = options.loop.run_dir / "latents", time.perf_counter()
    views = Views(
        options.autoencoder.image_size, options.stage_b.views, options.augment, options.stage_b.batch_size
    )
    counts = encode_latents(vae, ShardSource(source, options.remote), target, views, world, options.precision)
    if world.is_main and counts["images"]:
        hours = _hours(target / COSTS_FILE) + (time.perf_counter() - started) / 3600
        write_json(target / COSTS_FILE, {"training_hours": hours})
        say(
            f"stage B: encoded {counts['images']} images into {target}, skipped {counts['skipped']} corrupt ones"
        )
    return target


# --- stage C -------------------------------------------------------------------------------------------------------


def train_unet(options: Options, vae: nn.Module, latents: Path, world: World) -> dict[str, float]:
    """Train text encoder and UNet in run_dir, or go on; returns the last evaluation."""
    loop, sha256 = options.loop, autoencoder_sha256(vae)
    require_latents(latents, sha256)
    train, val = ShardIndex.open(latents, "train"), ShardIndex.open(latents, "val")
    side = options.autoencoder.latent_size
    shape = (2 * options.autoencoder.latent_channels, side, side)
    plan = batch_plan(loop.global_batch_size, world.size, loop.micro_batch_size)
    text, facts = options.text_augment, options.fact_captions
    choice = CaptionChoice(
        options.short_caption_share, text.drawn if text.is_on else None, facts if facts.share else None
    )

    def val_batches(limit: int) -> Iterator[dict[str, Any]]:
        return eval_batches(val, DecodeLatents(shape, first_view=True), plan.micro_batch_size, limit)

    def batches(start_sample: int) -> Iterator[dict[str, Any]]:
        decode = DecodeLatents(shape, captions=choice)
        return train_batches(
            train, decode, plan.global_batch_size, world, loop.seed, start_sample, options.num_workers
        )

    tokenizer = options.text.load_tokenizer()
    texts = options.sample_texts or tuple(itertools.islice(dict.fromkeys(first_captions(val, 200)), 4))
    stage = StageC(world, plan, vae, sha256, tokenizer, val_batches, texts, hours_before(options))
    task = UnetTask(options, stage)
    if world.is_main:
        say(f"stage C: {describe(task, len(train), first_captions(train, 2000))}")
    return fit(task, batches, loop, world, to_mapping(options))


def first_captions(index: ShardIndex, limit: int) -> list[str]:
    """First captions of up to `limit` samples, without empty ones."""
    found = (
        pick_caption(index.read(i, ("txt",)).get("txt", b""), None) for i in range(min(len(index), limit))
    )
    return [text for text in found if text]


def hours_before(options: Options) -> float:
    """Hours of training of stages A and B."""
    stage_a = checkpoint.resolve(options.loop.run_dir / "autoencoder") / "config.json"
    return _hours(stage_a) + _hours(options.loop.run_dir / "latents" / COSTS_FILE)


def _hours(path: Path) -> float:
    return float(read_json(path)["training_hours"]) if path.is_file() else 0.0


@command
def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train all stages; returns the last evaluation of stage C."""
    options = parse_options(Options, argv, description=__doc__)
    world = start_world(options.device)
    try:
        options.text.load_tokenizer()  # what is missing is said before hours of stage A
        ensure_writable_directory(options.loop.run_dir)
        size = options.autoencoder.image_size
        source = options.data or str(embedded_default(size))
        if not options.data and world.is_main:
            say(
                "no --data given: training on the embedded default, product-like images of data_tools.synthetic"
            )
            ensure_synthetic(embedded_default(size), image_size=size)
        world.barrier()
        if not (options.loop.run_dir / "vae").is_dir():
            train_autoencoder(options, source, world)
        vae = finished_autoencoder(options, source, world)
        latents = prepare_latents(options, vae, source, world)
        return train_unet(options, vae, latents, world)
    finally:
        stop_world()


if __name__ == "__main__":
    main()
