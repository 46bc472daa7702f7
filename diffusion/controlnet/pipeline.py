"""A base with a ControlNet: text and line drawing in, images out."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from common import checkpoint
from common.distributed import pick_device
from common.files import read_json, sha256_file
from common.image import to_image
from common.precision import autocast
from diffusion.base import DiffusionBase, load_base
from diffusion.controlnet.model import KIND, controlled, find_folder, load_controlnet, to_hint
from diffusion.objective import sample_generator
from diffusion.sampling import SamplingOptions, make_scheduler, sample_latents
from diffusion.text import text_conditions


@dataclass(frozen=True)
class Prompting:
    """What is added to texts."""

    suffix: str = ""
    """Appended to every text."""
    negative: str = ""
    """What the images should not show."""


class ControlPipeline:
    """A base with a ControlNet: text and drawing to images."""

    def __init__(
        self, base: DiffusionBase, controlnet: nn.Module, prompting: Prompting, image_size: int = 0
    ) -> None:
        self.base, self.controlnet, self.prompting = base, controlnet, prompting
        self.image_size = image_size or base.image_size
        self.device = next(base.unet.parameters()).device
        self.sha256 = ""  # of the ControlNet's file

    @classmethod
    def open(
        cls, name: str, base: str = "", base_config: str = "", device: str = "auto"
    ) -> "ControlPipeline":
        """A run or checkpoint of diffusion.train_controlnet, which names its base and its prompts, or any other
        ControlNet beside a base. Raises FileNotFoundError or ValueError."""
        stored, folder = read_checkpoint(name)
        found = base or stored.get("base", "")
        if not found:
            raise ValueError(f"{name} does not say what base it is for: name one with --base")
        whole = load_base(found, pick_device(device), config=base_config)
        controlnet = load_controlnet(name, whole).to(pick_device(device))
        if folder and (folder / "unet").is_dir():
            from diffusers import UNet2DConditionModel

            unet = UNet2DConditionModel.from_pretrained(str(folder / "unet"), local_files_only=True)
            whole = replace(whole, unet=unet.eval().requires_grad_(False).to(pick_device(device)))
        prompting = Prompting(stored.get("prompt_suffix", ""), stored.get("negative", ""))
        pipeline = cls(whole, controlnet, prompting, stored.get("image_size", 0))
        path = (
            Path(name) if Path(name).is_file() else find_folder(name) / "diffusion_pytorch_model.safetensors"
        )
        pipeline.sha256 = sha256_file(path)
        return pipeline

    @torch.no_grad()
    def __call__(
        self,
        text: str,
        lines: np.ndarray,
        num_images: int = 1,
        seed: int = 0,
        options: SamplingOptions = SamplingOptions(),  # noqa: B008 (frozen)
        scale: float = 1.0,
        first: int = 0,
    ) -> list[Image.Image]:
        """Images first .. first + num_images - 1 of the seed; lines: (S, S) uint8, white on black, S = `image_size`.

        scale: how strongly the drawing counts, 0 to 2.
        """
        base, side = self.base, self.image_size // self.base.downsample_factor
        shape = (base.latent_channels, side, side)
        names = [f"{seed}/{i}" for i in range(first, first + num_images)]
        noise = torch.stack([torch.randn(shape, generator=sample_generator(n)) for n in names])
        texts = [text + self.prompting.suffix, self.prompting.negative]
        states = text_conditions(base.text_encoder, base.tokenizer, texts, base.text_len)
        conditions, nulls = states.repeat_interleave(num_images, 0).chunk(2)
        hint = to_hint(torch.from_numpy(lines.copy())[None, None]).to(self.device)

        def denoise(x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
            return controlled(self.controlnet, base.unet, x, t, c, hint.expand(len(x), -1, -1, -1), scale)

        with autocast(self.device):
            scheduler = make_scheduler(options.scheduler, base.scheduler)
            latents = sample_latents(denoise, scheduler, noise.to(self.device), conditions, nulls, options)
            pixels = base.vae.decode(latents / base.vae.config.scaling_factor).sample
        return [to_image(p) for p in pixels.float().cpu()]


def read_checkpoint(name: str) -> tuple[dict[str, Any], Path | None]:
    """What a checkpoint of ours says of itself, and its directory; nothing for other people's ControlNets."""
    path = Path(name)
    if not path.is_dir() or (path / "diffusion_pytorch_model.safetensors").is_file():
        return {}, None
    directory = checkpoint.resolve(path)
    config = read_json(directory / "config.json")
    if not isinstance(config, dict) or config.get("kind") != KIND:
        raise ValueError(f"{directory} is no checkpoint of diffusion.train_controlnet")
    return config["model"], directory
