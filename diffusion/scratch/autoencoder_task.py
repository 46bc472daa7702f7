"""Stage A: one training step of the AutoencoderKL (Rombach et al. 2022, arXiv:2112.10752, section 3.1, KL-reg.).

The losses hold colours from the first step: L1 of pixels and of the errors averaged over 2, 4 and 8 pixels, and the
error in opponent colours. With a perceptual distance alone, red and green are lost first and come back late.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from common import checkpoint
from common.config import to_mapping
from common.distributed import BatchPlan, World
from common.image import stack_rows, to_image
from common.log import say
from common.optim import learning_rate
from common.precision import autocast
from common.training_state import TrainingState, require_same_config
from diffusion.objective import sample_noise
from diffusion.scratch.options import Options
from vq.losses.perceptual import load_perceptual
from vq.losses.reconstruction import color_shift, multiscale_l1, psnr

KIND = "diffusion_autoencoder"
OPPONENT = ((1.0, -1.0, 0.0), (-0.5, -0.5, 1.0))  # red - green, blue - yellow
COLOR_POOL = 4  # colours of areas count, not of single pixels

ValBatches = Callable[[int], Iterator[dict[str, Any]]]


class Reconstruct(nn.Module):
    """Images (B, 3, S, S) and noise (B, C, h, w) -> reconstruction, KL divergence a latent number."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(images).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()  # (B, C, h, w)
        latents = mean + torch.exp(0.5 * logvar) * noise  # (B, C, h, w)
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        return self.vae.decode(latents).sample, kl


def opponent_colors(images: Tensor) -> Tensor:
    """(B, 3, S, S) -> (B, 2, S / 4, S / 4): red minus green and blue minus yellow, averaged over areas."""
    matrix = torch.tensor(OPPONENT, device=images.device)
    return F.avg_pool2d(torch.einsum("oc,bchw->bohw", matrix, images.float()), COLOR_POOL)


