"""Train a ranker: images and captions into one space, contrastively.

    python -m rankers.train                                            # the embedded default, about a minute on a CPU
    python -m rankers.train --config configs/goods_128/ranker.yaml
    torchrun --nproc_per_node 2 -m rankers.train --config configs/goods_128/ranker.yaml
    deepspeed --module rankers.train --config configs/goods_128/ranker.yaml
    python -m rankers.train --data DIR --init OFA-Sys/chinese-clip-vit-base-patch16 --train-sizes 224 --optim.lr 2e-5

The data are image shards. The same command started again goes on from the newest checkpoint in the run directory.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from common.config import command, parse_options, to_mapping
from common.distributed import BatchPlan, World, batch_plan, start_world, stop_world
from common.engine import EngineName
from common.engines.deepspeed import DeepSpeedConfig
from common.engines.plain import split_batch
from common.image import make_grid
from common.log import say
from common.loop import LoopConfig, fit
from common.optim import OptimConfig, learning_rate
from common.precision import Precision, autocast
from common.square import resize_square
from common.text.bert_text import TextTowerConfig
from common.training_state import TrainingState, require_same_config
from data_tools.shards.loader import train_batches
from data_tools.shards.remote import RemoteOptions
from rankers.base import TwoTowerRanker
from rankers.calibration import FILE as CALIBRATION
from rankers.calibration import NegativeWords, calibrate, default_lexicon
from rankers.clip import RankerTowers
from rankers.model import IMAGENET_TOWER, RankerModel, save_ranker, takes_any_size
from rankers.retrieval import Pairs, retrieval_metrics
from rankers.training.data import RankerData
from rankers.training.feature_views import open_views
from rankers.training.growing import at_size, check_train_sizes, train_size
from rankers.training.objective import TARGETS, Features, LossWeights, large_batch_step
from rankers.training.pairs import AttributeConfig, CropAugment, pair_decoder
from rankers.training.reconstructions import ReconstructionConfig, Reconstructions


@dataclass(frozen=True)
class ModelOptions:
    """The ranker's sizes, when it starts from random weights."""

    image_tower: str = "resnet-xs"
    """efficientnet-lite0 (frozen weights of ImageNet, from a pip package); from random weights resnet-xs, resnet-s,
    resnet-m (averaging, for small images), resnet-50, vit-ti-16, vit-s-16, vit-b-16."""
    embed_dim: int = 128
    """Width of the common space."""
    image_size: int = 64
    """Side in pixels at which images are scored."""
    text: TextTowerConfig = field(
        default_factory=lambda: TextTowerConfig(width=128, layers=2, max_text_len=32)
    )


