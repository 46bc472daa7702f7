"""An evaluation of the GAN: distance to the validation images, diversity, and whether the discriminator overfits.

The last is read off its logits (StyleGAN2-ADA, Karras et al. 2020, figure 1): those of validation images fall from
those of training images towards those of generated ones when it knows its images by heart. Logits here are of images
without augmentation.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from common.precision import autocast
from data_tools.shards.index import ShardIndex
from gan.conditions import Condition
from gan.pipeline import GanModel
from gan.validation import frechet_distance, mean_pair_distance
from vq.losses.imagenet_features import TRAINING_NETWORK, load_imagenet_features

BATCH = 16
WIDTH = 1280  # of the features
PER_CAPTION = 8  # images whose pairs measure diversity
SEED = 20_000  # of the noise of evaluations


class Evaluation:
    """Keeps what does not change from one evaluation to the next: the features of real images."""

    def __init__(self, task: Any) -> None:
        """`task`: the gan.task.GanTask that holds this. Raises FileNotFoundError where the weights of the feature
        network are not installed."""
        self.task, self.world = task, task.world
        self.network = load_imagenet_features(TRAINING_NETWORK, task.world.device)
        self.real: Tensor | None = None

    @torch.no_grad()
    def run(self, model: GanModel) -> dict[str, float]:
        """With the weights that are saved, and the discriminator as it is; the same on every process."""
        task = self.task
        task.discriminator.eval()
        if self.real is None:
            self.real = self._spread(
                lambda batch, indices: self.features(batch["image"]), task.data.val, WIDTH
            )
        generated, logits_val, logits_fake = self._validation(model)
        logits_train = self._logits_of(task.data.train)
        center, others = self.real.mean(0), self._within_captions(model)
        spread = mean_pair_distance(self.real, center)
        within = sum(mean_pair_distance(rows, center) for rows in others) / len(others)
        found = {"frechet_distance": frechet_distance(generated, self.real)}
        found["diversity"] = within / max(spread, 1e-9)
        found |= {"logits_train": logits_train, "logits_val": logits_val, "logits_fake": logits_fake}
        gap = logits_train - logits_fake
        return found | {"overfit": (logits_train - logits_val) / gap if gap > 0 else 0.0}

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 1280) float32 on the device"""
        with autocast(self.world.device, self.task.options.precision):
            return self.network.pooled(images.to(self.world.device))

    def _validation(self, model: GanModel) -> tuple[Tensor, float, float]:
        """Features of an image generated for each validation caption; mean logits of validation and generated ones."""
        task, z_dim = self.task, self.task.config.generator.z_dim
        noise = torch.randn(task.options.val_images, z_dim, generator=torch.Generator().manual_seed(SEED))

        def compute(batch: dict[str, Any], indices: Tensor) -> Tensor:
            condition = task.conditions(batch["text"], batch["label"])
            images = task.generate(model, noise[indices], condition)
            pair = [self.logits(x, condition)[:, None] for x in (batch["image"], images)]
            return torch.cat([self.features(images), *pair], dim=1)

        rows = self._spread(compute, task.data.val, WIDTH + 2)
        return rows[:, :-2], float(rows[:, -2].mean()), float(rows[:, -1].mean())

    def _logits_of(self, index: ShardIndex) -> float:
        def compute(batch: dict[str, Any], indices: Tensor) -> Tensor:
            return self.logits(batch["image"], self.task.conditions(batch["text"], batch["label"]))[:, None]

        return float(self._spread(compute, index, 1).mean())

    def logits(self, images: Tensor, condition: Condition) -> Tensor:
        """(B, 3, S, S) -> (B,): the mean logit of each."""
        task = self.task
        with torch.no_grad(), autocast(self.world.device, task.options.precision):
            inputs = task.trunk(images.to(self.world.device))
            vectors = task.discriminator.text(condition.text_ids)
            embedded = task.discriminator.embed(vectors, condition.labels, condition.has_text)
            return task.discriminator.score(inputs, embedded).float().mean(1)

    def _within_captions(self, model: GanModel) -> list[Tensor]:
        """Features of several images of each sample caption."""
        task, found = self.task, []
        z = torch.randn(
            PER_CAPTION, task.config.generator.z_dim, generator=torch.Generator().manual_seed(SEED + 1)
        )
        for text, label in task.samples:
            condition = task.conditions([text] * PER_CAPTION, torch.full((PER_CAPTION,), label))
            found.append(self.features(task.generate(model, z, condition)).cpu())
        return found

    def _spread(
        self, compute: Callable[[dict[str, Any], Tensor], Tensor], index: ShardIndex, width: int
    ) -> Tensor:
        """`compute(batch, indices)` -> (B, width) over the first images of `index`, batches dealt over processes ->
        (N, width) on the CPU, the same on every process."""
        rows: list[Tensor] = []
        for number, (batch, indices) in enumerate(self._batches(index)):
            if number % self.world.size == self.world.rank:
                rows.append(compute(batch, indices).float())
            else:
                rows.append(torch.zeros(len(indices), width, device=self.world.device))
        return self.world.sum_(torch.cat(rows)).cpu()

    def _batches(self, index: ShardIndex) -> Iterator[tuple[dict[str, Any], Tensor]]:
        start = 0
        for batch in self.task.data.plain_batches(index, BATCH, self.task.options.val_images):
            size = len(batch["key"])
            yield batch, torch.arange(start, start + size)
            start += size
