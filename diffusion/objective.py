"""The training objective of denoising diffusion: what is added, what is predicted, how each timestep counts.

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise                   a_t: cumulative product of 1 - beta
    epsilon       target = noise                                (Ho et al. 2020, arXiv:2006.11239, algorithm 1)
    v_prediction  target = sqrt(a_t) noise - sqrt(1 - a_t) x_0  (Salimans and Ho 2022, arXiv:2202.00512, appendix D)
    SNR_t = a_t / (1 - a_t)
    min-SNR weights: min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v
                                                                (Hang et al. 2023, arXiv:2303.09556, section 3.4)
    noise offset o: noise + o * (one normal number an image and channel)

Noise and timestep of a sample depend on (seed, step, key) alone, so a step is the same on any number of processes and
micro-batches. All of it is float32.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class ObjectiveConfig:
    """How noise is sampled and how timesteps are weighted."""

    min_snr_gamma: float = 5.0
    """Weights of min-SNR with this gamma; 0: every timestep counts alike."""
    noise_offset: float = 0.0
    """Standard deviation of an extra number of noise an image and channel, which teaches very dark and very bright
    images; 0: none."""

    def __post_init__(self) -> None:
        for name in ("min_snr_gamma", "noise_offset"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")


@dataclass(frozen=True)
class NoiseSchedule:
    """Cumulative signal shares of the K timesteps, and what the network predicts."""

    alphas_cumprod: Tensor
    """(K,) float32, falling."""
    prediction: Prediction

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "NoiseSchedule":
        """Of any scheduler of diffusers, by its betas and prediction type.

        Solvers bend the last timestep for their own arithmetic, so DDPM's reading of the same config is taken.
        Raises ValueError for another prediction type, and for epsilon where the last timestep is pure noise.
        """
        from diffusers import DDPMScheduler

        config = DDPMScheduler.from_config(scheduler.config)
        prediction = config.config.prediction_type
        if prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"the prediction type {prediction!r} is not supported: epsilon or v_prediction")
        if prediction == "epsilon" and float(config.alphas_cumprod[-1]) == 0:
            raise ValueError("a schedule of zero terminal SNR cannot predict epsilon: use v_prediction")
        return cls(config.alphas_cumprod.float(), prediction)

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def shares(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) long -> sqrt(a_t) and sqrt(1 - a_t), both (B, 1, 1, 1)."""
        alphas = self.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
        return alphas.sqrt(), (1.0 - alphas).sqrt()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(B, C, h, w) float32 twice and (B,) long -> x_t (B, C, h, w)."""
        signal, sigma = self.shares(timesteps)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network is to predict, (B, C, h, w)."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "v_prediction":
            signal, sigma = self.shares(timesteps)
            return signal * noise - sigma * latents
        raise ValueError(f"unknown prediction {self.prediction!r}")

    def snr(self, timesteps: Tensor) -> Tensor:
        """(B,) long -> signal-to-noise ratios (B,)."""
        alphas = self.alphas_cumprod.to(timesteps.device)[timesteps]
        return alphas / (1.0 - alphas)

    def weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """(B,) long -> min-SNR weights (B,); gamma 0: ones."""
        if gamma == 0:
            return torch.ones(len(timesteps), device=timesteps.device)
        snr = self.snr(timesteps)
        return snr.clamp(max=gamma) / (snr if self.prediction == "epsilon" else snr + 1.0)


def sample_noise(
    keys: Sequence[str],
    shape: tuple[int, ...],
    num_timesteps: int,
    salt: tuple[int, int],
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Noise (B, *shape) float32 and timesteps (B,) long, uniform in 0 .. num_timesteps - 1, on the CPU.

    shape: (C, h, w) of one sample. salt: (seed, step).
    """
    noise, timesteps = [], []
    for key in keys:
        generator = sample_generator(f"{salt[0]}/{salt[1]}/{key}")
        timesteps.append(torch.randint(num_timesteps, (), generator=generator))
        sample = torch.randn(shape, generator=generator)
        if offset:
            sample = sample + offset * torch.randn((shape[0], 1, 1), generator=generator)
        noise.append(sample)
    return torch.stack(noise), torch.stack(timesteps)


def sample_generator(name: str) -> torch.Generator:
    """A generator on the CPU seeded by a name."""
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def diffusion_loss(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over samples of weight times mean squared error, float32; (B, C, h, w) twice and (B,) -> scalar."""
    errors = (prediction.float() - target.float()).square().flatten(1).mean(1)
    return errors.mean() if weights is None else (errors * weights).mean()