@dataclass(frozen=True)
class Options:
    """Image shards -> ranker."""

    EARLIER_NAMES: ClassVar = {"val_pictures": "val_images"}
    data: str = ""
    """Image shards (train-*.tar, val-*.tar): a folder, http://, s3:// ...; empty: the embedded default."""
    remote: RemoteOptions = field(default_factory=RemoteOptions)
    vocab: str = ""
    """BERT vocab.txt, or its folder, to prune to the captions' pieces; empty: the captions' characters."""
    init: str = ""
    """Ranker of this project (checkpoint or run directory), or folder or hub id of a Chinese-CLIP, to fine-tune; empty:
    a new one in the sizes of `model`."""
    model: ModelOptions = field(default_factory=ModelOptions)
    loss: LossWeights = field(default_factory=LossWeights)
    attributes: AttributeConfig = field(
        default_factory=lambda: AttributeConfig(fact_fields=("label_zh", "color_zh", "pattern"))
    )
    augment: CropAugment = field(default_factory=lambda: CropAugment(min_area=0.6))
    reconstructions: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    views: int = 0
    """Of each training image so many augmented views, whose features are computed once and kept in the run directory:
    for efficientnet-lite0, which stays frozen. 0: images are augmented and looked at anew each time."""
    train_sizes: tuple[int, ...] = (64,)
    """Sides in pixels of the training images, one after the other in equal parts of the run: small ones first are
    cheap, and a little under image_size is best (arXiv 1906.06423)."""
    unk_insert: float = 0.1
    """Share of captions with an unknown token put in, which teaches to read past unknown words."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-3, warmup_steps=50, beta2=0.98))
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            run_dir=Path("runs/ranker"), num_steps=400, global_batch_size=64, eval_every=200, save_every=200
        )
    )
    ema_decay: float = 0.99
    """Decay of the moving average of weights that is saved; 0: none."""
    val_images: int = 1000
    """Validation images an evaluation looks at."""
    engine: EngineName = "auto"
    """auto: DeepSpeed under its launcher, DDP under torchrun, else plain."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """auto takes bf16 autocast where the machine has it."""
    num_workers: int = 1
    """Processes that decode images; 0 decodes in the training process."""

    def __post_init__(self) -> None:
        check_train_sizes(self.train_sizes)
        if self.views < 0 or (self.views and len(self.train_sizes) > 1):
            raise ValueError(
                f"views must not be negative, and with views there is one train size, not {self.views} and "
                f"{list(self.train_sizes)}"
            )
        if not 0 <= self.unk_insert <= 1:
            raise ValueError(f"unk_insert must lie in [0, 1], not {self.unk_insert}")
        if self.init and self.model != ModelOptions():
            raise ValueError("--init brings its own sizes: leave the --model options out")


class RankerTask:
    """Features, loss and optimizer order of one step."""

    validation_metric = "miss@10"

    def __init__(self, options: Options, world: World, plan: BatchPlan, data: RankerData) -> None:
        self.options, self.world, self.plan, self.data = options, world, plan, data
        self.model = data.build_model(options.loop.seed).to(world.device)
        _check_sizes(options, self.model)
        self.finished = RankerModel(self.model.config, data.towers).to(world.device)
        engine = (options.engine, options.deepspeed)
        self.training = TrainingState(self.model, options.optim, world, plan, options.ema_decay, *engine)
        self.engine = self.training.engine
        self.label_ids = data.tokenizer.batch(data.names.labels) if data.names.labels else None
        self.reconstructions = (
            Reconstructions(options.reconstructions, world.device, options.precision)
            if options.reconstructions.tokenizer
            else None
        )
        self.reconstructed: Pairs | None = None
        self.evaluated: tuple[int, TwoTowerRanker] | None = None

    def train_step(self, batch: dict[str, Any], step: int) -> dict[str, float]:
        options, device = self.options, self.world.device
        self.model.train()
        lr = learning_rate(options.optim, step, options.loop.num_steps)
        self.engine.set_lr(lr)
        size = self.train_size(step)
        tensors = {name: batch[name] for name in ("image", "text_ids", *TARGETS)}
        seed = (options.loop.seed * 1_000_003 + step) * 131 + self.world.rank
        micro_batches = []
        for i, micro in enumerate(split_batch(tensors, self.plan.accumulation)):
            micro = {name: value.to(device) for name, value in micro.items()}
            if not options.views:
                micro["image"] = self.seen(micro["image"], size, seed + i)
            micro_batches.append(micro)
        metrics = large_batch_step(
            self.engine, micro_batches, self._label_ids(), options.loss, self.world, seed, self.forward
        )
        metrics["grad_norm"] = self.engine.step()
        self.training.update_average()
        return metrics | {"lr": lr}

    @property
    def augmented_size(self) -> int:
        """The side of augmented images: as much as any of those who look at them wants."""
        reconstructed = [self.reconstructions.image_size] if self.reconstructions else []
        return max([*self.options.train_sizes, *reconstructed])

    def seen(self, images: Tensor, size: int, seed: int) -> Tensor:
        """Augmented images as the tower gets them: some as reconstructions, at the size of the step."""
        if self.reconstructions:
            images = self.reconstructions.some_of(images, seed)
        return at_size(images, size)

    def frozen_features(self, images: Tensor, seed: int) -> Tensor:
        """Augmented images (B, 3, S, S) -> (B, F), see `rankers.training.feature_views`."""
        size = self.train_size(0)
        with torch.inference_mode(), autocast(self.world.device, self.options.precision):
            return self.model.frozen_features(self.seen(images.to(self.world.device), size, seed))

    def forward(self, model: Any, micro: dict[str, Tensor], label_ids: Tensor) -> Features:
        """One pass of both towers; every distinct text is read once."""
        count, length = len(micro["image"]), self.data.tokenizer.max_text_len
        rows = torch.cat(
            [micro["text_ids"].flatten(0, 1), F.pad(label_ids, (0, length - label_ids.shape[1]))]
        )
        texts, inverse = rows.unique(dim=0, return_inverse=True)  # (M, T) and (2B + K,)
        texts = texts[:, (texts != self.data.tokenizer.pad_id).any(0)]
        with autocast(self.world.device, self.options.precision):
            image, text, scale = model(micro["image"], texts)
        read = text[inverse]
        pairs = read[: 2 * count].view(count, 2, -1)  # (B, 2, D)
        return Features(image, pairs[:, 0], pairs[:, 1], read[2 * count :], scale)

    def _label_ids(self) -> Tensor:
        """(K, T) long; K is 0 where the data know no labels."""
        if self.label_ids is None or not self.options.loss.label_weight:
            return torch.zeros(0, 1, dtype=torch.long, device=self.world.device)
        return self.label_ids.to(self.world.device)

    def train_size(self, step: int) -> int:
        """The side of the training images at that step."""
        return train_size(self.options.train_sizes, step, self.options.loop.num_steps)

    def ranker(self, step: int) -> TwoTowerRanker:
        """The ranker as it is saved, for the step. All processes must call it: under ZeRO the weights are gathered."""
        if self.evaluated is not None and self.evaluated[0] == step:
            return self.evaluated[1]
        self.training.load_saved_weights_(self.finished)
        return self._finished_ranker(step)

    def _finished_ranker(self, step: int) -> TwoTowerRanker:
        towers = RankerTowers(
            str(self.options.loop.run_dir),
            self.finished,
            self.data.tokenizer,
            self.world.device,
            self.options.precision,
        )
        self.evaluated = (step, TwoTowerRanker(towers))
        return self.evaluated[1]

    def evaluate(self, step: int) -> dict[str, float]:
        """Over the validation images, with the weights that are saved; every process does the same."""
        names = self.data.names
        figures = retrieval_metrics(self.ranker(step), self.data.pairs, names.labels, names.colors)
        metrics = {"miss@10": 1 - figures["recall@10"], **figures}
        if self.reconstructions:
            self.reconstructed = self.reconstructed or replace(
                self.data.pairs, images=self.reconstructions.of_images(self.data.pairs.images)
            )
            found = retrieval_metrics(self.ranker(step), self.reconstructed, names.labels, names.colors)
            metrics |= {f"reconstructed/{name}": value for name, value in found.items()}
        return metrics

    def sample(self, step: int) -> dict[str, Image.Image]:
        """The best eight validation images for each of eight captions, a caption a row."""
        ranker, pairs = self.ranker(step), self.data.pairs
        captions = sorted(set(pairs.captions))
        captions = captions[:: math.ceil(len(captions) / 8)]
        order = ranker.score_matrix(captions, pairs.images).argsort(1, descending=True)[:, :8]
        size = self.model.config.image_size
        images = [resize_square(pairs.images[int(i)], size) for i in order.flatten()]
        return {"best_matches": make_grid(images, columns=order.shape[1])}

    def state(self) -> dict[str, Any]:
        return {"config": self._identity()} | self.training.state()

    def save(self, directory: Path, step: int, state: dict[str, Any]) -> None:
        weights = self.training.saved_weights(state)
        save_ranker(directory, self.model.config, weights, self.data.towers, step)
        names = self.data.names
        lexicon = NegativeWords(names.colors, names.categories) if names.categories else default_lexicon()
        fresh = self.evaluated is not None and self.evaluated[0] == step
        if not fresh:
            self.finished.load_state_dict(weights)
        ranker = self.evaluated[1] if fresh else self._finished_ranker(step)
        calibrate(ranker, self.data.pairs, lexicon, self.data.source).save(directory / CALIBRATION)

    def _identity(self) -> dict[str, Any]:
        """What a run cannot change when it goes on."""
        found = to_mapping(self.model.config) | {"towers": self.data.towers_sha256}
        if self.reconstructions:
            found["reconstructions"] = self.reconstructions.identity
        if self.options.views:
            found["views"] = self.options.views
        return found

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the run directory holds another model, one without moving average, or one that saw
        other reconstructions."""
        before, run_dir = state["config"], self.options.loop.run_dir
        require_same_config(run_dir, before, dict.fromkeys(before) | self._identity(), "a ranker")
        self.training.load_state(state, run_dir)
        self.evaluated = None


