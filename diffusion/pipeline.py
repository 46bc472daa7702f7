"""DiffusionToImage: a base in, images out. The one way that commands, arena and evaluations sample from a base.

pipeline = DiffusionToImage.from_pretrained("runs/diffusion")
images = pipeline("...", num_images=8, seed=0, cfg_scale=4.0)              # list of PIL images

Image i of a seed has the same bytes in any batch: its noise is its own, texts are encoded and images decoded one at a
time, and the UNet runs in batches in which a row's arithmetic does not depend on the number of rows (`_rows`).
"""

import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from common.distributed import pick_device
from common.files import read_json, sha256_file
from common.image import to_image, to_tensor
from common.outputs.out_directory import Request
from common.precision import Precision, has_native_bf16
from common.square import resize_square
from diffusion.base import KIND, DiffusionBase, base_sha256, load_base
from diffusion.objective import sample_generator
from diffusion.sampling import SamplingOptions, make_scheduler, sample_latents
from diffusion.scratch.latents import encode_moments
from diffusion.text import count_truncated, text_conditions

Punctuation = Literal["ascii", "keep"]
ASCII_OF = str.maketrans(
    {
        "\uff0c": ",",
        "\u3001": ",",
        "\u3002": ".",
        "\uff01": "!",
        "\uff1f": "?",
        "\uff1b": ";",
        "\uff1a": ":",
        "\uff08": "(",
        "\uff09": ")",
        "\u201c": '"',
        "\u201d": '"',
    }
)
GPU_ROWS = 8  # images of a forward pass on a GPU, always: its libraries choose other sums for other shapes


@dataclass(frozen=True)
class Prompting:
    """What is added to texts, and what images start from."""

    negative: str = ""
    """What the images should not show: guidance leads away from it."""
    style: str = ""
    """Words behind every text, after a comma."""
    punctuation: Punctuation = "ascii"
    """ascii: Chinese punctuation becomes its ASCII sibling, as Taiyi needs (its handbook: Chinese punctuation brings
    watermarks); keep: texts stay as they are."""

    def full_text(self, text: str) -> str:
        return self._plain(f"{text}, {self.style}" if self.style else text)

    @property
    def full_negative(self) -> str:
        return self._plain(self.negative)

    def _plain(self, text: str) -> str:
        return text.translate(ASCII_OF) if self.punctuation == "ascii" else text


@dataclass(frozen=True)
class Start:
    """An image that new ones start from (Meng et al. 2022, SDEdit, arXiv:2108.01073)."""

    image: Image.Image
    strength: float = 0.6
    """Share of the steps that change it, above 0 to 1."""

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must lie in (0, 1], not {self.strength}")


@dataclass(frozen=True)
class Sampled:
    """One image and how it came about."""

    image: Image.Image
    text: str
    index: int
    """Image `index` of the seed."""
    seed: int
    seconds: float
    """This image's share of its batch's time."""
    key: str | None = None
    """Name of the text, as the request had it."""


@dataclass
class Identity:
    """What tells the weights from others."""

    sha256: str
    loras: list[dict[str, Any]] = field(default_factory=list)


