"""TextToGan: a checkpoint directory in, images out, one forward pass each.

pipeline = TextToGan.from_pretrained("runs/gan")
images = pipeline("...", num_images=8, seed=0, psi=0.8)                        # list of PIL images
images = pipeline.interpolate("...", "...", steps=8, seed=0)
"""

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from common import checkpoint
from common.config import from_mapping
from common.distributed import pick_device
from common.image import to_image
from common.outputs.out_directory import Request
from common.precision import autocast
from common.run_dir import best_step
from common.text.bert_text import CaptionTokenizer
from gan.model import KIND, Generator, GeneratorConfig
from gan.text import FOLDER, TextTower, is_known, open_tokenizer

BATCH = 16  # images of one forward pass, always: kernels of another batch size may round otherwise


@dataclass(frozen=True)
class GanConfig:
    """What config.json says about a GAN."""

    generator: GeneratorConfig
    text_dim: int
    """Length of the text tower's vectors."""
    labels: tuple[str, ...] = ()
    """Categories that the generator knows."""
    caption_dropout: float = 0.0
    """Share of captions hidden in training; 0: it never generated without a caption."""


def with_first_map(config: dict[str, Any]) -> dict[str, Any]:
    """The values of a GanConfig as they are written; checkpoints without `first_map` began from a constant."""
    generator = config.get("generator")
    return config | (
        {"generator": {"first_map": "constant"} | generator} if isinstance(generator, dict) else {}
    )


class GanModel(nn.Module):
    """What a checkpoint holds: the text tower and the generator."""

    def __init__(self, text: TextTower, generator: Generator) -> None:
        super().__init__()
        self.text, self.generator = text, generator


@dataclass(frozen=True)
class Generated:
    """One image and how it came about."""

    image: Image.Image
    text: str
    index: int
    seconds: float
    """This image's share of its batch's time."""
    key: str | None = None


@dataclass(frozen=True)
class SamplingOptions:
    """How images are generated."""

    psi: float = 1.0
    """Truncation: 1 is none, smaller values move images towards the mean of their caption, 0 shows that alone."""
    category: str = ""
    """Category, one of the training shards'; empty: the caption alone says what to show."""

    def __post_init__(self) -> None:
        if not 0 <= self.psi <= 2:
            raise ValueError(f"psi must lie in [0, 2], not {self.psi}")


