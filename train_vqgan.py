"""Stage 1: train the image tokenizer on product images.

    python train_vqgan.py                                          # the embedded default, minutes on a CPU
    python train_vqgan.py --config configs/goods_128/vqgan.yaml
    torchrun --nproc_per_node 2 train_vqgan.py --config configs/goods_128/vqgan.yaml
    python train_vqgan.py --config configs/goods_128/vqgan_decoder.yaml    # sharper images, the same codes

The same command started again goes on from the newest checkpoint in the run directory.

Losses are differentiated by the reconstruction first, each once; their weighted sum then goes back through the
decoder. So the adaptive weight of the adversary (taming, equation 7) costs one more gradient of the last layer, not
one more pass through the perceptual network and the discriminator.
"""

import common  # noqa: F401 (before torch: Ctrl-C meanwhile leaves no traceback)

# isort: split

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common import checkpoint
from common.config import command, parse_options, to_mapping
from common.distributed import BatchPlan, World, batch_plan, start_world, stop_world
from common.image import stack_rows, to_image
from common.log import say
from common.loop import fit
from common.optim import learning_rate
from common.precision import autocast
from common.training_state import TrainingState
from data_tools.augment import Chain
from data_tools.shards.loader import DecodeImage, eval_batches, train_batches
from data_tools.synthetic.shards import embedded_default, ensure_synthetic
from vq.data import open_train_and_val, small_images, train_decoder
from vq.losses.adversary import Adversary
from vq.losses.foreground import pixel_weights
from vq.losses.perceptual import PerceptualDistance, load_perceptual
from vq.losses.reconstruction import color_shift, grid_loss, pixel_loss, psnr, shifted, shrunk_or_cropped
from vq.model import KIND, ImageTokenizer
from vq.options import Options
from vq.quantizer import CodeUsage, kmeans

SMALLEST_VIEW = 32  # pixels a side; smaller images are seen whole

ValBatches = Callable[[int], Iterator[dict[str, Any]]]


