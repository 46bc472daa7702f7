"""Augmentation of what the discriminator sees, real and generated alike, through which gradients pass.

The operations are those of DiffAugment (Zhao et al. 2020, arXiv:2006.10738: colour, translation, cutout) and a change
of scale; each is applied to a sample with probability p. With `ada` p follows the discriminator (Karras et al. 2020,
arXiv:2006.06676, section 3.1): r = E[sign of its logits of real images] is held at a target; more of it is
overfitting and raises p. Hue is never touched: the colour of goods is what captions speak of.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_UNIFORM = 13  # random numbers of a sample


@dataclass(frozen=True)
class AugmentConfig:
    """What the discriminator is shown."""

    mode: Literal["off", "fixed", "ada"] = "ada"
    """off: images as they are; fixed: always with probability p; ada: p follows the discriminator, from p on."""
    p: float = 0.0
    """Probability of each operation; of ada the first one."""
    target: float = 0.6
    """ada: mean sign of the logits of real images that is held."""
    every: int = 4
    """ada: steps between changes of p."""
    images_per_unit: int = 100_000
    """ada: real images after which p has moved by 1 when it always moves the same way."""
    max_p: float = 0.8
    """ada: p stays below; above 0.8 the generator would learn the augmentation itself."""

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1 or not 0 < self.max_p <= 1:
            raise ValueError(f"d_augment: p and max_p must lie in [0, 1], not {self.p} and {self.max_p}")
        if not -1 < self.target < 1 or self.every < 1 or self.images_per_unit < 1:
            raise ValueError("d_augment: target must lie in (-1, 1), every and images_per_unit be at least 1")
        if self.mode == "off" and self.p:
            raise ValueError(f"d_augment.p {self.p} has no effect with mode off: use mode fixed or ada")
        if self.mode == "fixed" and not self.p:
            raise ValueError("d_augment.mode fixed needs a p above 0")


class Strength:
    """p, and how ada moves it."""

    def __init__(self, config: AugmentConfig, batch_size: int) -> None:
        self.config = config
        self.p = config.p
        self.change = batch_size * config.every / config.images_per_unit
        self.signs: list[float] = []

    def follow(self, mean_sign: float) -> None:
        """`mean_sign`: of the logits of this step's real images, over all processes."""
        if self.config.mode != "ada":
            return
        self.signs.append(mean_sign)
        if len(self.signs) == self.config.every:
            found = sum(self.signs) / len(self.signs)
            step = self.change if found > self.config.target else -self.change
            self.p = min(self.config.max_p, max(0.0, self.p + step))
            self.signs = []

    def state(self) -> dict[str, Any]:
        return {"p": self.p, "signs": self.signs}

    def load_state(self, state: dict[str, Any]) -> None:
        if self.config.mode == "ada":  # fixed and off take the options' p, whatever the run had before
            self.p, self.signs = float(state["p"]), list(state["signs"])


def uniform(batch_size: int, generator: torch.Generator) -> Tensor:
    """(B, NUM_UNIFORM) in [0, 1): what `augment` needs."""
    return torch.rand(batch_size, NUM_UNIFORM, generator=generator)


def augment(images: Tensor, u: Tensor, p: float) -> Tensor:
    """images (B, 3, S, S) in [-1, 1], u (B, NUM_UNIFORM) -> the same shape; what comes into view continues the edge."""
    if p == 0:
        return images
    u = u.to(images.device)
    gates = (u[:, :6] < p).to(images.dtype)  # (B, 6)
    images = _color(images, gates[:, :3], u[:, 6:9] - 0.5)
    images = _move(images, gates[:, 3:5], u[:, 9:12])
    return _cutout(images, gates[:, 5], u[:, 11:13])


def _color(images: Tensor, gates: Tensor, amounts: Tensor) -> Tensor:
    """Brightness +-0.25, saturation and contrast 0.5 ... 1.5; `amounts` (B, 3) in [-0.5, 0.5)."""
    brightness, saturation, contrast = (
        (g * a).view(-1, 1, 1, 1) for g, a in zip(gates.T, amounts.T, strict=True)
    )
    images = images + 0.5 * brightness
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * (1 + saturation)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (1 + contrast)


def _move(images: Tensor, gates: Tensor, amounts: Tensor) -> Tensor:
    """Translation by up to an eighth of the side each way, scale 0.8 ... 1.25; `amounts` (B, 3) in [0, 1)."""
    shift = gates[:, :1] * (amounts[:, :2] - 0.5) * 0.5  # in half sides
    scale = 1.25 ** (gates[:, 1] * (2 * amounts[:, 2] - 1))
    theta = torch.zeros(len(images), 2, 3, dtype=images.dtype, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _cutout(images: Tensor, gate: Tensor, centre: Tensor) -> Tensor:
    """A grey square of a third of the side; `centre` (B, 2) in [0, 1) of the side."""
    side = images.shape[-1]
    positions = (torch.arange(side, device=images.device, dtype=images.dtype) + 0.5) / side
    near = (positions[None, None] - centre[:, :, None]).abs() < 1 / 6  # (B, 2, S)
    hole = near[:, 0, :, None] & near[:, 1, None, :]
    return images * (1 - gate.view(-1, 1, 1) * hole)[:, None]
