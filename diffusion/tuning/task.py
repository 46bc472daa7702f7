"""What `common.loop.fit` drives when a base is fine-tuned, in full or by LoRA: step, evaluation, grids, checkpoints.

What differs between the two stands in a `Method`: which weights are trained, what is written, which grids are shown.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from common.distributed import BatchPlan, World
from common.log import say
from common.optim import learning_rate
from common.training_state import TrainingState
from diffusion.base import DiffusionBase
from diffusion.objective import NoiseSchedule, diffusion_loss, sample_noise
from diffusion.text import count_truncated
from diffusion.tuning.data import TuneData
from diffusion.tuning.denoiser import Denoiser, LossScale
from diffusion.tuning.distance import image_distance
from diffusion.tuning.options import TuneOptions
from diffusion.tuning.prior import Prior
from diffusion.tuning.step import (
    autocast_for,
    drop_texts,
    latents_of,
    prepare_step,
    sample_keys,
    step_loss,
    text_inputs,
)


class Method(Protocol):
    """Full fine-tuning or LoRA."""

    trains_text: bool

    def metrics(self) -> dict[str, float]:
        """Of the weights after a step that is logged."""

    def save(self, directory: Path, step: int, base: DiffusionBase) -> None:
        """config.json and the weights; `base` holds what is to be saved. The main process alone calls it."""

    def sample(self, base: DiffusionBase, texts: tuple[str, ...]) -> dict[str, Image.Image]:
        """Grids by name. The main process alone calls it."""


class TuneTask:
    """`base` holds the weights that are trained: those of `method` require gradients."""

    validation_metric = "loss"

    def __init__(
        self,
        options: TuneOptions,
        world: World,
        plan: BatchPlan,
        data: TuneData,
        base: DiffusionBase,
        method: Method,
        ema_decay: float = 0.0,
        prior: Prior | None = None,
        cache: Any = None,
    ) -> None:
        self.options, self.world, self.plan, self.data = options, world, plan, data
        self.base, self.method, self.prior, self.cache = base, method, prior, cache
        self.schedule = NoiseSchedule.from_scheduler(base.scheduler)
        self.denoiser = Denoiser(base.unet, base.text_encoder if method.trains_text else None)
        if options.gradient_checkpointing:
            base.unet.enable_gradient_checkpointing()
        self.trained = {n: p for n, p in self.denoiser.named_parameters() if p.requires_grad}
        how = (world, plan, ema_decay, options.engine, options.deepspeed)
        self.training = TrainingState(self.denoiser, options.optim, *how)
        self.engine, self.ema = self.training.engine, self.training.ema
        fp16 = options.precision == "fp16"
        self.scale = LossScale(list(self.trained.values())) if fp16 else None
        self.sample_texts = options.sample_texts or data.first_texts(4)
        self.num_truncated = 0

    # ------------------------------------------------------------------------------------------------------- a step

    def train_step(self, batch: dict[str, Any], step: int) -> dict[str, float]:
        options, salt = self.options, (self.options.loop.seed, step)
        lr = learning_rate(options.optim, step, options.loop.num_steps)
        self.engine.set_lr(lr)
        self._train_mode()
        keys = sample_keys(batch)
        sizes = (options.precision, self.plan.micro_batch_size)
        micro_batches: dict[str, Any] = prepare_step(
            self.base.vae, batch, self.schedule, options.objective, salt, *sizes
        )
        micro_batches["text"] = drop_texts(batch["text"], keys, options.caption_dropout, salt)
        self.num_truncated += count_truncated(self.base.tokenizer, batch["text"], self.base.text_len)
        if self.prior:
            micro_batches |= self.prior.batch(keys, salt, self.schedule, options.objective)
        totals: dict[str, float] = {}
        for micro in self.engine.micro_batches(micro_batches, self.plan.accumulation):
            with autocast_for(self.world.device, options.precision):
                losses = self._losses(micro)
            total = sum(losses.values())
            self.engine.backward(total * self.scale.value if self.scale else total)
            for name, value in (losses | {"loss": total}).items():
                totals[name] = totals.get(name, 0.0) + float(value.detach()) / self.plan.accumulation
        totals |= self._step_weights()
        self.training.update_average()
        logged = (step + 1) % options.loop.log_every == 0 or step == 0
        return totals | {"lr": lr} | (self.method.metrics() if logged else {})

    def _losses(self, micro: dict[str, Any]) -> dict[str, Tensor]:
        text = text_inputs(self.base, micro["text"], self.method.trains_text)
        gamma = self.options.objective.min_snr_gamma
        losses = {"loss": step_loss(self.engine.model, micro, text, self.schedule, gamma)}
        if self.prior:
            losses["prior_loss"] = self.prior.loss(self.engine.model, micro, self.base, self.schedule, gamma)
        return losses

    def _step_weights(self) -> dict[str, float]:
        """A step of fp16 whose gradients overflow changes nothing and is counted."""
        if not self.scale:
            return {"grad_norm": self.engine.step()}
        self.scale.unscale_()
        norm = self.engine.step()
        taken = self.scale.update(norm)
        return {
            "grad_norm": norm if taken else 0.0,
            "skipped": float(not taken),
            "loss_scale": self.scale.value,
        }

    def _train_mode(self) -> None:
        self.denoiser.train()

    # --------------------------------------------------------------------------------------------------- evaluation

    @contextlib.contextmanager
    def saved_weights(self) -> Iterator[None]:
        """The base with the weights that are saved: the moving average where there is one."""
        self.denoiser.eval()
        if not self.ema:
            yield
            return
        state = self.denoiser.state_dict()
        before = {name: tensor.clone() for name, tensor in state.items()}
        _copy_(state, self.ema.shadow)
        try:
            yield
        finally:
            _copy_(state, before)

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """The loss over validation images at fixed noise and timesteps, dealt over processes, and now and then the
        distance of generated images."""
        sums = torch.zeros(2, dtype=torch.float64)
        with self.saved_weights():
            batches = self.data.val_batches(self.plan.micro_batch_size, self.options.val_samples)
            for number, batch in enumerate(batches):
                if number % self.world.size == self.world.rank:
                    sums += torch.tensor([self._val_loss(batch), len(batch["key"])], dtype=torch.float64)
            sums = self.world.sum_(sums.to(self.world.device)).cpu()
            metrics = {"loss": float(sums[0] / sums[1])}
            metrics |= self._distance(step)
        self._train_mode()
        return metrics

    def _val_loss(self, batch: dict[str, Any]) -> float:
        """The sum over samples; each is the mean of four timesteps, one in each quarter of the schedule."""
        keys, total, quarters = [f"{key}/val" for key in batch["key"]], 0.0, 4
        salt = (self.options.loop.seed, 0)
        latents = latents_of(self.base.vae, batch, keys, salt, self.options.precision)
        text = text_inputs(self.base, batch["text"], self.method.trains_text)
        steps = self.schedule.num_timesteps // quarters
        for quarter in range(quarters):
            noise, timesteps = sample_noise(keys, tuple(latents.shape[1:]), steps, (salt[0], quarter))
            noise, timesteps = noise.to(latents.device), (timesteps + quarter * steps).to(latents.device)
            with autocast_for(self.world.device, self.options.precision):
                noisy = self.schedule.add_noise(latents, noise, timesteps)
                prediction = self.engine.model(noisy, timesteps, text)
            target = self.schedule.target(latents, noise, timesteps)
            total += float(diffusion_loss(prediction, target)) * len(keys) / quarters
        return total

    def _distance(self, step: int) -> dict[str, float]:
        every = self.options.distance_every
        if not every or step % every:
            return {}
        value = image_distance(self.base, self.data, self.options, self.world)
        return {"kid": value}

    def sample(self, step: int) -> dict[str, Image.Image]:
        if not self.world.is_main:
            return {}
        with self.saved_weights():
            grids = self.method.sample(self.base, self.sample_texts)
        self._train_mode()
        return grids

    # -------------------------------------------------------------------------------------------------- checkpoints

    def state(self) -> dict[str, Any]:
        """The trained weights alone: the frozen ones come from the base again."""
        if self.num_truncated and self.world.is_main:
            say(
                f"note: {self.num_truncated} captions were longer than {self.base.text_len} tokens and were cut"
            )
            self.num_truncated = 0
        state = self.training.state() | {"data": self.data.train.fingerprint}
        state["weights"] = {n: t for n, t in state["weights"].items() if n in self.trained}
        if self.scale:
            state["scale"] = self.scale.state()
        return state

    def save(self, directory: Path, step: int, state: dict[str, Any]) -> None:
        with self.saved_weights():
            self.method.save(directory, step, self.base)
        self._train_mode()

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the run was started with other options."""
        run_dir = self.options.loop.run_dir
        shapes = {n: tuple(p.shape) for n, p in self.trained.items()}
        before = {n: tuple(t.shape) for n, t in state["weights"].items()}
        if shapes != before:
            changed = min(n for n in shapes.keys() | before.keys() if shapes.get(n) != before.get(n))
            raise ValueError(
                f"{run_dir} trains other weights ({changed} is {before.get(changed)}, not {shapes.get(changed)}): "
                "choose another --loop.run-dir, or the options that it was started with"
            )
        if state["data"] != self.data.train.fingerprint and self.world.is_main:
            say("note: the training images are others than before: the run goes on in a new order")
        full = {n: t for n, t in self.denoiser.state_dict().items() if n not in self.trained}
        self.training.load_state(state | {"weights": full | state["weights"]}, run_dir)
        if self.scale and "scale" in state:
            self.scale.load_state(state["scale"])


@torch.no_grad()
def _copy_(state: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, tensor in state.items():
        tensor.copy_(values[name])
