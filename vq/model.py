"""ImageTokenizer: images <-> grids of codes. One config, one checkpoint directory, nothing hard-coded.

Encoder and decoder come by `architecture`, the bottleneck by `quantizer`; image side, grid, sequence length and
vocabulary are derived from the config.
"""

import functools
import hashlib
import math
import tempfile
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from common import checkpoint
from common.config import from_mapping, to_mapping
from common.files import atomic_directory
from vq.autoencoder import Decoder, Encoder, FastConfig, coarse_bands
from vq.published.dvae import DvaeConfig, DvaeDecoder, DvaeEncoder
from vq.published.taming import TamingConfig, TamingDecoder, TamingEncoder
from vq.quantizer import (
    EmaQuantizer,
    FiniteScalarQuantizer,
    GumbelConfig,
    GumbelQuantizer,
    Quantized,
    VectorQuantizer,
)

KIND = "image_tokenizer"


@dataclass(frozen=True)
class TokenizerConfig:
    """The image tokenizer's sizes."""

    image_size: int = 128
    """Side of the training images in pixels; other sides that are multiples of the factor work too."""
    architecture: Literal["fast", "taming", "dvae"] = "fast"
    """Encoder and decoder: fast is ours, taming the published VQGAN, dvae the one of DALLE-pytorch."""
    fast: FastConfig = field(default_factory=FastConfig)
    """Sizes of the fast architecture."""
    taming: TamingConfig = field(default_factory=TamingConfig)
    """Sizes of the taming architecture."""
    dvae: DvaeConfig = field(default_factory=DvaeConfig)
    """Sizes of the dvae architecture."""
    quantizer: Literal["vq", "ema", "gumbel", "fsq"] = "vq"
    """vq: nearest code, learned by gradient; ema: nearest code, learned by running means; gumbel: drawn from logits;
    fsq: rounded channels."""
    codebook_size: int = 1024
    """Number of codes."""
    codebook_dim: int = 8
    """Width of a code (fsq has one channel a level)."""
    code_depth: int = 1
    """vq: codes a position; each further one quantizes what those before leave over."""
    level_dropout: float = 0.0
    """Share of training images that are decoded from fewer of their code_depth codes."""
    commit_weight: float = 0.25
    """vq, ema: weight of the commitment term of the quantizer's loss."""
    l2_normalize: bool = True
    """vq, ema: compare unit vectors, so that usage stays high."""
    ema_decay: float = 0.99
    """ema: decay of the running means of the clusters."""
    gumbel: GumbelConfig = field(default_factory=GumbelConfig)
    """gumbel: temperature and divergence."""
    fsq_levels: tuple[int, ...] = (8, 8, 4, 4)
    """fsq: levels of each channel; their product is codebook_size."""

    def __post_init__(self) -> None:
        if self.codebook_size < 2 or self.codebook_dim < 1:
            raise ValueError(
                f"codebook_size {self.codebook_size} and codebook_dim {self.codebook_dim} are too small"
            )
        if not 0 <= self.level_dropout <= 1 or (self.level_dropout and self.code_depth == 1):
            raise ValueError(
                f"level_dropout must lie in [0, 1] and has no effect with code_depth 1, not {self.level_dropout}"
            )
        if not 1 <= self.code_depth <= 4 or (self.code_depth > 1 and self.quantizer != "vq"):
            raise ValueError(
                f"code_depth must lie in 1..4, and be 1 with a quantizer other than vq, not {self.code_depth} with "
                f"{self.quantizer}"
            )
        factor = self.downsample_factor
        if self.image_size < factor or self.image_size % factor:
            raise ValueError(
                f"image_size must be a multiple of the downsample factor {factor}, not {self.image_size}"
            )
        if not 0 <= self.ema_decay < 1 or self.commit_weight < 0:
            raise ValueError(
                f"ema_decay must lie in [0, 1) and commit_weight not be negative, not {self.ema_decay}"
            )
        self._refuse_idle_options()
        if self.architecture == "dvae" and self.quantizer != "gumbel":
            raise ValueError(f"architecture dvae goes with quantizer gumbel, not {self.quantizer}")
        if self.quantizer == "fsq" and (
            min(self.fsq_levels) < 2 or math.prod(self.fsq_levels) != self.codebook_size
        ):
            levels = "x".join(map(str, self.fsq_levels))
            raise ValueError(
                f"fsq_levels {levels} make {math.prod(self.fsq_levels)} codes, codebook_size says {self.codebook_size}"
            )

    def _refuse_idle_options(self) -> None:
        """Sizes of what is not in use would silently have no effect."""
        idle = [n for n in ("fast", "taming", "dvae") if n != self.architecture]
        idle += ["gumbel"] * (self.quantizer != "gumbel") + ["fsq_levels"] * (self.quantizer != "fsq")
        for name in idle:
            spec = self.__dataclass_fields__[name]
            default = spec.default if spec.default_factory is MISSING else spec.default_factory()
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name} has no effect with architecture {self.architecture} and quantizer {self.quantizer}"
                )

    @property
    def downsample_factor(self) -> int:
        return getattr(self, self.architecture).downsample_factor

    @property
    def grid_size(self) -> int:
        return self.image_size // self.downsample_factor

    @property
    def latent_dim(self) -> int:
        """Width of what the encoder hands to the quantizer."""
        if self.quantizer == "fsq":
            return len(self.fsq_levels)
        if self.quantizer == "gumbel" and self.architecture == "fast":
            return self.fast.channels[-1]
        return self.dvae.hidden_dim if self.architecture == "dvae" else self.codebook_dim

    @property
    def decoder_dim(self) -> int:
        """Width of what the quantizer hands to the decoder."""
        return len(self.fsq_levels) if self.quantizer == "fsq" else self.codebook_dim


