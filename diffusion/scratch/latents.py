"""Stage B: images -> latents, encoded once into shards that belong to one autoencoder.

A sample keeps the moments of the posterior (mean and log variance), so that training still samples latents. A sha256
of the autoencoder's weights stands in latents.json: latents of another autoencoder are refused.
"""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.distributed import World
from common.files import ensure_writable_directory, read_json, write_json
from common.precision import Precision, autocast
from data_tools.shards.captions import ANY_LINE, CaptionChoice
from data_tools.shards.encode import Views, encode_shards
from data_tools.shards.index import ShardIndex, ShardSource
from data_tools.shards.loader import Batch, CorruptSample

LATENTS_FILE, MEMBER = "latents.json", "latent.npy"


def autoencoder_sha256(vae: nn.Module) -> str:
    """Identity of an autoencoder: of its weights under their names, and of the factor that scales its latents."""
    digest = hashlib.sha256(f"{vae.config.scaling_factor}".encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def encode_moments(vae: nn.Module, images: Tensor, precision: Precision = "auto") -> Tensor:
    """(n, 3, S, S) in [-1, 1] -> (n, 2C, h, w) float32: mean, then log variance, of the scaled latents."""
    device = next(vae.parameters()).device
    with autocast(device, precision):
        posterior = vae.encode(images.to(device, memory_format=torch.channels_last)).latent_dist
    scale = vae.config.scaling_factor
    mean, logvar = posterior.mean.float() * scale, posterior.logvar.float() + 2.0 * float(np.log(scale))
    return torch.cat([mean, logvar], dim=1)


def sample_posterior(moments: Tensor, noise: Tensor) -> Tensor:
    """(B, 2C, h, w) and (B, C, h, w) normal noise -> latents (B, C, h, w)."""
    mean, logvar = moments.chunk(2, dim=1)
    return mean + torch.exp(0.5 * logvar) * noise


@torch.no_grad()
def fold_statistics_(vae: nn.Module, mean: Tensor, std: Tensor) -> None:
    """Change quant_conv and post_quant_conv so that latents with that mean and deviation a channel (C,) come out with
    0 and 1, and decode to the same images.

    StableDiffusionPipeline knows one scaling factor alone, while the channels of a young autoencoder differ.
    """
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= std.view(-1, 1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2.0 * std.log()
    post.bias += post.weight.flatten(1) @ mean
    post.weight *= std.view(1, -1, 1, 1)


def channel_statistics(moments: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 2C, h, w) -> mean (C,) and standard deviation (C,) of latents that are sampled from the posterior."""
    mean, logvar = (part.transpose(0, 1).flatten(1) for part in moments.chunk(2, dim=1))  # (C, n * h * w)
    variance = mean.var(1) + logvar.exp().mean(1)
    return mean.mean(1), variance.sqrt().clamp(min=1e-4)


def encode_latents(
    vae: nn.Module,
    source: ShardSource,
    target: Path,
    views: Views,
    world: World,
    precision: Precision = "auto",
) -> dict[str, int]:
    """Latent shards of every image shard that is not encoded yet; shards are dealt over processes.

    Returns the counts of data_tools.shards.encode. Raises ValueError for a target of another autoencoder or other
    views.
    """
    ensure_writable_directory(target)
    sha256 = autoencoder_sha256(vae)
    made_by = {"autoencoder_sha256": sha256, "image_size": views.image_size, "views": views.count}
    if (target / LATENTS_FILE).is_file():
        found = require_latents(target, sha256)
        for name in ("image_size", "views"):
            if found.get(name) != made_by[name]:
                raise ValueError(
                    f"{target} holds latents with {name} {found.get(name)}, not {made_by[name]}: choose another folder"
                )
    elif world.is_main:
        write_json(target / LATENTS_FILE, made_by)
    world.barrier()

    def encode(images: Tensor) -> np.ndarray:
        return encode_moments(vae, images, precision).cpu().numpy().astype(np.float16)

    return encode_shards(source, target, views, MEMBER, encode, world)


def require_latents(folder: Path, sha256: str) -> dict[str, Any]:
    """`latents.json` of latent shards. Raises FileNotFoundError without one, ValueError for another autoencoder."""
    path = folder / LATENTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {LATENTS_FILE}: these are no latent shards")
    made_by = read_json(path)
    found = str(made_by.get("autoencoder_sha256")) if isinstance(made_by, dict) else ""
    if found != sha256:
        raise ValueError(
            f"the latents in {folder} were encoded by the autoencoder {found[:12]}, not by {sha256[:12]}: encode the "
            "images again into another folder"
        )
    return made_by


@dataclass(frozen=True)
class DecodeLatents:
    """Latent-shard sample -> moments (2C, h, w) float32, text, key; one of the A views at random, or the first.

    A sample of another shape than `shape` counts as corrupt.
    """

    shape: tuple[int, int, int]
    first_view: bool = False
    captions: CaptionChoice = ANY_LINE

    def __call__(self, index: ShardIndex, i: int, rng: np.random.Generator) -> Batch:
        members = index.read(i, (MEMBER, *self.captions.members))
        views = read_latents(members.get(MEMBER, b""))
        if views.shape[1:] != self.shape:
            raise CorruptSample(f"its latents have shape {views.shape[1:]}, not {self.shape}")
        moments = views[0 if self.first_view else int(rng.integers(len(views)))]
        text = self.captions.pick(members, None if self.first_view else rng)
        tensor = torch.from_numpy(moments.astype(np.float32))
        return {"moments": tensor, "text": text, "key": index.samples[i].key}


def read_latents(data: bytes) -> np.ndarray:
    """(A, 2C, h, w) from the bytes of an .npy file. Raises CorruptSample."""
    try:
        views = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise CorruptSample(f"{MEMBER} is damaged") from error
    if views.ndim != 4 or not len(views) or views.dtype.kind != "f" or not np.isfinite(views).all():
        raise CorruptSample(f"{MEMBER} is {views.dtype} of {views.shape}, not views of finite moments")
    return views
