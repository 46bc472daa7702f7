"""The step of fine-tuning: the loss of diffusers' example scripts, train_text_to_image.py and its LoRA sibling.

Latents are sampled from the autoencoder's posterior and scaled, noise and a uniform timestep are added, and the UNet's
prediction is compared with noise or velocity, weighted by min-SNR if asked for. Noise and timestep of a sample depend
on (seed, step, sample) alone, so any split of the global batch gives the same step.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.precision import autocast, has_native_bf16
from data_tools.shards.captions import hides_caption
from diffusion.objective import (
    NoiseSchedule,
    ObjectiveConfig,
    diffusion_loss,
    sample_generator,
    sample_noise,
)
from diffusion.scratch.latents import encode_moments, sample_posterior
from diffusion.text import encode_texts, text_conditions
from diffusion.tuning.options import TunePrecision


def autocast_for(device: torch.device, precision: TunePrecision) -> contextlib.AbstractContextManager:
    """As common.precision, and fp16."""
    if precision == "fp16":
        return torch.autocast(device.type, torch.float16)
    return autocast(device, precision)


def computed_in(precision: TunePrecision, device: torch.device) -> TunePrecision:
    """What `autocast_for` comes to on `device`: a CPU without bf16 computes these networks in float32."""
    if precision == "auto" or (precision == "bf16" and device.type == "cpu"):
        return "bf16" if has_native_bf16(device) else "fp32"
    return precision


def sample_keys(batch: dict[str, Any]) -> list[str]:
    """Names of the samples' visits: what noise, timestep and caption dropout depend on."""
    salts = batch["salt"] if "salt" in batch else [0] * len(batch["key"])
    return [f"{key}/{int(salt)}" for key, salt in zip(batch["key"], salts, strict=True)]


def latents_of(
    vae: nn.Module,
    batch: dict[str, Any],
    keys: Sequence[str],
    salt: tuple[int, int],
    precision: TunePrecision = "fp32",
    at_once: int | None = None,
) -> Tensor:
    """(B, C, h, w) float32 on the autoencoder's device: sampled, scaled; from images or from cached moments.

    at_once: images of one pass through the autoencoder, which needs more memory an image than the UNet.
    """
    device = next(vae.parameters()).device
    if "moments" in batch:
        moments = batch["moments"].to(device)
    else:  # fp16 overflows in the autoencoder of Stable Diffusion 1.x
        computed = "fp32" if precision == "fp16" else precision
        parts = batch["image"].split(at_once or len(batch["image"]))
        moments = torch.cat([encode_moments(vae, part, computed) for part in parts])
    shape = (moments.shape[1] // 2, *moments.shape[2:])
    generators = (sample_generator(f"{salt[0]}/{salt[1]}/{key}/latent") for key in keys)
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
    return sample_posterior(moments, noise.to(device))


def drop_texts(texts: Sequence[str], keys: Sequence[str], share: float, salt: tuple[int, int]) -> list[str]:
    """Captions with a share of them hidden, by (seed, step, sample)."""
    hidden = [hides_caption(key, share, salt) for key in keys]
    return ["" if hide else text for text, hide in zip(texts, hidden, strict=True)]


def prepare_step(
    vae: nn.Module,
    batch: dict[str, Any],
    schedule: NoiseSchedule,
    objective: ObjectiveConfig,
    salt: tuple[int, int],
    precision: TunePrecision = "fp32",
    at_once: int | None = None,
) -> dict[str, Tensor]:
    """latents and noise (B, C, h, w) float32, timesteps (B,) long, of this process's batch, on the device."""
    keys = sample_keys(batch)
    latents = latents_of(vae, batch, keys, salt, precision, at_once)
    shape = tuple(latents.shape[1:])
    noise, timesteps = sample_noise(keys, shape, schedule.num_timesteps, salt, objective.noise_offset)
    device = latents.device
    return {"latents": latents, "noise": noise.to(device), "timesteps": timesteps.to(device)}


def text_inputs(base: Any, texts: Sequence[str], as_ids: bool) -> Tensor:
    """ids (B, T) for a text encoder that is trained, else hidden states (B, T, D)."""
    if as_ids:
        return encode_texts(base.tokenizer, texts, base.text_len).to(base.text_encoder.device)
    return text_conditions(base.text_encoder, base.tokenizer, texts, base.text_len).float()


def step_loss(
    model: nn.Module, step: dict[str, Tensor], text: Tensor, schedule: NoiseSchedule, gamma: float
) -> Tensor:
    """The loss of one micro-batch, scalar float32: `model` is a Denoiser, perhaps wrapped by an engine."""
    latents, noise, timesteps = step["latents"], step["noise"], step["timesteps"]
    noisy = schedule.add_noise(latents, noise, timesteps)
    prediction = model(noisy, timesteps, text)
    target = schedule.target(latents, noise, timesteps)
    return diffusion_loss(prediction, target, schedule.weights(timesteps, gamma))
