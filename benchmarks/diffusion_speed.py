"""UNet training against its own convolutions and products, and 20-step sampling of 8 images.

    python -m benchmarks.diffusion_speed --recipe configs/diffusion/base_128.yaml

Training: the time of a whole forward and backward, and of the convolutions and matrix products in it alone (profiled,
their self time), whose share of the whole is the bound that everything else pays for. Sampling: 20 DPM-Solver++ steps
with guidance and decoding, weights random, which costs the same. Run it on an idle machine.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from common.config import command, from_mapping, parse_options, read_mapping
from common.log import say
from common.precision import autocast
from diffusion.base import DiffusionBase
from diffusion.objective import NoiseSchedule, diffusion_loss
from diffusion.pipeline import DiffusionToImage, Identity
from diffusion.scratch.options import Options as BaseOptions
from diffusion.scratch.unet_task import Denoiser, make_base_scheduler

HEAVY = ("convolution", "mkldnn", "addmm", "::mm", "bmm", "linear", "attention")


@dataclass(frozen=True)
class Options:
    """Speed of a base's UNet."""

    recipe: Path = Path("configs/diffusion/base_128.yaml")
    """Recipe of the base."""
    batch_size: int = 32
    """Samples of a training step."""
    repeats: int = 5
    """Times that each measurement is taken; the best counts."""
    num_images: int = 8
    """Images that are sampled."""


def best_seconds(run: Callable[[], object], repeats: int) -> float:
    run()
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return min(found)


def training(options: Options, base: DiffusionBase, recipe: BaseOptions) -> None:
    """Prints images a second and the share of convolutions and products."""
    model = Denoiser(base.unet, base.text_encoder).to(memory_format=torch.channels_last)
    model.requires_grad_(True).train()
    schedule, size = NoiseSchedule.from_scheduler(base.scheduler), recipe.autoencoder.latent_size
    shape = (options.batch_size, base.latent_channels, size, size)
    noisy = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    timesteps = torch.randint(schedule.num_timesteps, (options.batch_size,))
    ids = torch.randint(len(base.tokenizer), (options.batch_size, base.text_len))

    def step() -> None:
        with autocast(torch.device("cpu"), recipe.precision):
            prediction = model(noisy, timesteps, ids)
        diffusion_loss(prediction, noisy, schedule.weights(timesteps, 5.0)).backward()
        model.zero_grad(set_to_none=True)

    seconds = best_seconds(step, options.repeats)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    events = profiled.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    heavy = sum(e.self_cpu_time_total for e in events if any(name in e.key for name in HEAVY))
    say(
        f"training: {options.batch_size / seconds:.1f} images/s, {heavy / total:.0%} in convolutions and products"
    )
    for event in sorted(events, key=lambda e: -e.self_cpu_time_total)[:10]:
        say(f"  {event.key}: {event.self_cpu_time_total / total:.1%} of the time, {event.count} calls")


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, argv, description=__doc__)
    recipe = from_mapping(BaseOptions, read_mapping(options.recipe), where=str(options.recipe))
    torch.manual_seed(0)
    tokenizer = recipe.text.load_tokenizer()
    unet = recipe.unet.build(recipe.autoencoder, recipe.text.dim)
    text_encoder = recipe.text.build(tokenizer)
    scheduler = make_base_scheduler(recipe.prediction, recipe.zero_snr)
    vae = recipe.autoencoder.build().eval()
    base = DiffusionBase(
        vae, text_encoder, tokenizer, unet, scheduler, recipe.text.text_len, "", options.recipe
    )
    training(options, base, recipe)
    for part in (vae, unet, text_encoder):
        part.requires_grad_(False).eval()
    pipeline = DiffusionToImage(base, Identity("random"), "cpu", recipe.precision)
    seconds = best_seconds(lambda: pipeline("一件红色的T恤", options.num_images), options.repeats)
    say(
        f"sampling: {options.num_images} images of {base.image_size} px in {seconds:.2f} s, 20 steps with guidance"
    )


if __name__ == "__main__":
    main()
