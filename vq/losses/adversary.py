"""The adversary of stage 1 (VQGAN, Esser et al. 2021, section 3.1): when it trains, when it counts, what it weighs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from common.distributed import World
from common.engine import make_engine
from common.optim import OptimConfig, adamw
from common.precision import Precision, autocast
from vq.losses.discriminator import DiscriminatorConfig, PatchDiscriminator
from vq.losses.reconstruction import (
    AdversarialLoss,
    adaptive_weight,
    discriminator_loss,
    feature_matching_loss,
    generator_loss,
    lecam_loss,
)


@dataclass(frozen=True)
class AdversaryConfig:
    """A discriminator and how it enters the loss; only `--preset vqgan` has one."""

    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    loss: AdversarialLoss = "hinge"
    """hinge or non_saturating."""
    weight: float = 0.5
    """Weight of its term, on top of the adaptive weight; 0.8 in taming."""
    adaptive: bool = True
    """Scale its gradient at the decoder's last layer to that of the reconstruction."""
    adaptive_cap: float = 1.0e4
    """Largest adaptive weight."""
    start_step: int = 0
    """Step from which the discriminator trains."""
    warmup_steps: int = 200
    """Steps the discriminator trains alone before its loss counts."""
    ramp_steps: int = 200
    """Steps over which its loss then rises to full weight."""
    feature_weight: float = 0.0
    """Weight of matching the discriminator's features; 0: none."""
    lecam_weight: float = 0.001
    """Weight of the LeCam term, which keeps a discriminator of few images in bounds; 0: none."""
    lr: float = 2.0e-4
    """Learning rate of the discriminator, times that of the schedule relative to its peak."""
    rollback_share: float = 0.25
    """Go back to the best checkpoint when the validation perceptual error (without one: pixel error) is worse than the
    best by more than this share after the adversary's start; 0: never."""

    def __post_init__(self) -> None:
        for name in ("weight", "lr", "adaptive_cap"):
            if getattr(self, name) <= 0:
                raise ValueError(f"adversary.{name} must be above 0, not {getattr(self, name)}")
        for name in (
            "start_step",
            "warmup_steps",
            "ramp_steps",
            "feature_weight",
            "lecam_weight",
            "rollback_share",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"adversary.{name} must not be negative, not {getattr(self, name)}")

    @property
    def counts_from(self) -> int:
        """Step from which its loss moves the decoder."""
        return self.start_step + self.warmup_steps

    def factor(self, step: int) -> float:
        """0 before its loss counts, then a ramp to 1."""
        if step < self.counts_from:
            return 0.0
        return min(1.0, (step - self.counts_from + 1) / (self.ramp_steps + 1))


class Adversary:
    """The discriminator with its optimizer."""

    def __init__(self, config: AdversaryConfig, world: World, plan: Any, precision: Precision) -> None:
        self.config, self.world, self.plan, self.precision = config, world, plan, precision
        model = PatchDiscriminator(config.discriminator)
        self.model = model.to(world.device, memory_format=torch.channels_last)
        optimizer = adamw(self.model, OptimConfig(lr=config.lr, beta1=0.5, beta2=0.9, weight_decay=0.0))
        self.engine = make_engine(self.model, optimizer, world, plan, grad_clip=1.0, name="plain")
        self.real_average = self.fake_average = 0.0  # of logits, for LeCam
        self.weight_scale = 1.0  # halved at each rollback

    def gradient(
        self,
        reconstruction: Tensor,
        leaf: Tensor,
        images: Tensor,
        rec_gradient: Tensor,
        last_layer: Tensor,
        step: int,
        view: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor | None, dict[str, float]]:
        """What the adversary adds to the gradient by the reconstruction, or None before its loss counts.

        `leaf`: the reconstruction cut off from the decoder; `rec_gradient`: of the other losses by it;
        `view`: what of an image is looked at.
        """
        factor = self.config.factor(step)
        if factor == 0:
            return None, {}
        with autocast(self.world.device, self.precision):
            logits, features = self.model(view(leaf))
        loss = gen_loss = generator_loss(self.config.loss, logits)
        metrics = {"gen_loss": float(gen_loss.detach())}
        if self.config.feature_weight:
            with torch.no_grad(), autocast(self.world.device, self.precision):
                _, targets = self.model(view(images))
            matching = feature_matching_loss(targets, features)
            metrics["feature_loss"] = float(matching.detach())
            loss = loss + self.config.feature_weight * matching
        (gradient,) = torch.autograd.grad(loss, leaf)
        weight = self.config.weight * factor * self.weight_scale
        if self.config.adaptive:
            adaptive = adaptive_weight(
                reconstruction, last_layer, rec_gradient, gradient, self.config.adaptive_cap
            )
            metrics["adaptive_weight"] = float(adaptive)
            weight = weight * metrics["adaptive_weight"]
        return gradient * weight, metrics

    def train_step(
        self, images: Tensor, reconstructions: Tensor, lr_share: float, step: int
    ) -> dict[str, float]:
        """One update on this process's images; nothing before `start_step`. `lr_share`: of the peak rate."""
        if step < self.config.start_step:
            return {}
        self.engine.set_lr(self.config.lr * lr_share)
        sums = {"disc_loss": 0.0, "logits_real": 0.0, "logits_fake": 0.0}
        parts = {"real": images, "fake": reconstructions}
        for micro in self.engine.micro_batches(parts, self.plan.accumulation):
            pair = torch.cat([micro["real"], micro["fake"]]).to(memory_format=torch.channels_last)
            with autocast(self.world.device, self.precision):
                logits, _ = self.engine.model(pair)
            real, fake = logits.float().chunk(2)
            loss = discriminator_loss(self.config.loss, real, fake)
            if self.config.lecam_weight and step > self.config.start_step:
                regulariser = lecam_loss(real, fake, self.real_average, self.fake_average)
                loss = loss + self.config.lecam_weight * regulariser
            self.engine.backward(loss)
            means = {"disc_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
            for name, value in means.items():
                sums[name] += float(value.detach()) / self.plan.accumulation
        self.engine.step()
        self._follow(self.world.mean(sums), first=step == self.config.start_step)
        return sums

    def _follow(self, means: dict[str, float], first: bool) -> None:
        decay = 0.0 if first else 0.99
        self.real_average = decay * self.real_average + (1 - decay) * means["logits_real"]
        self.fake_average = decay * self.fake_average + (1 - decay) * means["logits_fake"]

    def state(self) -> dict[str, Any]:
        return {
            "weights": self.engine.weights(),
            "engine": self.engine.state(),
            "averages": [self.real_average, self.fake_average],
            "weight_scale": self.weight_scale,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.engine.load_state(state["weights"], state["engine"])
        self.real_average, self.fake_average = state["averages"]
        self.weight_scale = float(state["weight_scale"])
