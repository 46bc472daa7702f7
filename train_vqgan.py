"""Stage 1: train the image tokenizer on product pictures.

    python train_vqgan.py                                          # the embedded default, minutes on a CPU
    python train_vqgan.py --config configs/goods_128/vqgan.yaml
    torchrun --nproc_per_node 2 train_vqgan.py --config configs/goods_128/vqgan.yaml

The same command started again goes on from the newest checkpoint in the run directory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from common.config import command, parse_options, to_mapping
from common.distributed import BatchPlan, Precision, World, autocast, batch_plan, make_engine, start_world, stop_world
from common.image import stack_rows, to_image
from common.log import say
from common.loop import LoopConfig, fit
from common.optim import Ema, OptimConfig, adamw, learning_rate
from data_tools.crops import CropFlip
from data_tools.index import ShardIndex
from data_tools.loader import IMAGE_SUFFIXES, DecodeImage, eval_batches, train_batches
from data_tools.synthetic import ensure_synthetic
from vq.losses import color_shift, multiscale_l1, psnr
from vq.model import ImageTokenizer, TokenizerConfig
from vq.quantizer import CodeUsage, kmeans


@dataclass(frozen=True)
class Options:
    """Stage 1: pictures -> image tokenizer."""

    data: str = ""
    """Folder of image shards (train-*.tar, val-*.tar); empty: the embedded default in data/synthetic."""
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=4e-4, beta1=0.9, beta2=0.99))
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(run_dir=Path("runs/vqgan")))
    augment: CropFlip = field(default_factory=CropFlip)
    kmeans_step: int = 50
    """Step at which the codebook starts anew from the centres of the latents seen; 0: never."""
    revive_every: int = 100
    """Steps between revivals of codes that no picture used; 0: never."""
    ema_decay: float = 0.999
    """Decay of the moving average of weights that is saved; 0: none."""
    val_pictures: int = 1000
    """Validation pictures an evaluation looks at."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """auto takes bf16 autocast where the machine has it."""
    num_workers: int = 1
    """Processes that decode pictures; 0 decodes in the training process."""


class TokenizerTask:
    """Forward, losses, optimizer order and codebook care of one step."""

    validation_metric = "rec_loss"

    def __init__(self, options: Options, world: World, plan: BatchPlan, val: ShardIndex) -> None:
        torch.manual_seed(options.loop.seed)
        self.options, self.world, self.plan, self.val = options, world, plan, val
        self.model = ImageTokenizer(options.model).to(world.device, memory_format=torch.channels_last)
        optimizer = adamw(self.model, options.optim)
        self.engine = make_engine(self.model, optimizer, world, plan, options.optim.grad_clip, name="plain")
        self.ema = Ema(self.model, options.ema_decay) if options.ema_decay else None
        self.usage = CodeUsage(options.model.codebook_size)

    def train_step(self, batch: dict[str, Any], step: int) -> dict[str, float]:
        options = self.options
        self.engine.set_lr(learning_rate(options.optim, step, options.loop.num_steps))
        totals: dict[str, float] = {}
        for micro in self.engine.micro_batches({"image": batch["image"]}, self.plan.accumulation):
            images = micro["image"].to(self.world.device, memory_format=torch.channels_last)
            with autocast(self.world.device, options.precision):
                reconstruction, quantized = self.engine.model(images)
            rec_loss = multiscale_l1(reconstruction, images)
            loss = rec_loss + quantized.loss
            self.engine.backward(loss)
            self.usage.add(quantized.ids)
            for name, value in (("loss", loss), ("rec_loss", rec_loss), ("commit_loss", quantized.loss)):
                totals[name] = totals.get(name, 0.0) + float(value.detach()) / self.plan.accumulation
        totals["grad_norm"] = self.engine.step()
        if self.ema:
            self.ema.update(self.model)
        self._care_for_codebook(batch["image"], step + 1)
        return totals | {"lr": learning_rate(options.optim, step, options.loop.num_steps)}

    def _care_for_codebook(self, images: Tensor, step: int) -> None:
        """k-means start at one step, revival of unused codes every `revive_every` until the last tenth of the run."""
        options = self.options
        restart = step == options.kmeans_step
        revive = options.revive_every and step % options.revive_every == 0 and step > options.kmeans_step
        revive = revive and step < 0.9 * options.loop.num_steps
        if not (restart or revive):
            return
        generator = torch.Generator().manual_seed(options.loop.seed * 7919 + step)
        points = self._latents(images)
        counts = self.world.sum_(self.usage.counts.clone())
        if restart:
            rows = torch.arange(options.model.codebook_size)
            vectors = kmeans(points, len(rows), 10, generator) if len(points) >= len(rows) else None
        else:
            rows = (counts == 0).nonzero().squeeze(1)
            vectors = points[torch.randint(len(points), (len(rows),), generator=generator)]
        if vectors is not None and len(rows):
            self._replace_codes(rows, vectors)
        self.usage.clear()

    @torch.no_grad()
    def _latents(self, images: Tensor) -> Tensor:
        """Points (M, D) that the quantizer compares, of this batch; those of rank 0 for all."""
        with autocast(self.world.device, self.options.precision):
            latents = self.model.encoder(images.to(self.world.device, memory_format=torch.channels_last))
        points = self.model.quantizer.normalize(latents).reshape(-1, self.options.model.codebook_dim)
        return self.world.from_main_(points.float().cpu())

    def _replace_codes(self, rows: Tensor, vectors: Tensor) -> None:
        """In the weights, their moments and the moving average alike."""
        self.model.quantizer.replace_(rows, vectors)
        parameter = self.model.quantizer.codebook.weight
        for moment in self.engine.optimizer.state.get(parameter, {}).values():
            if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                moment[rows] = 0.0
        if self.ema:
            self.ema.shadow["quantizer.codebook.weight"][rows] = parameter.detach()[rows]

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """Over the validation pictures, with the weights that are saved."""
        model, device = self._saved_model(), self.world.device
        usage = CodeUsage(self.options.model.codebook_size)
        rows, shifts = [], []
        for images in self._val_images(self.options.val_pictures):
            with autocast(device, self.options.precision):
                reconstruction, quantized = model(images)
            usage.add(quantized.ids)
            shifts.append(color_shift(reconstruction, images))
            loss = multiscale_l1(reconstruction, images) * len(images)
            rows.append((float(loss), float(psnr(reconstruction, images).sum()), len(images)))
        count = sum(r[2] for r in rows)
        shift = torch.cat(shifts)
        figures = {"rec_loss": sum(r[0] for r in rows) / count, "psnr": sum(r[1] for r in rows) / count}
        figures |= {"color_shift": float(shift.mean(0).abs().max()), "color_shift_each": float(shift.abs().mean())}
        return figures | usage.figures()

    def _val_images(self, limit: int) -> Iterator[Tensor]:
        decode = DecodeImage(self.options.model.image_size, first_caption=True)
        for batch in eval_batches(self.val, decode, 32, limit):
            yield batch["image"].to(self.world.device, memory_format=torch.channels_last)

    def _saved_model(self) -> ImageTokenizer:
        if not self.ema:
            return self.model.eval()
        model = ImageTokenizer(self.options.model).to(self.world.device, memory_format=torch.channels_last)
        model.load_state_dict(self.ema.shadow)
        return model.eval()

    @torch.no_grad()
    def sample(self, step: int) -> dict[str, Image.Image]:
        """Validation pictures above their reconstructions."""
        images = next(self._val_images(16))
        with autocast(self.world.device, self.options.precision):
            reconstruction, _ = self._saved_model()(images)
        rows = []
        for start in range(0, len(images), 8):
            rows += [[to_image(x) for x in part[start : start + 8]] for part in (images, reconstruction)]
        return {"reconstructions": stack_rows([r for r in rows if len(r) == len(rows[0])])}

    def save(self, directory: Path, step: int, state: dict[str, Any]) -> None:
        self._saved_model().write(directory, step)
        self.model.train()

    def state(self) -> dict[str, Any]:
        state = {"weights": self.engine.weights(), "engine": self.engine.state(), "usage": self.usage.counts}
        return state | ({"ema": self.ema.state()} if self.ema else {})

    def load_state(self, state: dict[str, Any]) -> None:
        self.engine.load_state(state["weights"], state["engine"])
        self.usage.counts.copy_(state["usage"])
        if self.ema:
            self.ema.load_state(state["ema"])


@command
def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train; returns the last evaluation."""
    options = parse_options(Options, argv, description=__doc__)
    world = start_world(options.device)
    if not options.data and world.is_main:
        say("no --data given: training on the embedded default, product-like pictures drawn by data_tools.synthetic")
        ensure_synthetic(Path("data/synthetic"), image_size=options.model.image_size)
    world.barrier()
    data = options.data or "data/synthetic"
    plan = batch_plan(options.loop.global_batch_size, world.size, options.loop.micro_batch_size)
    train = ShardIndex.open(data, "train").require(*IMAGE_SUFFIXES)
    val = ShardIndex.open(data, "val").require(*IMAGE_SUFFIXES)
    if world.is_main:
        for problem in train.problems + val.problems:
            say(f"note: {problem}")
    task = TokenizerTask(options, world, plan, val)
    if world.is_main:
        count = sum(p.numel() for p in task.model.parameters())
        grid = options.model.grid_size
        say(f"{len(train)} pictures, {count / 1e6:.1f}M parameters, {grid}x{grid} codes of {options.model.codebook_size}")
    decode = DecodeImage(options.model.image_size, options.augment)

    def batches(start_sample: int) -> Iterator[dict[str, Any]]:
        return train_batches(
            train, decode, plan.global_batch_size, world, options.loop.seed, start_sample, options.num_workers
        )

    try:
        return fit(task, batches, options.loop, world, to_mapping(options))
    finally:
        stop_world()


if __name__ == "__main__":
    main()
