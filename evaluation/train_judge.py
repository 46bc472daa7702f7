"""Train the judge of goods: kind and colour of a picture, from the facts in the shards' JSON.

    python -m evaluation.train_judge                                        # the embedded default, a minute on a CPU
    python -m evaluation.train_judge --config configs/goods_128/judge.yaml
    python -m evaluation.train_judge --data DIR --attributes.label-field category

Needs image shards whose JSON names the kind; the colour is learned where it is named. The same command started again
goes on from the newest checkpoint. The judge must not share weights or objective with any ranker: it says which
picture a ranker was right to choose.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from common.config import command, parse_options, to_mapping
from common.distributed import BatchPlan, EngineName, World, batch_plan, make_engine, start_world, stop_world
from common.image import make_grid, resize_square, to_image, to_tensor
from common.log import say
from common.loop import LoopConfig, fit
from common.optim import Ema, OptimConfig, learning_rate, make_optimizer
from common.precision import Precision, autocast
from data_tools.holdout import open_splits
from data_tools.index import ShardIndex
from data_tools.loader import IMAGE_SUFFIXES, CorruptSample, eval_batches, open_image, train_batches
from data_tools.synthetic import ensure_synthetic
from evaluation.goods_judge import JudgeNetwork, JudgeSizes, Vocabulary, save_judge
from evaluation.judge import degrade
from evaluation.statistics import wilson
from rankers.growing import at_size, check_train_sizes, train_size
from rankers.pairs import AttributeConfig, CropAugment, read_meta, value_of

EMBEDDED = Path("data/synthetic")
MAX_KINDS = 5000


@dataclass(frozen=True)
class Options:
    """Image shards -> judge of kinds and colours."""

    data: str = ""
    """Folder of image shards (train-*.tar, val-*.tar); empty: the embedded default in data/synthetic."""
    attributes: AttributeConfig = field(default_factory=AttributeConfig)
    word_field: str = "item_zh"
    """Field with the noun that a caption uses for the kind, where it is another than the label; empty: none."""
    model: JudgeSizes = field(default_factory=JudgeSizes)
    augment: CropAugment = field(default_factory=lambda: CropAugment(min_area=0.5, light=0.05))
    train_sizes: tuple[int, ...] = (64,)
    """Sides in pixels of the training pictures, one after the other in equal parts of the run."""
    degrade: float = 0.4
    """Share of pictures blurred, made coarse, compressed or noisy, as generated ones may be."""
    color_weight: float = 0.5
    """Weight of the colour's loss beside the kind's."""
    label_smoothing: float = 0.1
    """Probability spread over the other kinds."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-3, warmup_steps=50, beta2=0.98))
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            run_dir=Path("runs/judge"), num_steps=300, global_batch_size=64, eval_every=150, save_every=150
        )
    )
    ema_decay: float = 0.99
    """Decay of the moving average of weights that is saved."""
    val_pictures: int = 2000
    """Validation pictures an evaluation looks at."""
    engine: EngineName = "auto"
    """auto: DeepSpeed under its launcher, DDP under torchrun, else plain."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """auto takes bf16 autocast where the machine has it."""
    num_workers: int = 1
    """Processes that decode pictures; 0 decodes in the training process."""

    def __post_init__(self) -> None:
        check_train_sizes(self.train_sizes)
        if not 0 <= self.degrade <= 1 or not 0 <= self.label_smoothing < 1 or self.color_weight < 0:
            raise ValueError(
                "degrade must lie in [0, 1], label_smoothing in [0, 1) and color_weight not be negative"
            )
        if not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie between 0 and 1, not {self.ema_decay}")
        if not self.attributes.label_field:
            raise ValueError(
                "the judge learns kinds: name the field that holds them, --attributes.label-field"
            )


def scan_words(index: ShardIndex, attributes: AttributeConfig, word_field: str) -> Vocabulary:
    """Kinds, colours and the words for kinds, over all samples. Raises ValueError for fewer than two kinds."""
    kinds, colors = set(), set()
    names: dict[str, set[str]] = {}
    for i in range(len(index)):
        meta = _meta(index, i)
        kind = value_of(meta, attributes.label_field)
        if kind:
            kinds.add(kind)
            for word in {kind, value_of(meta, word_field)} - {""}:
                names.setdefault(word, set()).add(kind)
        colors.add(value_of(meta, attributes.color_field))
    if not 2 <= len(kinds) <= MAX_KINDS:
        raise ValueError(
            f"the field {attributes.label_field} of {index.paths[0].parent} has {len(kinds)} values: a judge needs 2 "
            f"to {MAX_KINDS} kinds of goods; name another field with --attributes.label-field"
        )
    colors -= {""}
    words = {word: sorted(meant) for word, meant in sorted(names.items())}
    return Vocabulary(tuple(sorted(kinds)), tuple(sorted(colors)) if len(colors) > 1 else (), words)


def _meta(index: ShardIndex, i: int) -> dict[str, Any]:
    """{} where the JSON is damaged: such a sample is counted when its picture is read."""
    try:
        return read_meta(index.read(i, ("json",)).get("json", b""))
    except CorruptSample:
        return {}


@dataclass(frozen=True)
class DecodeFacts:
    """Sample -> image (3, S, S) in [-1, 1], kind and color () long, -1 for none, key."""

    image_size: int
    words: Vocabulary
    attributes: AttributeConfig
    augment: CropAugment | None = None
    degrade: float = 0.0

    def __call__(self, index: ShardIndex, i: int, rng: np.random.Generator) -> dict[str, Any]:
        members = index.read(i, (*IMAGE_SUFFIXES, "json"))
        image = open_image(next((members[s] for s in IMAGE_SUFFIXES if s in members), b""))
        meta = read_meta(members.get("json", b""))
        return {
            "image": self._pixels(image, rng),
            "kind": torch.tensor(_place(self.words.kinds, value_of(meta, self.attributes.label_field))),
            "color": torch.tensor(_place(self.words.colors, value_of(meta, self.attributes.color_field))),
            "key": index.samples[i].key,
        }

    def _pixels(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        if self.augment is None:
            return to_tensor(resize_square(image, self.image_size))
        square = resize_square(image, round(self.image_size * 1.15))
        if rng.random() < self.degrade:
            square = degrade(rng, square)
        return self.augment(square, self.image_size, rng)


def _place(names: Sequence[str], name: str) -> int:
    return names.index(name) if name in names else -1


class JudgeTask:
    """Loss and optimizer order of one step."""

    validation_metric = "kind_error"

    def __init__(
        self, options: Options, world: World, plan: BatchPlan, val: ShardIndex, words: Vocabulary
    ) -> None:
        self.options, self.world, self.val, self.words = options, world, val, words
        torch.manual_seed(options.loop.seed)
        sizes = (options.model, len(words.kinds), len(words.colors))
        self.model = JudgeNetwork(*sizes).to(world.device)
        self.finished = JudgeNetwork(*sizes).to(world.device)
        self.ema = Ema(self.model, options.ema_decay)
        optimizer = make_optimizer(self.model, options.optim)
        self.engine = make_engine(self.model, optimizer, world, plan, options.optim.grad_clip, options.engine)
        self.plan = plan
        self.figures: dict[str, float] = {}
        self.wrong: list[Image.Image] = []
        self.evaluated_step = -1

    def train_step(self, batch: dict[str, Any], step: int) -> dict[str, float]:
        options, device = self.options, self.world.device
        self.model.train()
        lr = learning_rate(options.optim, step, options.loop.num_steps)
        self.engine.set_lr(lr)
        tensors = {name: batch[name] for name in ("image", "kind", "color")}
        sums: dict[str, float] = {}
        for micro in self.engine.micro_batches(tensors, self.plan.accumulation):
            parts = self.losses({name: value.to(device) for name, value in micro.items()}, step)
            self.engine.backward(parts["loss"])
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) / self.plan.accumulation
        sums["grad_norm"] = self.engine.step()
        with self.engine.full_weights() as model:
            self.ema.update(model)
        return sums | {"lr": lr}

    def losses(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Cross-entropies over the pictures whose kind, and whose colour, is known; float32."""
        options = self.options
        images = at_size(batch["image"], train_size(options.train_sizes, step, options.loop.num_steps))
        with autocast(self.world.device, options.precision):
            kinds, colors = self.engine.model(images)
        kind = mean_cross_entropy(kinds, batch["kind"], options.label_smoothing)
        color = mean_cross_entropy(colors, batch["color"], 0.0)
        right = (kinds.argmax(1) == batch["kind"]).float().mean()
        loss = kind + options.color_weight * color
        return {"loss": loss, "kind_loss": kind, "color_loss": color, "batch_accuracy": right}

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """Shares right over the validation pictures with 95 % intervals; every process does the same."""
        self.finished.load_state_dict(self.ema.shadow)
        self.finished.eval()
        decode = DecodeFacts(self.options.model.image_size, self.words, self.options.attributes)
        hits: dict[str, list[bool]] = {"kind": [], "color": []}
        self.wrong = []
        for batch in eval_batches(self.val, decode, 64, self.options.val_pictures):
            logits = dict(zip(hits, self.finished(batch["image"].to(self.world.device)), strict=True))
            for name, found in hits.items():
                known = (batch[name] >= 0).nonzero()[:, 0]
                if len(known):
                    right = logits[name].argmax(1).cpu()[known] == batch[name][known]
                    found += right.tolist()
                    if name == "kind":
                        self.wrong += [to_image(batch["image"][i]) for i in known[~right]]
        if not hits["kind"]:
            raise ValueError(f"no validation picture of {self.val.paths[0].parent} has a known kind")
        self.figures = {"kind_error": 1 - sum(hits["kind"]) / len(hits["kind"])}
        for name, found in hits.items():
            if found:
                share = wilson(sum(found), len(found))
                self.figures |= {f"{name}_accuracy": share.value, f"{name}_low": share.low}
                self.figures |= {f"{name}_high": share.high, f"{name}_count": float(len(found))}
        self.evaluated_step = step
        return self.figures

    def sample(self, step: int) -> dict[str, Image.Image]:
        """The first 64 validation pictures whose kind is named wrong."""
        if self.evaluated_step != step:
            self.evaluate(step)
        return {"kind_wrong": make_grid(self.wrong[:64])} if self.wrong else {}

    def state(self) -> dict[str, Any]:
        state = {"config": self.config(), "weights": self.engine.weights(), "engine": self.engine.state()}
        return state | {"ema": self.ema.state()}

    def config(self) -> dict[str, Any]:
        return to_mapping(self.options.model) | {"vocabulary": to_mapping(self.words)}

    def save(self, directory: Path, step: int, state: dict[str, Any]) -> None:
        if self.evaluated_step != step:
            self.evaluate(step)
        save_judge(directory, self.options.model, self.words, self.ema.shadow, step, self.figures)

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the run directory holds a judge of other sizes or other kinds."""
        before, now = state["config"], self.config()
        changed = [name for name in now if now[name] != before.get(name)]
        if changed:
            raise ValueError(
                f"{self.options.loop.run_dir} holds a judge with another {changed[0]}: choose another "
                "--loop.run-dir, or the options and data that it was started with"
            )
        self.engine.load_state(state["weights"], state["engine"])
        self.ema.load_state(state["ema"])
        self.evaluated_step = -1


def mean_cross_entropy(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Over the rows with a target of 0 or more, in float32; 0 with a gradient of 0 where there is none."""
    known = target >= 0
    if not bool(known.any()):
        return logits.float().sum() * 0.0
    return F.cross_entropy(logits.float()[known], target[known], label_smoothing=smoothing)


