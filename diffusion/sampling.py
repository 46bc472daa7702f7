"""From noise to latents: solvers, classifier-free guidance, and images as a start.

    guided = null + cfg_scale * (conditional - null)                       (Ho and Salimans 2022, arXiv:2207.12598)
    rescaled: guided * (std of conditional / std of guided), mixed with guided by cfg_rescale
                                                                           (Lin et al. 2023, arXiv:2305.08891, 3.4)

All solvers are deterministic: an image depends on its own noise alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

SchedulerName = Literal["dpm++", "ddim", "pndm", "euler"]
SCHEDULER_CLASSES = {
    "dpm++": "DPMSolverMultistepScheduler",
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
}


@dataclass(frozen=True)
class SamplingOptions:
    """How images are sampled."""

    num_steps: int = 20
    """Steps of the solver; each is one pass through the UNet, two with guidance."""
    cfg_scale: float = 4.0
    """Guidance: 1 follows the text alone, more leads further away from images without it; 7.5 for Stable Diffusion."""
    cfg_rescale: float = 0.0
    """How much of the contrast that guidance adds is taken back, 0 to 1; about 0.7 for zero terminal SNR."""
    scheduler: SchedulerName = "dpm++"
    """dpm++ (DPM-Solver++, second order), ddim, pndm or euler."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_steps <= 1000:
            raise ValueError(f"num_steps must lie in 1..1000, not {self.num_steps}")
        if self.cfg_scale < 1:
            raise ValueError(f"cfg_scale must be at least 1, not {self.cfg_scale}")
        if not 0 <= self.cfg_rescale <= 1:
            raise ValueError(f"cfg_rescale must lie in [0, 1], not {self.cfg_rescale}")
        if self.cfg_rescale and not self.is_guided:
            raise ValueError("cfg_rescale needs guidance: set cfg_scale above 1")

    @property
    def is_guided(self) -> bool:
        return self.cfg_scale > 1


def make_scheduler(name: SchedulerName, base_scheduler: Any) -> Any:
    """A solver of diffusers with the betas, prediction type and spacing of the base's scheduler.

    Raises ValueError for pndm on a schedule of zero terminal SNR, which it cannot start from.
    """
    import diffusers

    if name not in SCHEDULER_CLASSES:
        raise ValueError(f"unknown scheduler {name!r}: {', '.join(SCHEDULER_CLASSES)}")
    zero_snr = base_scheduler.config.get("rescale_betas_zero_snr", False)
    if name == "pndm":
        if zero_snr:
            raise ValueError("pndm cannot sample from a base of zero terminal SNR: use dpm++, ddim or euler")
        return diffusers.PNDMScheduler.from_config(base_scheduler.config, skip_prk_steps=True)
    return getattr(diffusers, SCHEDULER_CLASSES[name]).from_config(base_scheduler.config)


Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(noisy latents (n, C, h, w), timestep (), conditions (n, T, D)) -> prediction (n, C, h, w)."""


def sample_latents(
    denoise: Denoise,
    scheduler: Any,
    noise: Tensor,
    conditions: Tensor,
    null_conditions: Tensor,
    options: SamplingOptions,
    start: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Noise (B, C, h, w), conditions and null conditions (B, T, D) -> latents (B, C, h, w), float32.

    start: latents (B, C, h, w) that are noised up to `strength` of the way and denoised from there.
    """
    scheduler.set_timesteps(options.num_steps, device=noise.device)
    timesteps = scheduler.timesteps
    if start is None:
        latents = noise * scheduler.init_noise_sigma
    else:
        first = max(0, len(timesteps) - max(1, round(len(timesteps) * strength)))
        timesteps = timesteps[first:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        latents = scheduler.add_noise(start, noise, timesteps[:1])
    both = torch.cat([null_conditions, conditions]) if options.is_guided else conditions
    for timestep in timesteps:
        inputs = torch.cat([latents, latents]) if options.is_guided else latents
        inputs = scheduler.scale_model_input(inputs, timestep)
        prediction = denoise(inputs, timestep, both).float()
        if options.is_guided:
            prediction = guide(*prediction.chunk(2), options)
        latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
    return latents


def guide(null: Tensor, conditional: Tensor, options: SamplingOptions) -> Tensor:
    """(B, C, h, w) twice -> the guided prediction."""
    guided = null + options.cfg_scale * (conditional - null)
    if not options.cfg_rescale:
        return guided
    axes = tuple(range(1, guided.ndim))
    rescaled = guided * conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    return options.cfg_rescale * rescaled + (1.0 - options.cfg_rescale) * guided