def make_autoencoder(config: TokenizerConfig) -> tuple[nn.Module, nn.Module]:
    """Encoder (B, 3, S, S) -> (B, latent_dim, h, w) and decoder (B, decoder_dim, h, w) -> (B, 3, S, S)."""
    if config.architecture == "fast":
        return Encoder(config.fast, config.latent_dim), Decoder(config.fast, config.decoder_dim)
    if config.architecture == "taming":
        return TamingEncoder(config.taming, config.latent_dim), TamingDecoder(
            config.taming, config.decoder_dim
        )
    if config.architecture == "dvae":
        return DvaeEncoder(config.dvae), DvaeDecoder(config.dvae, config.decoder_dim)
    raise ValueError(f"unknown architecture {config.architecture!r}")


def make_quantizer(config: TokenizerConfig) -> nn.Module:
    size, dim = config.codebook_size, config.codebook_dim
    if config.quantizer == "vq":
        return VectorQuantizer(
            size, dim, config.commit_weight, config.l2_normalize, config.code_depth, config.level_dropout
        )
    if config.quantizer == "ema":
        return EmaQuantizer(size, dim, config.commit_weight, config.l2_normalize, config.ema_decay)
    if config.quantizer == "gumbel":
        return GumbelQuantizer(config.latent_dim, size, dim, config.gumbel)
    if config.quantizer == "fsq":
        return FiniteScalarQuantizer(config.fsq_levels)
    raise ValueError(f"unknown quantizer {config.quantizer!r}")


