"""Systems of the arena in diffusers' layout: bases with adapters, an autoencoder's prior, any other pipeline."""

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from common.config import from_mapping, to_mapping
from common.distributed import pick_device
from common.files import read_json
from common.image import to_image
from common.outputs.out_directory import Request
from diffusion.base import INDEX, base_sha256, quiet, unsupported_reason
from diffusion.objective import sample_generator
from diffusion.pipeline import DiffusionToImage, Prompting
from diffusion.sampling import SamplingOptions

PRIOR_BATCH = 8  # images of one forward pass of a decoder
OTHER_NAMES = {
    "num_steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
}  # ours, and those of diffusers


def is_diffusion(what: str | Path) -> bool:
    """Whether a folder or a run is in diffusers' layout."""
    return _index(what) is not None


def is_other_pipeline(what: str | Path) -> bool:
    """Whether it is a pipeline of diffusers that cannot serve as a base of ours: SDXL, SD3, transformers ..."""
    index = _index(what)
    return index is not None and bool(unsupported_reason(str(read_json(index).get("_class_name"))))


def is_autoencoder(what: str | Path) -> bool:
    """Whether a folder holds an AutoencoderKL alone."""
    config = Path(what) / "config.json"
    values = read_json(config) if config.is_file() else {}
    return isinstance(values, dict) and values.get("_class_name") == "AutoencoderKL"


def _index(what: str | Path) -> Path | None:
    return next((p for p in (Path(what) / INDEX, Path(what) / "latest" / INDEX) if p.is_file()), None)


class DiffusionSystem:
    """A base, with adapters merged where `lora=FILE:0.8` names some."""

    def __init__(
        self, what: Path, sampling: dict[str, str], name: str, seed: int, batch_size: int, device: str
    ) -> None:
        """Raises FileNotFoundError or ValueError in one sentence."""
        values = dict(sampling)
        loras = tuple(filter(None, values.pop("lora", "").split(",")))
        names = Prompting.__dataclass_fields__
        prompting = {n: values.pop(n) for n in list(values) if n in names}
        where = f"system {name}"
        self.sampling = from_mapping(SamplingOptions, values, where=where)
        self.prompting = from_mapping(Prompting, prompting, where=where)
        self.pipeline = DiffusionToImage.from_pretrained(what, device, loras)
        self.seed, self.batch_size = seed, batch_size
        self.origin: dict[str, Any] = {
            "seed": seed,
            "sampling": to_mapping(self.sampling),
            "prompting": to_mapping(self.prompting),
            "checkpoint": self.pipeline.identity.sha256,
            "loras": self.pipeline.identity.loras,
        }

    def complaint(self, text: str) -> str:
        try:
            self.pipeline.note(text, self.prompting)
        except ValueError as error:
            return str(error)
        return ""

    def generate(self, requests: Sequence[Request]) -> Iterator[Any]:
        return self.pipeline.generate(requests, self.seed, self.sampling, self.prompting, self.batch_size)


@dataclass(frozen=True)
class PriorSample:
    """One image of an autoencoder's prior."""

    image: Image.Image
    text: str
    index: int
    seconds: float
    key: str | None = None


class PriorSystem:
    """The VAE baseline: an AutoencoderKL decodes normal noise (Kingma and Welling 2014, arXiv:1312.6114). It reads no
    text, so what it gets right is what a guess gets right."""

    def __init__(self, what: Path, sampling: dict[str, str], seed: int, device: str) -> None:
        """Raises ValueError for sampling options, of which there are none, and for a folder that cannot be loaded."""
        from diffusers import AutoencoderKL

        if sampling:
            raise ValueError(f"an autoencoder's prior has no option {min(sampling)}")
        self.device, self.seed = pick_device(device), seed
        try:
            with quiet():
                vae = AutoencoderKL.from_pretrained(str(what), local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"the autoencoder in {what} cannot be loaded: {error}") from error
        self.vae = vae.eval().requires_grad_(False).to(self.device, memory_format=torch.channels_last)
        config = vae.config
        side = config.sample_size // 2 ** (len(config.block_out_channels) - 1)
        self.shape = (config.latent_channels, side, side)
        weights = sorted(what.glob("diffusion_pytorch_model*"))
        self.origin = {"seed": seed, "sampling": {}, "checkpoint": base_sha256(weights[0])}

    def complaint(self, text: str) -> str:
        return ""

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> Iterator[PriorSample]:
        for start in range(0, len(requests), PRIOR_BATCH):
            batch, started = requests[start : start + PRIOR_BATCH], time.perf_counter()
            keys = [f"{self.seed}/{request.text}/{request.index}" for request in batch]
            noise = torch.stack([torch.randn(self.shape, generator=sample_generator(key)) for key in keys])
            pixels = self.vae.decode(noise.to(self.device) / self.vae.config.scaling_factor).sample
            images = [to_image(p) for p in pixels.float().cpu()]
            seconds = (time.perf_counter() - started) / len(batch)
            for request, image in zip(batch, images, strict=True):
                yield PriorSample(image, request.text, request.index, seconds)


def load_other_pipeline(what: Path, device: str) -> tuple[Callable[..., list[Image.Image]], str]:
    """Any text-to-image pipeline of diffusers -> pipeline(text, num_images, seed, **sampling), and its identity.

    Raises ValueError in one sentence where it cannot be loaded.
    """
    from diffusers import DiffusionPipeline

    folder, chosen = _index(what).parent, pick_device(device)
    try:
        with quiet():
            pipeline = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True).to(chosen)
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the pipeline in {folder} cannot be loaded by diffusers: {first}") from error
    pipeline.set_progress_bar_config(disable=True)
    known = set(inspect.signature(pipeline.__call__).parameters)
    if not {"prompt", "generator"} <= known:
        raise ValueError(f"the {type(pipeline).__name__} in {folder} makes no images of texts")

    def images(text: str, num_images: int, seed: int = 0, **sampling: Any) -> list[Image.Image]:
        generators = [sample_generator(f"{seed}/{i}") for i in range(num_images)]
        options = {OTHER_NAMES.get(name, name): value for name, value in sampling.items()}
        if unknown := set(options) - known:
            raise ValueError(f"{type(pipeline).__name__} has no option {min(unknown)}")
        return pipeline(prompt=[text] * num_images, generator=generators, **options).images

    return images, base_sha256(folder)