class DiffusionToImage:
    """A base, ready to sample from."""

    def __init__(
        self, base: DiffusionBase, identity: Identity, device: str = "auto", precision: Precision = "auto"
    ) -> None:
        self.device = pick_device(device)
        native = has_native_bf16(self.device)
        self.dtype = (
            torch.bfloat16 if precision == "bf16" or (precision == "auto" and native) else torch.float32
        )
        self.base, self.identity = base.to(self.device, self.dtype), identity
        for part in (base.unet, base.vae):
            part.to(memory_format=torch.channels_last)
        self._conditions: dict[str, Tensor] = {}

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: str = "auto",
        loras: Sequence[str] = (),
        text_len: int | None = None,
        config: str = "",
        precision: Precision = "auto",
    ) -> "DiffusionToImage":
        """A base as load_base reads it, with adapters `FILE[:weight]` merged into it.

        Raises FileNotFoundError or ValueError saying what is wrong with it.
        """
        base = load_base(name, "cpu", text_len, config)
        identity = Identity(_sha256(base.path))
        if loras:
            from diffusion.lora.adapters import LoraSpec, fuse_

            specs = [LoraSpec.parse(text) for text in loras]
            fuse_(base, specs)
            identity.loras = [
                {"file": s.file.name, "sha256": sha256_file(s.file), "weight": s.weight} for s in specs
            ]
        return cls(base, identity, device, precision)

    @property
    def num_parameters(self) -> int:
        parts = (self.base.vae, self.base.text_encoder, self.base.unet)
        return sum(p.numel() for part in parts for p in part.parameters())

    def __call__(
        self,
        text: str,
        num_images: int = 1,
        seed: int = 0,
        batch_size: int = 8,
        size: int | None = None,
        start: Start | None = None,
        **options: Any,
    ) -> list[Image.Image]:
        """Images 0 .. num_images - 1 of the seed; `options`: fields of SamplingOptions and of Prompting.

        Raises ValueError.
        """
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, not {num_images}")
        kinds = (SamplingOptions, Prompting)
        names = [{f.name for f in dataclasses.fields(kind)} for kind in kinds]
        unknown = set(options) - set.union(*names)
        if unknown:
            raise ValueError(f"unknown sampling option {', '.join(sorted(unknown))}")
        sampling, prompting = (
            kind(**{n: v for n, v in options.items() if n in known})
            for kind, known in zip(kinds, names, strict=True)
        )
        requests = [Request(text, i) for i in range(num_images)]
        found = self.generate(requests, seed, sampling, prompting, batch_size, size, start)
        return [sampled.image for sampled in found]

    def generate(
        self,
        requests: Iterable[Request],
        seed: int,
        sampling: SamplingOptions = SamplingOptions(),  # noqa: B008 (frozen)
        prompting: Prompting = Prompting(),
        batch_size: int = 8,
        size: int | None = None,
        start: Start | None = None,
    ) -> Iterator[Sampled]:
        """One image a request, in order; requests may be endless. Raises ValueError for bad options at once."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, not {seed}")
        if prompting.negative and not sampling.is_guided:
            raise ValueError("a negative prompt works through guidance: set cfg_scale above 1")
        shape = self._latent_shape(size)
        make_scheduler(sampling.scheduler, self.base.scheduler)
        start_latents = self._encode_start(start.image, shape) if start else None
        strength = start.strength if start else 1.0
        stream, rows = iter(requests), self._rows(batch_size)
        groups = iter(lambda: list(itertools.islice(stream, rows)), [])
        return (
            sampled
            for group in groups
            for sampled in self._sample(group, seed, sampling, prompting, shape, start_latents, strength)
        )

    def note(self, text: str, prompting: Prompting = Prompting()) -> str:
        """What happens to a text on its way: "" or a sentence. Raises ValueError for one that cannot be read at all."""
        full, tokenizer = prompting.full_text(text), self.base.tokenizer
        pieces = tokenizer(full, add_special_tokens=False, verbose=False)["input_ids"]
        if not pieces or all(piece == tokenizer.unk_token_id for piece in pieces):
            raise ValueError(f"the base knows nothing of the text {text!r}")
        if count_truncated(tokenizer, [full], self.base.text_len):
            return f"the text has {len(pieces)} pieces, the base reads {self.base.text_len - 2}: the rest was cut"
        return ""

    def _rows(self, batch_size: int) -> int:
        """Images of one forward pass.

        On a CPU, bf16 products add up one output's terms in the same order for any number of rows (tested at 1, 3 and
        8 images); float32 ones do not, so images go through one at a time there. On a GPU the number is fixed.
        """
        if self.device.type != "cpu":
            return GPU_ROWS
        return batch_size if self.dtype == torch.bfloat16 else 1

    def _latent_shape(self, size: int | None) -> tuple[int, int, int]:
        size = self.base.image_size if size is None else size
        factor = self.base.downsample_factor
        multiple = factor * 2 ** (len(self.base.unet.config.block_out_channels) - 1)
        if size < multiple or size % multiple:
            raise ValueError(f"size must be a multiple of {multiple} pixels for this base, not {size}")
        return self.base.latent_channels, size // factor, size // factor

    def _encode_start(self, image: Image.Image, shape: tuple[int, int, int]) -> Tensor:
        """(C, h, w) float32: the mean of the posterior."""
        pixels = to_tensor(resize_square(image, shape[-1] * self.base.downsample_factor))[None]
        return encode_moments(self.base.vae, pixels.to(self.dtype), "fp32").chunk(2, dim=1)[0][0]

    def _condition(self, text: str) -> Tensor:
        """(T, D); texts are encoded one at a time, and remembered."""
        if text not in self._conditions:
            if len(self._conditions) > 4096:
                self._conditions.clear()
            base = self.base
            self._conditions[text] = text_conditions(
                base.text_encoder, base.tokenizer, [text], base.text_len
            )[0]
        return self._conditions[text]

    @torch.inference_mode()
    def _sample(
        self,
        group: list[Request],
        seed: int,
        sampling: SamplingOptions,
        prompting: Prompting,
        shape: tuple[int, int, int],
        start: Tensor | None,
        strength: float,
    ) -> list[Sampled]:
        started = time.perf_counter()
        padded = group + group[-1:] * (GPU_ROWS - len(group)) if self.device.type != "cpu" else group
        noise = torch.stack(
            [torch.randn(shape, generator=sample_generator(f"{seed}/{request.index}")) for request in padded]
        ).to(self.device)
        conditions = torch.stack([self._condition(prompting.full_text(request.text)) for request in padded])
        null = self._condition(prompting.full_negative).expand_as(conditions)
        latents = sample_latents(
            self._denoise,
            make_scheduler(sampling.scheduler, self.base.scheduler),
            noise,
            conditions,
            null,
            sampling,
            None if start is None else start.expand_as(noise),
            strength,
        )
        if not latents.isfinite().all():
            raise ValueError(
                "the base's numbers are not finite: its weights are damaged, or set --precision fp32"
            )
        images = [self._decode(row) for row in latents[: len(group)]]
        seconds = (time.perf_counter() - started) / len(group)
        return [
            Sampled(image, request.text, request.index, seed, seconds, request.key)
            for image, request in zip(images, group, strict=True)
        ]

    def _denoise(self, latents: Tensor, timestep: Tensor, conditions: Tensor) -> Tensor:
        latents = latents.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return self.base.unet(latents, timestep, conditions).sample

    def _decode(self, latents: Tensor) -> Image.Image:
        """(C, h, w) float32 -> image."""
        scaled = (latents / self.base.vae.config.scaling_factor)[None].to(self.dtype)
        return to_image(self.base.vae.decode(scaled).sample[0].float().cpu())


def _sha256(path: Path) -> str:
    """As config.json of a base of our own records it, else of the weight files."""
    config = path / "config.json"
    stored = read_json(config) if config.is_file() else {}
    if isinstance(stored, dict) and stored.get("kind") == KIND and isinstance(stored.get("sha256"), str):
        return stored["sha256"]
    return base_sha256(path)
