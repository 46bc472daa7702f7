"""What encodes images and decodes them again: our image tokenizers, and autoencoders in the layout of diffusers."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import checkpoint
from common.files import read_json, sha256_file
from common.precision import Precision, autocast
from kernels import accelerate
from vq.encoding import ImageEncoder
from vq.model import ImageTokenizer

KL_CLASS = "AutoencoderKL"


@dataclass(frozen=True)
class Codec:
    """An image tokenizer or autoencoder behind one call."""

    name: str
    identity: str
    """sha256 of the weights."""
    image_size: int
    """Side in pixels that it was trained on; 0 where it does not say."""
    downsample_factor: int
    """Sides must be multiples of it."""
    reconstruct: Callable[[Tensor], Tensor]
    """(B, 3, S, S) in [-1, 1] -> the same shape, float32 in [-1, 1]."""
    code: Callable[[int], str]
    """Side in pixels -> what an image is encoded to, in words."""


def open_codec(name: str, device: torch.device, precision: Precision = "auto") -> Codec:
    """An image tokenizer, a generator that holds one, or a folder of diffusers' AutoencoderKL (or of a pipeline).

    Raises FileNotFoundError or ValueError in one sentence.
    """
    path = Path(name)
    for folder in (path, path / "vae"):
        config = folder / "config.json"
        if config.is_file() and _class_name(config) == KL_CLASS:
            return _autoencoder_kl(folder, device, precision)
    directory = checkpoint.resolve(name)
    inside = directory / "image_tokenizer"
    return _tokenizer(inside if (inside / "config.json").is_file() else directory, device, precision)


def _class_name(config: Path) -> str:
    values = read_json(config)
    return str(values.get("_class_name", "")) if isinstance(values, dict) else ""


def _tokenizer(directory: Path, device: torch.device, precision: Precision) -> Codec:
    tokenizer = ImageTokenizer.from_pretrained(directory, device)
    accelerate(tokenizer, in_bf16=precision != "fp32")
    encoder = ImageEncoder(tokenizer, device, precision)
    factor = tokenizer.downsample_factor

    @torch.no_grad()
    def reconstruct(images: Tensor) -> Tensor:
        grid = (images.shape[-2] // factor, images.shape[-1] // factor)
        ids = encoder(images)  # (B, N)
        with autocast(device, precision):
            return tokenizer.decode_ids(ids, grid).float().clamp(-1, 1)

    def code(side: int) -> str:
        tokens = encoder(torch.zeros(1, 3, side, side, device=device)).shape[1]
        return f"{tokens} tokens of a codebook of {tokenizer.codebook_size}"

    return Codec(str(directory), tokenizer.sha256, tokenizer.image_size, factor, reconstruct, code)


def _autoencoder_kl(folder: Path, device: torch.device, precision: Precision) -> Codec:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ValueError(f"{folder} is an autoencoder of diffusers: pip install diffusers") from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no .safetensors file")
    model: Any = AutoencoderKL.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    model = model.to(device=device, memory_format=torch.channels_last).eval()
    factor = 2 ** (len(model.config.block_out_channels) - 1)

    @torch.no_grad()
    def reconstruct(images: Tensor) -> Tensor:
        with autocast(device, precision):
            latents = model.encode(images.to(device)).latent_dist.mode()  # (B, C, h, w)
            return model.decode(latents).sample.float().clamp(-1, 1)

    def code(side: int) -> str:
        return f"{model.config.latent_channels} x {side // factor} x {side // factor} numbers"

    size = int(model.config.sample_size or 0)
    return Codec(str(folder), sha256_file(files[0]), size, factor, reconstruct, code)