def color_loss(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Mean absolute error of the opponent colours, float32."""
    return (opponent_colors(reconstruction) - opponent_colors(images)).abs().mean()


def color_slope(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Regression slope of the reconstruction's opponent colours on the originals', of the weaker of the two: 1 full
    colour, 0 grey. Red against green is lost first, and a slope over both would hide it."""
    ours, theirs = (opponent_colors(x).transpose(0, 1).flatten(1) for x in (reconstruction, images))  # (2, n)
    return ((ours * theirs).sum(1) / theirs.square().sum(1).clamp(min=1e-6)).min()


@dataclass(frozen=True)
class StageA:
    """What the task needs beside the options."""

    world: World
    plan: BatchPlan
    val_batches: ValBatches
    run_dir: Path


class AutoencoderTask:
    """What `common.loop.fit` drives."""

    validation_metric = "rec_loss"

    def __init__(self, options: Options, stage: StageA) -> None:
        torch.manual_seed(options.loop.seed)
        self.options, self.stage, self.config = options, stage, options.stage_a
        self.world, self.plan = stage.world, stage.plan
        self.model = Reconstruct(options.autoencoder.build())
        self.model.to(
            self.world.device
        )  # activations alone are channels_last: DeepSpeed broadcasts plain strides
        how = (self.world, self.plan, self.config.ema_decay, options.engine, options.deepspeed)
        self.training = TrainingState(self.model, self.config.optim, *how)
        self.engine = self.training.engine
        self.finished = Reconstruct(options.autoencoder.build())
        self.finished.to(self.world.device, memory_format=torch.channels_last).eval()
        self.seconds = 0.0  # of training steps, over all starts of the run
        self.perceptual = None
        if self.config.perceptual != "none":
            self.perceptual = load_perceptual(self.config.perceptual, self.world.device)
            if self.world.is_main:
                say(f"perceptual distance: {self.perceptual.name}, weight {self.config.perceptual_weight}")

    def train_step(self, batch: dict[str, Any], step: int) -> dict[str, float]:
        lr, started = learning_rate(self.config.optim, step, self.config.num_steps), time.perf_counter()
        self.engine.set_lr(lr)
        images = self._crop(batch["image"], step)
        latent_shape = self._latent_shape(images.shape[-1])
        noise, _ = sample_noise(batch["key"], latent_shape, 1, (self.options.loop.seed, step))
        totals: dict[str, float] = {}
        for micro in self.engine.micro_batches({"image": images, "noise": noise}, self.plan.accumulation):
            images = micro["image"].to(self.world.device, memory_format=torch.channels_last)
            with autocast(self.world.device, self.options.precision):
                reconstruction, kl = self.engine.model(images, micro["noise"].to(self.world.device))
            loss, metrics = self._losses(reconstruction.float(), images, kl)
            self.engine.backward(loss)
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + float(value.detach()) / self.plan.accumulation
        totals["grad_norm"] = self.engine.step()
        self.training.update_average()
        self.seconds += time.perf_counter() - started
        return totals | {"lr": lr}

    def _losses(self, reconstruction: Tensor, images: Tensor, kl: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        metrics = {"rec_loss": multiscale_l1(reconstruction, images, scales=(2, 4, 8)), "kl": kl}
        metrics["color_loss"] = color_loss(reconstruction, images)
        loss = metrics["rec_loss"] + config.color_weight * metrics["color_loss"] + config.kl_weight * kl
        if self.perceptual:
            with autocast(self.world.device, self.options.precision):
                metrics["perceptual_loss"] = self.perceptual(reconstruction, images).mean()
            loss = loss + config.perceptual_weight * metrics["perceptual_loss"]
        return loss, {"loss": loss} | metrics

    def _crop(self, images: Tensor, step: int) -> Tensor:
        """(B, 3, S, S) -> small crops in the first steps, cut at one place for the whole batch."""
        side = self.config.small_crop
        if (
            not side
            or side >= images.shape[-1]
            or step >= self.config.small_crop_share * self.config.num_steps
        ):
            return images
        rng = np.random.Generator(np.random.Philox(key=[self.options.loop.seed, step]))
        top, left = rng.integers(images.shape[-1] - side + 1, size=2)
        return images[..., top : top + side, left : left + side]

    def _latent_shape(self, side: int) -> tuple[int, int, int]:
        config = self.options.autoencoder
        return config.latent_channels, side // config.downsample_factor, side // config.downsample_factor

    @torch.no_grad()
    def _reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """From the posterior's mean, with the weights that are saved."""
        zeros = torch.zeros((len(images), *self._latent_shape(images.shape[-1])), device=images.device)
        with autocast(self.world.device, self.options.precision):
            reconstruction, kl = self.finished(images, zeros)
        return reconstruction.float(), kl

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """Over the validation images, with the weights that are saved."""
        self.training.load_saved_weights_(self.finished)
        sums: dict[str, float] = {}
        count = 0
        for batch in self.stage.val_batches(self.config.val_images):
            images = batch["image"].to(self.world.device, memory_format=torch.channels_last)
            reconstruction, kl = self._reconstruct(images)
            _, metrics = self._losses(reconstruction, images, kl)
            metrics["psnr"] = psnr(reconstruction, images).mean()
            metrics["color_shift"] = color_shift(reconstruction, images).abs().mean()
            metrics["color_slope"] = color_slope(reconstruction, images)
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(images)
            count += len(images)
        return {name: total / count for name, total in sums.items()}

    def sample(self, step: int) -> dict[str, Image.Image]:
        """Originals above their reconstructions."""
        self.training.load_saved_weights_(self.finished)
        if not self.world.is_main:
            return {}
        images = next(iter(self.stage.val_batches(12)))["image"]
        reconstruction, _ = self._reconstruct(images.to(self.world.device))
        rows = [[to_image(x) for x in part] for part in (images, reconstruction.cpu())]
        return {"reconstructions": stack_rows(rows)}

    def state(self) -> dict[str, Any]:
        own = {"config": to_mapping(self.options.autoencoder), "seconds": self.seconds}
        return own | self.training.state()

    def save(self, directory: Path, step: int, state: dict[str, Any]) -> None:
        weights = self.training.saved_weights(state)
        plain = {name.removeprefix("vae."): tensor for name, tensor in weights.items()}
        costs = {"training_hours": self.seconds / 3600, "images_seen": step * self.plan.global_batch_size}
        checkpoint.write_model(directory, KIND, state["config"], plain, step, **costs)

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the run directory holds another autoencoder."""
        require_same_config(self.stage.run_dir, state["config"], to_mapping(self.options.autoencoder))
        self.training.load_state(state, self.stage.run_dir)
        self.seconds = float(state["seconds"])