def open_data(options: Options, world: World) -> tuple[ShardIndex, ShardIndex]:
    """Training and validation shards."""
    source = options.data or str(EMBEDDED)
    if not options.data:
        if world.is_main:
            say("no --data given: training on the embedded default, drawn by data_tools.synthetic")
            if not any(EMBEDDED.glob("train-*.tar")):
                ensure_synthetic(EMBEDDED)
        world.barrier()
    return tuple(index.require(*IMAGE_SUFFIXES) for index in open_splits(source))


@command
def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train; returns the last evaluation."""
    options = parse_options(Options, argv, description=__doc__)
    loop, world = options.loop, start_world(options.device)
    try:
        plan = batch_plan(loop.global_batch_size, world.size, loop.micro_batch_size)
        train, val = open_data(options, world)
        words = scan_words(train, options.attributes, options.word_field)
        task = JudgeTask(options, world, plan, val, words)
        if world.is_main:
            for problem in train.problems + val.problems:
                say(f"note: {problem}")
            count = sum(p.numel() for p in task.model.parameters())
            say(
                f"{len(train)} pictures, {count / 1e6:.1f}M parameters, {len(words.kinds)} kinds, {len(words.colors)} "
                "colours"
            )
        sizes = (max(options.train_sizes), words, options.attributes)
        decode = DecodeFacts(*sizes, options.augment, options.degrade)

        def batches(start_sample: int) -> Iterator[dict[str, Any]]:
            size, workers = plan.global_batch_size, options.num_workers
            return train_batches(train, decode, size, world, loop.seed, start_sample, workers)

        return fit(task, batches, loop, world, to_mapping(options))
    finally:
        stop_world()


if __name__ == "__main__":
    main()
