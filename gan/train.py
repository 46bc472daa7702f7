"""Train the conditional GAN on image shards.

    python -m gan.train                                            # the embedded default at 64 pixels
    python -m gan.train --config configs/goods_128/gan.yaml        # real goods at 128 pixels
    torchrun --nproc_per_node 2 -m gan.train --config configs/goods_128/gan.yaml
    python -m gan.train --data data/mine --generator.img-size 128 --loop.run-dir runs/mine_gan

The same command started again goes on from the newest checkpoint in the run directory; `best` there is the checkpoint
of the smallest Frechet distance. Then: python -m gan.generate TEXT 8 out/, and python -m gan.plot RUN.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.config import command, parse_options, to_mapping
from common.distributed import batch_plan, start_world, stop_world
from common.log import say
from common.loop import fit
from gan.data import TrainData
from gan.options import Options
from gan.task import GanTask

EMBEDDED = Path(__file__).parent.parent / "configs/demo/gan.yaml"


def describe(task: GanTask) -> str:
    """One line on what is about to be trained."""
    generator, learned = (
        sum(p.numel() for p in m.parameters() if p.requires_grad) / 1e6
        for m in (task.generator, task.discriminator)
    )
    options, size = task.options, task.config.generator.img_size
    text = f"text tower of {options.text.ranker}, frozen" if task.is_frozen else "text tower trained along"
    features = f"features {options.discriminator.features}"
    return (
        f"{len(task.data.train)} images of {size} x {size}, generator {generator:.1f}M parameters, discriminator "
        f"{learned:.1f}M ({features}), {text}, {len(task.data.labels)} categories, "
        f"augmentation {options.d_augment.mode}"
    )


@command
def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train; returns the last evaluation."""
    options = parse_options(Options, argv, description=__doc__, embedded=EMBEDDED)
    loop, world = options.loop, start_world(options.device)
    try:
        plan = batch_plan(loop.global_batch_size, world.size, loop.micro_batch_size)
        data = TrainData.prepare(options, world)
        task = GanTask(options, world, plan, data)
        if world.is_main:
            say(describe(task))
            if options.discriminator.features == "imagenet":
                say(
                    "note: frechet_distance is measured on the network that the discriminator reads: it compares "
                    "checkpoints of this run, nothing else"
                )

        def batches(start_sample: int) -> Iterator[dict[str, Any]]:
            return data.train_batches(options, plan.global_batch_size, world, start_sample)

        return fit(task, batches, loop, world, to_mapping(options))
    finally:
        stop_world()


if __name__ == "__main__":
    main()