class ImageTokenizer(nn.Module):
    """Encoder, quantizer, decoder."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.sha256 = ""  # of the weights file; set by from_pretrained
        self.encoder, self.decoder = make_autoencoder(config)
        self.quantizer = make_quantizer(config)

    @property
    def codebook_size(self) -> int:
        """Ids lie below this: the entries of the codebook, to the power of `code_depth`."""
        return self.config.codebook_size**self.config.code_depth

    @property
    def hidden_layers(self) -> list[nn.Module]:
        """What lies between the first and the last convolutions: the kernels that Muon trains. Only `fast` has them."""
        return [self.encoder.body, self.decoder.body]

    @functools.cached_property
    def codes_sha256(self) -> str:
        """Identity of the image -> codes map: hex digest of the encoder's and the quantizer's weights.

        Tokenizers that differ in their decoder alone share it, so codes of one are valid for the other: after
        fine-tuning with frozen codes, token shards and generators go on being used. So do a tokenizer and the one that
        `vq.enlarge` makes of it. Read once, for finished weights.
        """
        weights = {n: t for n, t in self.state_dict().items() if not n.startswith("decoder.")}
        if self.config.architecture == "fast":
            first = "encoder.conv_in.weight"
            weights[first] = _without_fine_bands(weights[first], self.config.fast.haar_levels)
        return _weights_sha256(weights)

    @property
    def downsample_factor(self) -> int:
        return self.config.downsample_factor

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def grid_size(self) -> int:
        """Side of the code grid of a training image; N = grid_size ** 2."""
        return self.config.grid_size

    def encode(self, images: Tensor) -> Quantized:
        """(B, 3, H, W) in [-1, 1] -> Quantized with a grid of (H/f, W/f). Raises ValueError for other sides."""
        factor = self.downsample_factor
        if images.shape[-1] % factor or images.shape[-2] % factor:
            raise ValueError(f"image sides must be multiples of {factor}, not {tuple(images.shape[-2:])}")
        return self.quantizer(self.encoder(images))

    def decode(self, latents: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, 3, H, W), unclamped."""
        return self.decoder(latents)

    def forward(self, images: Tensor) -> tuple[Tensor, Quantized]:
        """(B, 3, S, S) in [-1, 1] -> reconstruction of that shape, and the codes."""
        quantized = self.encode(images)
        return self.decode(quantized.latents), quantized

    @torch.no_grad()
    def encode_ids(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, N) long, raster order."""
        return self.encode(images).ids.flatten(1)

    @torch.no_grad()
    def decode_ids(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """(B, N) long, raster order -> (B, 3, H, W) float32 in [-1, 1]; `grid` (h, w) None: the training grid."""
        height, width = grid or (self.grid_size, self.grid_size)
        if ids.shape[-1] != height * width:
            raise ValueError(
                f"{ids.shape[-1]} codes do not fill a grid of {height} x {width}: give the grid's size"
            )
        latents = self.quantizer.lookup(ids.view(-1, height, width))
        return self.decode(latents).float().clamp(-1, 1)

    @classmethod
    def from_pretrained(cls, name: str | Path, device: torch.device | str = "cpu") -> "ImageTokenizer":
        """From a checkpoint directory, a run directory or a hub id; in eval mode."""
        directory = checkpoint.resolve(name)
        config = checkpoint.read_config(directory, KIND)
        model = cls(from_mapping(TokenizerConfig, config["model"], where=f"{directory}/config.json"))
        checkpoint.load_weights(model, directory)
        model.sha256 = config["sha256"]
        return model.to(device=device, memory_format=torch.channels_last).eval()

    def save_pretrained(self, directory: str | Path, step: int = 0) -> None:
        """A checkpoint directory that `from_pretrained` reads; an existing one is replaced by a whole one."""
        with atomic_directory(Path(directory)) as temporary:
            self.write(temporary, step)

    def push_to_hub(self, repo_id: str, private: bool = True) -> str:
        """Upload a checkpoint directory to the Hugging Face hub; returns its address."""
        from huggingface_hub import HfApi

        api = HfApi()
        with tempfile.TemporaryDirectory() as folder:
            self.write(Path(folder), 0)
            api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Image tokenizer")
        return f"https://huggingface.co/{repo_id}"

    def write(self, directory: Path, step: int, weights: dict[str, Tensor] | None = None) -> None:
        """config.json and model.safetensors into an existing directory; `weights` None: the model's own."""
        checkpoint.write_model(directory, KIND, to_mapping(self.config), weights or self.state_dict(), step)


def _without_fine_bands(weight: Tensor, levels: int) -> Tensor:
    """The first convolution on 2x2 means, for as many levels as it reads nothing else; exact: weights are doubled."""
    while levels:
        coarse = coarse_bands(levels)
        fine = torch.ones(weight.shape[1], dtype=torch.bool).index_fill(0, coarse, False)
        if weight[:, fine].any():
            break
        weight, levels = 2 * weight[:, coarse], levels - 1
    return weight


def _weights_sha256(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
