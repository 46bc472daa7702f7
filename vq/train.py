"""One training of the image tokenizer, from options to the last evaluation: what train_vqgan.py runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.config import to_mapping
from common.distributed import batch_plan, start_world, stop_world
from common.log import say
from common.loop import fit
from data_tools.augment import Chain
from data_tools.shards.loader import DecodeImage, eval_batches, train_batches
from data_tools.synthetic.shards import ensure_synthetic
from vq.data import open_train_and_val, small_pictures, train_decoder
from vq.options import Options
from vq.task import TokenizerTask


def train(options: Options) -> dict[str, float]:
    """Train, or go on; returns the last evaluation. Raises ValueError or OSError for what the user has to change."""
    world = start_world(options.device)
    model = options.model_config
    if not (options.data or options.image_folder) and world.is_main:
        say(
            "no --data given: training on the embedded default, product-like pictures drawn by data_tools.synthetic"
        )
        ensure_synthetic(Path("data/synthetic"), image_size=model.image_size)
    world.barrier()
    data = options.data or "data/synthetic"
    plan = batch_plan(options.loop.global_batch_size, world.size, options.loop.micro_batch_size)
    train, val = open_train_and_val(data, options.image_folder, options.remote)
    if world.is_main:
        for problem in [
            *dict.fromkeys([*train.problems, *val.problems]),
            small_pictures(train, model.image_size),
        ]:
            if problem:
                say(f"note: {problem}")

    def val_batches(limit: int) -> Iterator[dict[str, Any]]:
        return eval_batches(val, DecodeImage(model.image_size, first_caption=True), 32, limit)

    try:
        task = TokenizerTask(options, world, plan, val_batches)
        if world.is_main:
            count = sum(p.numel() for p in task.model.parameters()) / 1e6
            grid = f"{model.grid_size}x{model.grid_size} codes of {model.codebook_size}"
            say(f"{len(train)} pictures, {count:.1f}M parameters, {grid}")
        decode = train_decoder(
            train,
            max(task.train_sizes),
            Chain((options.move, options.augment)) if options.move.is_on else options.augment,
            with_masks=options.loss.foreground_weight > 1,
        )

        def batches(start_sample: int) -> Iterator[dict[str, Any]]:
            size, seed = plan.global_batch_size, options.loop.seed
            return train_batches(train, decode, size, world, seed, start_sample, options.num_workers)

        return fit(task, batches, options.loop, world, to_mapping(options))
    finally:
        stop_world()