class TokenizerTask:
    """What `common.loop.fit` drives. `val_batches(n)`: the first n validation images, in batches."""

    def __init__(self, options: Options, world: World, plan: BatchPlan, val_batches: ValBatches) -> None:
        torch.manual_seed(options.loop.seed)
        self.options, self.world, self.plan, self.val_batches = options, world, plan, val_batches
        self.config = options.model_config
        self.model = ImageTokenizer(self.config)
        self.new_levels: list[int] = []
        if options.init:
            self._load_init(options.init)
        if options.freeze_codes:
            self.model.requires_grad_(False)
            self.model.decoder.requires_grad_(True)
        self._prepare()
        self._train_mode()
        self.model.to(world.device, memory_format=torch.channels_last)
        self.training = TrainingState(self.model, options.optim, world, plan, options.ema_decay)
        self.engine, self.ema = self.training.engine, self.training.ema
        self.usage = CodeUsage(self.config.codebook_size, self.config.code_depth)
        self.perceptual = self._perceptual()
        self.adversary = None
        if options.preset == "vqgan":
            self.adversary = Adversary(options.adversary, world, plan, options.precision)
        self.best = {"value": float("inf"), "step": 0}
        self.rollbacks = 0

    def _load_init(self, name: str) -> None:
        """Weights of another tokenizer; levels of codes that it lacks start from k-means at the first step."""
        directory = checkpoint.resolve(name)
        found = checkpoint.read_config(directory, KIND)["model"].get("code_depth", 1)
        if found == self.config.code_depth:
            checkpoint.load_weights(self.model, directory)
            return
        if found > self.config.code_depth:
            raise ValueError(
                f"--init {name} has {found} codes a position, not {self.config.code_depth}: python -m vq.levels "
                "keeps the first ones"
            )
        source = ImageTokenizer.from_pretrained(directory).state_dict()
        rows = source["quantizer.codebook.weight"]
        weights = self.model.quantizer.codebook.weight.detach().clone()
        weights[: len(rows)] = rows
        self.model.load_state_dict(source | {"quantizer.codebook.weight": weights})
        self.new_levels = list(range(found, self.config.code_depth))

    def _prepare(self) -> None:
        """Activation checkpointing and compilation."""
        encoder, decoder = self.model.encoder, self.model.decoder
        encoder.checkpointing = decoder.checkpointing = self.options.checkpoint_activations
        if self.options.compile:
            if self.world.device.type == "cpu" and not shutil.which("g++"):
                raise ValueError(
                    "compile needs the C++ compiler g++ on a CPU, and there is none: leave --compile out"
                )
            encoder.compile()
            decoder.trunk = torch.compile(
                decoder.trunk
            )  # the last layer stays outside: its gradient is asked for

    def _train_mode(self) -> None:
        self.model.train()
        if self.options.freeze_codes:  # the codes that encoding gives: no dropout, no drawing
            self.model.encoder.eval()
            self.model.quantizer.eval()

    @property
    def train_sizes(self) -> list[int]:
        """Sides of training images, multiples of the downsample factor; the loader delivers the largest."""
        factor = self.config.downsample_factor
        scales = self.options.multiscale or (1.0,)
        return [max(1, round(scale * self.config.image_size / factor)) * factor for scale in scales]

    @property
    def validation_metric(self) -> str:
        return "perceptual_loss" if self.perceptual else "rec_loss"

    def _perceptual(self) -> PerceptualDistance | None:
        if self.options.loss.perceptual == "none":
            return None
        model = load_perceptual(self.options.loss.perceptual, self.world.device)
        self._say(f"perceptual distance: {model.name}, weight {self.options.loss.perceptual_weight}")
        return model

    def _say(self, text: str) -> None:
        if self.world.is_main:
            say(text)

    # ------------------------------------------------------------------------------------------------------- a step

    def train_step(self, batch: dict[str, Any], step: int) -> dict[str, float]:
        lr = learning_rate(self.options.optim, step, self.options.loop.num_steps)
        self.engine.set_lr(lr)
        self._announce(step)
        batch = self._resize(batch, step)
        if step == 0 and self.new_levels:
            generator = torch.Generator().manual_seed(self.options.loop.seed)
            self._start_levels(batch["image"], self.new_levels, generator)
        if self.config.quantizer == "gumbel":
            self.model.quantizer.temperature = self.config.gumbel.temperature(
                step / self.options.loop.num_steps
            )
        totals: dict[str, float] = {}
        reconstructions = []
        for micro in self.engine.micro_batches(batch, self.plan.accumulation):
            images = micro["image"].to(self.world.device, memory_format=torch.channels_last)
            with autocast(self.world.device, self.options.precision):
                reconstruction, quantized = self.engine.model(images)
            gradient, metrics = self._gradient(reconstruction, images, micro.get("mask"), step)
            # Its value means nothing; its gradient by the reconstruction is `gradient`.
            surrogate = (reconstruction.float() * gradient).sum()
            self.engine.backward(surrogate if self.options.freeze_codes else surrogate + quantized.loss)
            self.usage.add(quantized.ids)
            reconstructions.append(reconstruction.detach().float())
            metrics["commit_loss"] = float(quantized.loss.detach())
            metrics["loss"] += metrics["commit_loss"]
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + value / self.plan.accumulation
        totals["grad_norm"] = self.engine.step()
        if self.config.quantizer == "ema" and not self.options.freeze_codes:
            self.model.quantizer.update_(self.world)
        self.training.update_average()
        if self.adversary:
            real, fake = self._view(batch["image"].to(self.world.device), step), torch.cat(reconstructions)
            totals |= self.adversary.train_step(
                real, self._view(fake, step), lr / self.options.optim.lr, step
            )
        if self.model.quantizer.has_codebook and not self.options.freeze_codes:
            self._care_for_codebook(batch["image"], step + 1)
        return totals | {"lr": lr}

    def _resize(self, batch: dict[str, Any], step: int) -> dict[str, Any]:
        """The tensors of the batch at this step's side, the same on every process."""
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        sizes = self.train_sizes
        rng = np.random.Generator(np.random.Philox(key=[self.options.loop.seed, step]))
        size = sizes[int(rng.integers(len(sizes)))]
        if size == batch["image"].shape[-1]:
            return tensors
        shape = (size, size)
        return {n: F.interpolate(t, shape, mode="bilinear", antialias=True) for n, t in tensors.items()}

    def _gradient(
        self, reconstruction: Tensor, images: Tensor, mask: Tensor | None, step: int
    ) -> tuple[Tensor, dict[str, float]]:
        """Of all losses by the reconstruction (B, 3, S, S) float32, and their values."""
        options = self.options.loss
        leaf = reconstruction.detach().float().requires_grad_()
        mask = None if mask is None else mask.to(self.world.device)
        weights = pixel_weights(images, options.foreground_weight, mask)
        loss = rec_loss = pixel_loss(options.pixel, leaf, images, weights)
        metrics = {"loss": 0.0, "rec_loss": float(rec_loss.detach())}
        if options.grid_weight and (self.perceptual or self.adversary):
            repeated = grid_loss(leaf, images)
            metrics["grid_loss"] = float(repeated.detach())
            loss = loss + options.grid_weight * repeated
        if self.perceptual:
            with autocast(self.world.device, self.options.precision):
                views = (self._perceptual_view(x, step) for x in (leaf, images))
                perceptual_loss = self.perceptual(*views).mean()
            metrics["perceptual_loss"] = float(perceptual_loss.detach())
            loss = loss + options.perceptual_weight * perceptual_loss
        metrics["loss"] = float(loss.detach())
        (gradient,) = torch.autograd.grad(loss, leaf)
        if self.adversary:
            last_layer = self.model.decoder.last_layer
            view = partial(self._view, step=step)
            extra, more = self.adversary.gradient(
                reconstruction, leaf, images, gradient, last_layer, step, view
            )
            gradient = gradient if extra is None else gradient + extra
            metrics |= more
        return gradient, metrics

    def _perceptual_view(self, images: Tensor, step: int) -> Tensor:
        """`_view`, at the side that the perceptual network is given."""
        key = (self.options.loop.seed, step)
        return self._view(shrunk_or_cropped(images, self.options.loss.perceptual_side, key), step)

    def _view(self, images: Tensor, step: int) -> Tensor:
        """What the perceptual network and the adversary see of `images` at this step."""
        smallest = max(SMALLEST_VIEW, self.options.adversary.discriminator.smallest_side)
        return shifted(images, self.options.loss.jitter, smallest, (self.options.loop.seed, step))

    def _announce(self, step: int) -> None:
        if not self.adversary:
            return
        config = self.options.adversary
        if step == config.start_step:
            self._say(
                f"step {step} | the discriminator trains from here; its loss counts from step {config.counts_from}"
            )
        if step == config.counts_from:
            self._say(
                f"step {step} | the adversary's loss counts from here, at full weight after {config.ramp_steps} steps: "
                "a dip in PSNR is expected, sharper images follow"
            )

    # ----------------------------------------------------------------------------------------------------- codebook

    def _care_for_codebook(self, images: Tensor, step: int) -> None:
        """k-means start at one step, revival of unused codes every `revive_every` until the last tenth of the run."""
        options = self.options
        kmeans_step = 0 if options.init else options.kmeans_step
        restart = step == kmeans_step
        revive = options.revive_every and step % options.revive_every == 0 and step > kmeans_step
        revive = revive and step < 0.9 * options.loop.num_steps
        if not (restart or revive):
            return
        generator = torch.Generator().manual_seed(options.loop.seed * 7919 + step)
        if restart:
            self._start_levels(images, range(self.config.code_depth), generator)
        else:
            self._revive(images, generator)
        self.usage.clear()

    def _start_levels(self, images: Tensor, levels: Iterable[int], generator: torch.Generator) -> None:
        """Codebooks of these levels from the centres of what this batch leaves for them, where it has enough points."""
        size = self.config.codebook_size
        points = self._latents(images)
        for level in levels:
            if len(points) < size:
                return
            centres = kmeans(self.model.quantizer.rest(points, level), size, 10, generator)
            self._replace_codes(torch.arange(size) + level * size, centres)

    def _revive(self, images: Tensor, generator: torch.Generator) -> None:
        """Codes that no image used move to points of this batch."""
        size = self.config.codebook_size
        points = self._latents(images)
        counts = self.world.sum_(self.usage.counts.clone())
        for level in range(self.config.code_depth):
            rows = (counts[level * size : (level + 1) * size] == 0).nonzero().squeeze(1)
            if len(rows):
                chosen = points[torch.randint(len(points), (len(rows),), generator=generator)]
                self._replace_codes(rows + level * size, self.model.quantizer.rest(chosen, level))

    @torch.no_grad()
    def _latents(self, images: Tensor) -> Tensor:
        """Points (M, D) that the quantizer compares, of this batch; those of rank 0 for all."""
        with autocast(self.world.device, self.options.precision):
            latents = self.model.encoder(images.to(self.world.device, memory_format=torch.channels_last))
        points = self.model.quantizer.normalize(latents).reshape(-1, self.config.codebook_dim)
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

    # --------------------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """Over the validation images, with the weights that are saved."""
        model, device = self._saved_model(), self.world.device
        usage = CodeUsage(self.config.codebook_size, self.config.code_depth)
        sums: dict[str, float] = {}
        shifts = []
        for batch in self.val_batches(self.options.val_images):
            images = batch["image"].to(device, memory_format=torch.channels_last)
            with autocast(device, self.options.precision):
                reconstruction, quantized = model(images)
                metrics = {
                    "rec_loss": pixel_loss(self.options.loss.pixel, reconstruction, images) * len(images)
                }
                if self.perceptual:
                    clamped = reconstruction.float().clamp(-1, 1)
                    metrics["perceptual_loss"] = self.perceptual(clamped, images).sum()
            metrics["psnr"] = psnr(reconstruction, images).sum()
            metrics["images"] = torch.tensor(len(images))
            usage.add(quantized.ids)
            shifts.append(color_shift(reconstruction, images))
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        count = sums.pop("images")
        shift = torch.cat(shifts)
        metrics = {name: total / count for name, total in sums.items()}
        metrics |= {
            "color_shift": float(shift.mean(0).abs().max()),
            "color_shift_each": float(shift.abs().mean()),
        }
        self._watch(metrics[self.validation_metric], step)
        self._train_mode()
        return metrics | usage.metrics()

    def _watch(self, value: float, step: int) -> None:
        """Announce a dip after the adversary's start; go back to the best checkpoint after a collapse."""
        best, config = self.best, self.options.adversary
        if value < best["value"]:
            self.best = {"value": value, "step": step}
            return
        if not self.adversary or config.factor(step) == 0 or not best["step"]:
            return
        name = self.validation_metric
        said = f"step {step} | {name} {value:.4f} after {best['value']:.4f} at step {best['step']}"
        share = value / best["value"] - 1
        if not 0 < config.rollback_share < share:
            self._say(f"{said}: a dip of {share:.1%} since the adversary counts")
            return
        directory = checkpoint.step_directory(Path(self.options.loop.run_dir), int(best["step"]))
        found = checkpoint.read_training_state(directory)["task"]
        self.load_state(found | {"best": best, "rollbacks": self.rollbacks + 1})
        self.adversary.weight_scale = 0.5**self.rollbacks
        self._say(
            f"{said}: collapse ({share:.1%} worse); back to the weights of step {best['step']}, adversary at "
            f"{self.adversary.weight_scale:g} of its weight"
        )

    def _saved_model(self) -> ImageTokenizer:
        if not self.ema:
            return self.model.eval()
        model = ImageTokenizer(self.config).to(self.world.device, memory_format=torch.channels_last)
        model.load_state_dict(self.ema.shadow)
        return model.eval()

    @torch.no_grad()
    def sample(self, step: int) -> dict[str, Image.Image]:
        """Validation images above their reconstructions."""
        images = next(self.val_batches(16))["image"].to(self.world.device, memory_format=torch.channels_last)
        with autocast(self.world.device, self.options.precision):
            reconstruction, _ = self._saved_model()(images)
        self._train_mode()
        rows = []
        for start in range(0, len(images), 8):
            rows += [[to_image(x) for x in part[start : start + 8]] for part in (images, reconstruction)]
        return {"reconstructions": stack_rows([r for r in rows if len(r) == len(rows[0])])}

    # -------------------------------------------------------------------------------------------------- checkpoints

    def save(self, directory: Path, step: int, state: dict[str, Any]) -> None:
        self._saved_model().write(directory, step)
        self._train_mode()

    def state(self) -> dict[str, Any]:
        state = {"usage": self.usage.counts, "best": self.best, "rollbacks": self.rollbacks}
        state |= self.training.state()
        if self.adversary:
            state["adversary"] = self.adversary.state()
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        self.training.load_state(state, self.options.loop.run_dir)
        self.usage.counts.copy_(state["usage"])
        self.best, self.rollbacks = dict(state.get("best", self.best)), int(state.get("rollbacks", 0))
        if self.adversary and "adversary" in state:
            self.adversary.load_state(state["adversary"])


@command
def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, or go on; returns the last evaluation."""
    options = parse_options(
        Options, argv, description=__doc__, embedded=Path(__file__).parent / "configs/demo/vqgan.yaml"
    )
    world = start_world(options.device)
    model = options.model_config
    if not (options.data or options.image_folder) and world.is_main:
        say(
            "no --data given: training on the embedded default, product-like images rendered by data_tools.synthetic"
        )
        ensure_synthetic(embedded_default(model.image_size), image_size=model.image_size)
    world.barrier()
    data = options.data or str(embedded_default(model.image_size))
    plan = batch_plan(options.loop.global_batch_size, world.size, options.loop.micro_batch_size)
    train, val = open_train_and_val(data, options.image_folder, options.remote)
    if world.is_main:
        for problem in [
            *dict.fromkeys([*train.problems, *val.problems]),
            small_images(train, model.image_size),
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
            say(f"{len(train)} images, {count:.1f}M parameters, {grid}")
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


if __name__ == "__main__":
    main()
