"""Sample images of a base in training, through the same solver as diffusion.generate, and grids of them."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from common.image import make_grid, to_image
from diffusion.base import DiffusionBase
from diffusion.objective import sample_generator
from diffusion.sampling import SamplingOptions, make_scheduler, sample_latents
from diffusion.text import text_conditions
from diffusion.tuning.options import TuneOptions, TunePrecision
from diffusion.tuning.step import autocast_for


@torch.no_grad()
def sample_pixels(
    base: DiffusionBase,
    texts: Sequence[str],
    names: Sequence[str],
    size: int,
    sampling: SamplingOptions,
    precision: TunePrecision = "auto",
) -> Tensor:
    """(B, 3, size, size) in about [-1, 1] on the CPU, one a text; the noise of each depends on its name alone."""
    side = size // base.downsample_factor
    shape = (base.latent_channels, side, side)
    noise = torch.stack([torch.randn(shape, generator=sample_generator(name)) for name in names])
    device = next(base.unet.parameters()).device
    conditions = text_conditions(
        base.text_encoder, base.tokenizer, [*texts, *[""] * len(texts)], base.text_len
    )
    scheduler = make_scheduler(sampling.scheduler, base.scheduler)
    with autocast_for(device, precision):
        latents = sample_latents(
            lambda x, t, c: base.unet(x, t, c).sample,
            scheduler,
            noise.to(device),
            *conditions.chunk(2),
            sampling,
        )
    with autocast_for(device, "fp32" if precision == "fp16" else precision):
        pixels = base.vae.decode(latents / base.vae.config.scaling_factor).sample
    return pixels.float().cpu()


def sample_images(
    base: DiffusionBase, texts: Sequence[str], columns: int, size: int, options: TuneOptions
) -> list[Image.Image]:
    """`columns` images a text, in rows; image i of a seed has the same noise in every call."""
    sampling = SamplingOptions(num_steps=options.sample_steps, cfg_scale=options.guidance)
    images = []
    for text in texts:
        names = [f"{options.loop.seed}/{i}" for i in range(columns)]
        pixels = sample_pixels(base, [text] * columns, names, size, sampling, options.precision)
        images += [to_image(image) for image in pixels]
    return images


def sample_grid(
    base: DiffusionBase, texts: Sequence[str], size: int, options: TuneOptions, columns: int = 4
) -> Image.Image:
    """A row a text."""
    return make_grid(sample_images(base, texts, columns, size, options), columns)
