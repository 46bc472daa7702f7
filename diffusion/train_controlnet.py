"""Train a ControlNet for line drawings on any base of this package.

    python -m diffusion.train_controlnet --base runs/goods_128_diffusion --data ../shared/data/goods --lines mixed
    python -m diffusion.train_controlnet --config configs/diffusion/controlnet_128.yaml
    python -m diffusion.train_controlnet --config configs/diffusion/controlnet_line.yaml     # as published, 512 pixels
    torchrun --nproc_per_node 2 -m diffusion.train_controlnet --config configs/diffusion/controlnet_128.yaml

Images and drawings are encoded once into RUN/latents; checkpoints hold controlnet/ in diffusers' layout. The same
command started again goes on where it was. Then: python -m diffusion.control TEXT 8 out/ --line drawing.png
"""

from collections.abc import Iterator, Sequence
from typing import Any

from common.config import command, parse_options, to_mapping
from common.distributed import World, batch_plan, start_world, stop_world
from common.files import ensure_writable_directory
from common.log import say
from common.loop import fit
from data_tools.shards.index import ShardIndex
from data_tools.shards.loader import eval_batches, train_batches
from diffusion.base import load_base, newest_base
from diffusion.controlnet.data import DecodePairs, image_shards, prepare_pairs
from diffusion.controlnet.model import load_controlnet, new_controlnet
from diffusion.controlnet.options import Options
from diffusion.controlnet.task import ControlTask, Pairs


def train(options: Options, world: World) -> dict[str, float]:
    """Prepare what is missing and train, or go on; returns the last evaluation."""
    loop = options.loop
    name = options.base or newest_base()
    if name is None:
        raise FileNotFoundError(
            "no base was trained yet under runs/: run python -m diffusion.train_base, or name one with --base"
        )
    if not options.data:
        raise ValueError("name image shards or a published list of pairs with --data")
    base = load_base(name, world.device, config=options.base_config)
    size = options.image_size or base.image_size
    if size % (8 * base.downsample_factor):
        raise ValueError(
            f"image_size must be a multiple of {8 * base.downsample_factor} for this base, not {size}"
        )
    ensure_writable_directory(loop.run_dir)
    source = image_shards(options.data, size, loop.run_dir, world)
    target = loop.run_dir / "latents"
    prepare_pairs(base, source, target, size, options.views, options.augment, options.lines, world)
    controlnet = load_controlnet(options.init, base) if options.init else new_controlnet(base)
    plan = batch_plan(loop.global_batch_size, world.size, loop.micro_batch_size)
    train_index, val_index = ShardIndex.open(target, "train"), ShardIndex.open(target, "val")
    side = size // base.downsample_factor
    shape = (2 * base.latent_channels, side, side)

    def val_batches(limit: int) -> Iterator[dict[str, Any]]:
        return eval_batches(val_index, DecodePairs(shape, first_view=True), plan.micro_batch_size, limit)

    def batches(start_sample: int) -> Iterator[dict[str, Any]]:
        decode = DecodePairs(shape)
        return train_batches(
            train_index, decode, plan.global_batch_size, world, loop.seed, start_sample, options.num_workers
        )

    task = ControlTask(options, Pairs(world, plan, base, controlnet, size, val_batches))
    if world.is_main:
        count = sum(p.numel() for p in task.finished.controlnet.parameters()) / 1e6
        say(
            f"{len(train_index)} pairs of {size} pixels, ControlNet of {count:.1f}M parameters on {base.path}"
        )
    return fit(task, batches, loop, world, to_mapping(options))


@command
def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train; returns the last evaluation."""
    options = parse_options(Options, argv, description=__doc__)
    world = start_world(options.device)
    try:
        return train(options, world)
    finally:
        stop_world()


if __name__ == "__main__":
    main()