def _check_sizes(options: Options, model: RankerModel) -> None:
    size = model.config.image_size
    if options.views and model.config.image_tower != IMAGENET_TOWER:
        raise ValueError(
            f"views need an image tower that stays frozen, {IMAGENET_TOWER}: leave --views out with "
            f"{model.config.image_tower}"
        )
    if set(options.train_sizes) != {size} and not takes_any_size(model.config):
        raise ValueError(
            f"train_sizes {list(options.train_sizes)} need an image tower that takes any size (efficientnet-lite0, "
            "resnet-xs, -s, -m): "
            f"set --train-sizes {size}"
        )


@command
def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train; returns the last evaluation."""
    options = parse_options(Options, argv, description=__doc__)
    loop, world = options.loop, start_world(options.device)
    try:
        plan = batch_plan(loop.global_batch_size, world.size, loop.micro_batch_size)
        data = RankerData.prepare(options, world)
        task = RankerTask(options, world, plan, data)
        if world.is_main:
            for problem in data.train.problems + data.val.problems:
                say(f"note: {problem}")
            say(describe(task))
        views = open_views(task) if options.views else None
        decode = pair_decoder(
            task.augmented_size,
            data.tokenizer,
            options.attributes,
            data.names,
            options.augment,
            options.unk_insert,
            views,
        )

        def batches(start_sample: int) -> Iterator[dict[str, Any]]:
            return train_batches(
                data.train,
                decode,
                plan.global_batch_size,
                world,
                loop.seed,
                start_sample,
                options.num_workers,
            )

        return fit(task, batches, loop, world, to_mapping(options))
    finally:
        stop_world()


def describe(task: RankerTask) -> str:
    """One line on what is about to be trained."""
    names, data = task.data.names, task.data
    count = sum(p.numel() for p in task.model.parameters())
    return (
        f"{len(data.train)} images, {count / 1e6:.1f}M parameters, {len(names.captions)} distinct captions, "
        f"{len(names.labels)} categories, {len(names.colors)} colours, {data.tokenizer.vocab_size} word pieces"
    )


if __name__ == "__main__":
    main()
