"""Train the small network whose features stand in for LPIPS where its published weights cannot be had.

    python -m vq.train_perceptual --data ../shared/data/goods          # 3 to 8 minutes on 2 cores, to runs/perceptual
    python -m vq.train_perceptual --data DATA --loop.run-dir runs/perceptual_eval --loop.seed 1

It learns the labels of the shards (`label` and the like in the json), or the words of the captions where there are
none. Train a second one with another seed to evaluate with: a tokenizer is best judged by features that it was not
trained on. The same command started again goes on from the newest checkpoint.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from common.config import command, parse_options, to_mapping
from common.distributed import BatchPlan, World, batch_plan, start_world, stop_world
from common.log import say
from common.loop import LoopConfig, fit
from common.optim import OptimConfig, learning_rate
from common.precision import Precision, autocast
from common.training_state import TrainingState
from data_tools.images.crops import CropFlip
from data_tools.shards.holdout import open_splits
from data_tools.shards.index import ShardIndex
from data_tools.shards.loader import IMAGE_SUFFIXES, DecodeImage, eval_batches, train_batches
from data_tools.synthetic.shards import EMBEDDED, ensure_synthetic
from vq.losses.labels import TargetKind, Targets, find_targets
from vq.losses.perceptual import DEFAULT_DIRECTORY, FeatureConfig, FeatureNet, PerceptualDistance


@dataclass(frozen=True)
class Options:
    """Perceptual network: shards -> features."""

    EARLIER_NAMES: ClassVar = {"val_pictures": "val_images"}
    data: str = ""
    """Folder of image shards (train-*.tar, val-*.tar); empty: the embedded default in data/synthetic."""
    target: TargetKind = "auto"
    """label, caption, or auto: labels where the shards have them."""
    image_size: int = 128
    """Side of the images in pixels; the network then takes any side."""
    channels: tuple[int, ...] = (32, 64, 128, 256)
    """Widths of the network, one a halving of the side."""
    augment: CropFlip = field(default_factory=lambda: CropFlip(min_scale=0.5))
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=2e-3, warmup_steps=50, weight_decay=0.05)
    )
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            run_dir=DEFAULT_DIRECTORY,
            num_steps=1000,
            global_batch_size=64,
            eval_every=200,
            sample_every=0,
            save_every=200,
        )
    )
    val_images: int = 1000
    """Validation images an evaluation looks at."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """auto takes bf16 autocast where the machine has it."""
    num_workers: int = 1
    """Processes that decode images; 0 decodes in the training process."""

    def __post_init__(self) -> None:
        if not self.channels or self.image_size < 2 ** len(self.channels):
            raise ValueError(f"image_size {self.image_size} is too small for {len(self.channels)} halvings")


@dataclass(frozen=True)
class DecodeTargets:
    """An image and what it is to be recognised as."""

    image: DecodeImage
    targets: Targets

    def __call__(self, index: ShardIndex, i: int, rng: np.random.Generator) -> dict[str, Any]:
        return self.image(index, i, rng) | {"target": self.targets.of(index.read(i, ("json", "txt")))}


class Classifier(nn.Module):
    """The feature network and a linear head on the average of its last features."""

    def __init__(self, channels: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.net = FeatureNet(channels, norm=True)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(channels[-1], num_classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.net(images)[-1].mean((2, 3)))  # (B, K)


class PerceptualTask:
    """Classification; what is saved is the feature network with its norms folded in."""

    validation_metric = "loss"

    def __init__(
        self,
        options: Options,
        world: World,
        plan: BatchPlan,
        train: ShardIndex,
        val: ShardIndex,
        targets: Targets,
    ) -> None:
        torch.manual_seed(options.loop.seed)
        self.options, self.world, self.plan, self.val, self.targets = options, world, plan, val, targets
        model = Classifier(options.channels, len(targets.names))
        self.model = model.to(world.device, memory_format=torch.channels_last)
        self.training = TrainingState(self.model, options.optim, world, plan)
        self.engine = self.training.engine

    def train_step(self, batch: dict[str, Any], step: int) -> dict[str, float]:
        options = self.options
        self.engine.set_lr(learning_rate(options.optim, step, options.loop.num_steps))
        totals = {"loss": 0.0, "accuracy": 0.0}
        parts = {name: batch[name] for name in ("image", "target")}
        for micro in self.engine.micro_batches(parts, self.plan.accumulation):
            images = micro["image"].to(self.world.device, memory_format=torch.channels_last)
            target = micro["target"].to(self.world.device)
            with autocast(self.world.device, options.precision):
                logits = self.engine.model(images)
            loss = self.targets.loss(logits, target)
            self.engine.backward(loss)
            totals["loss"] += float(loss.detach()) / self.plan.accumulation
            totals["accuracy"] += float(self.targets.hits(logits, target).mean()) / self.plan.accumulation
        totals["grad_norm"] = self.engine.step()
        return totals

    def _val_batches(self, limit: int) -> Iterator[dict[str, Any]]:
        decode = DecodeTargets(DecodeImage(self.options.image_size, first_caption=True), self.targets)
        return eval_batches(self.val, decode, 64, limit)

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        self.model.eval()
        loss = hits = count = 0.0
        for batch in self._val_batches(self.options.val_images):
            images = batch["image"].to(self.world.device, memory_format=torch.channels_last)
            target = batch["target"].to(self.world.device)
            with autocast(self.world.device, self.options.precision):
                logits = self.model(images)
            loss += float(self.targets.loss(logits, target)) * len(images)
            hits += float(self.targets.hits(logits, target).sum())
            count += len(images)
        self.model.train()
        return {"loss": loss / count, "accuracy": hits / count}

    def sample(self, step: int) -> dict[str, Image.Image]:
        return {}

    def save(self, directory: Path, step: int, state: dict[str, Any]) -> None:
        config = FeatureConfig(channels=self.options.channels, trained_on=self.targets.kind)
        distance = PerceptualDistance(config)
        distance.net = self.model.net.eval().fused().to("cpu").requires_grad_(False)
        distance.set_floor_(next(self._val_batches(64))["image"])
        self.model.train()
        distance.write(directory, step)

    def state(self) -> dict[str, Any]:
        return self.training.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.training.load_state(state, self.options.loop.run_dir)


@command
def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train; returns the last evaluation."""
    options = parse_options(Options, argv, description=__doc__)
    world = start_world(options.device)
    if not options.data and world.is_main:
        say(
            "no --data given: training on the embedded default, product-like images rendered by data_tools.synthetic"
        )
        ensure_synthetic(EMBEDDED)
    world.barrier()
    data = options.data or str(EMBEDDED)
    plan = batch_plan(options.loop.global_batch_size, world.size, options.loop.micro_batch_size)
    train, val = (index.require(*IMAGE_SUFFIXES) for index in open_splits(data))
    targets = find_targets(train, options.target)
    if world.is_main:
        what = "labels" if targets.kind == "label" else "words of captions"
        say(f"{len(train)} images; learning {len(targets.names)} {what}: {', '.join(targets.names[:8])} ...")
    decode = DecodeTargets(DecodeImage(options.image_size, options.augment), targets)

    def batches(start_sample: int) -> Iterator[dict[str, Any]]:
        return train_batches(
            train, decode, plan.global_batch_size, world, options.loop.seed, start_sample, options.num_workers
        )

    try:
        task = PerceptualTask(options, world, plan, train, val, targets)
        return fit(task, batches, options.loop, world, to_mapping(options))
    finally:
        stop_world()


if __name__ == "__main__":
    main()