class TextToGan:
    """A generator with its text tower and tokenizer."""

    def __init__(
        self, model: GanModel, config: GanConfig, tokenizer: CaptionTokenizer, sha256: str = ""
    ) -> None:
        self.model, self.config, self.tokenizer, self.sha256 = model.eval(), config, tokenizer, sha256
        self.device = next(model.parameters()).device

    @classmethod
    def from_pretrained(cls, name: str | Path, device: str = "auto") -> "TextToGan":
        """A checkpoint directory, a run directory (its best checkpoint, else the latest), or a hub id.

        Raises FileNotFoundError or ValueError saying what is wrong with it.
        """
        directory = best_step(Path(name).expanduser()) or checkpoint.resolve(name)
        values = checkpoint.read_config(directory, KIND)
        config = from_mapping(GanConfig, with_first_map(values["model"]), where=f"{directory}/config.json")
        if not (directory / FOLDER / "config.json").is_file():
            raise FileNotFoundError(f"{directory / FOLDER} holds no config.json: the checkpoint is not whole")
        model = build_model(config, directory / FOLDER)
        checkpoint.load_weights(model, directory)
        tokenizer = open_tokenizer(directory / FOLDER)
        return cls(model.to(pick_device(device)), config, tokenizer, values.get("sha256", ""))

    def __call__(
        self, text: str, num_images: int = 1, seed: int = 0, psi: float = 1.0, category: str = ""
    ) -> list[Image.Image]:
        """Images 0 .. num_images - 1 of the seed. Raises ValueError for what cannot be generated."""
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, not {num_images}")
        requests = (Request(text, i) for i in range(num_images))
        return [found.image for found in self.generate(requests, seed, SamplingOptions(psi, category))]

    def generate(
        self, requests: Iterable[Request], seed: int, options: SamplingOptions
    ) -> Iterator[Generated]:
        """One image a request, in order. Raises ValueError for bad options at once, for a bad text at its turn."""
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, not {seed}")
        label = self.label_number(options.category)
        stream = iter(requests)
        batches = iter(lambda: list(itertools.islice(stream, BATCH)), [])
        return (found for batch in batches for found in self._batch(batch, seed, options.psi, label))

    def interpolate(
        self, first: str, second: str, steps: int, seed: int, options: SamplingOptions
    ) -> list[Image.Image]:
        """`steps` images of one noise vector, the caption going from `first` to `second`. Raises ValueError."""
        if steps < 2:
            raise ValueError(f"an interpolation needs at least 2 images, not {steps}")
        label = self.label_number(options.category)
        for text in (first, second):
            self.complain(text, label)
        ends = self.embed([first, second])  # (2, D)
        shares = torch.linspace(0, 1, steps, device=self.device)[:, None]
        text = torch.lerp(ends[:1], ends[1:], shares)  # (N, D)
        z = self.noise(seed, [0]).expand(steps, -1)
        return self.images(z, text, [label] * steps, [True] * steps, options.psi)

    def label_number(self, category: str) -> int:
        """0 for "". Raises ValueError for a category that the generator does not know."""
        if not category:
            return 0
        if not self.config.labels:
            raise ValueError("this GAN was trained without categories: leave --category out")
        if category not in self.config.labels:
            known = ", ".join(self.config.labels[:8])
            raise ValueError(f"this GAN knows no category {category!r} (it knows {known}, ...)")
        return self.config.labels.index(category) + 1

    def complain(self, text: str, label: int = 0) -> str:
        """A note when the text will be cut. Raises ValueError when nothing of it is known."""
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        if not text.strip():
            if label and self.config.caption_dropout:
                return ""
            raise ValueError(f"the text {shown!r} is empty: say what to show")
        if not is_known(self.tokenizer, text):
            raise ValueError(f"the text {shown!r} holds only characters that the text tower does not know")
        before = self.tokenizer.num_truncated
        self.tokenizer.ids(text)
        cut = self.tokenizer.num_truncated > before
        return (
            f"the text {shown!r} is longer than {self.tokenizer.max_text_len} tokens: the rest was cut"
            if cut
            else ""
        )

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """(N, D) float32, each text alone: so its vector does not depend on its neighbours."""
        rows = {
            text: self.model.text(self.tokenizer.batch([text]).to(self.device))
            for text in dict.fromkeys(texts)
        }
        return torch.cat([rows[text] for text in texts])

    def noise(self, seed: int, indices: Sequence[int]) -> Tensor:
        """(N, z_dim): that of image i of the seed."""
        rows = []
        for index in indices:
            generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
            rows.append(torch.randn(self.config.generator.z_dim, generator=generator))
        return torch.stack(rows).to(self.device)

    @torch.inference_mode()
    def images(
        self, z: Tensor, text: Tensor, labels: Sequence[int], has_text: Sequence[bool], psi: float
    ) -> list[Image.Image]:
        """z (N, Z), text (N, D) -> N images. Raises ValueError where the weights are damaged."""
        count = len(z)
        number = torch.tensor(labels, device=self.device)
        condition = self.model.generator.condition(text, number, torch.tensor(has_text, device=self.device))
        found = []
        for start in range(0, count, BATCH):
            rows = (
                torch.arange(start, start + BATCH).clamp(max=count - 1).to(self.device)
            )  # padded with the last one
            style = self.model.generator.truncated(z[rows], condition[rows], psi)
            with autocast(self.device):
                pixels = self.model.generator.synthesis(style)
            found.append(pixels[: min(BATCH, count - start)])
        pixels = torch.cat(found).float().cpu()
        if not bool(pixels.isfinite().all()):
            raise ValueError("the generator's numbers are not finite: its weights are damaged")
        return [to_image(p) for p in pixels]

    def _batch(self, batch: Sequence[Request], seed: int, psi: float, label: int) -> Iterator[Generated]:
        started = time.perf_counter()
        for request in batch:
            self.complain(request.text, label)
        has_text = [bool(request.text.strip()) for request in batch]
        z = self.noise(seed, [request.index for request in batch])
        images = self.images(z, self.embed([r.text for r in batch]), [label] * len(batch), has_text, psi)
        seconds = (time.perf_counter() - started) / len(batch)
        for image, request in zip(images, batch, strict=True):
            yield Generated(image, request.text, request.index, seconds, request.key)


def build_model(config: GanConfig, text_folder: Path) -> GanModel:
    """With random weights."""
    tower = TextTower(text_folder, config.text_dim)
    generator = Generator(config.generator, config.text_dim, len(config.labels))
    return GanModel(tower, generator.to(memory_format=torch.channels_last))


def default_checkpoint(runs: Path = Path("runs")) -> Path:
    """The run of the GAN trained last. Raises FileNotFoundError naming the command to run."""
    found = checkpoint.newest_run(KIND, runs)
    if found:
        return found.parent
    raise FileNotFoundError(
        f"no GAN was trained yet under {runs}/: run python -m gan.train, or name one with --checkpoint DIR"
    )
