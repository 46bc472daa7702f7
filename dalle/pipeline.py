"""TextToImage: a checkpoint directory in, images out. The one way that scripts, pages and evaluations draw.

pipeline = TextToImage.from_pretrained("runs/dalle")
images = pipeline("...", num_images=8, seed=0, cfg_scale=4.0)          # list of PIL images
for p in pipeline.generate(["...", "..."], num_images=4, seed=0): ...      # with ids and likelihoods
"""

import dataclasses
import itertools
import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from common import checkpoint
from common.distributed import pick_device
from common.files import read_json
from common.image import to_image
from common.outputs.out_directory import Request
from dalle import model, sequence
from dalle.engines import FastOptions, prepare, resolve_options
from dalle.inpaint import Source
from dalle.lines import LineControl, LineEncoder, LineFeatures, encode_control
from dalle.sampling import SamplingOptions, noise_generator, sample_ids
from dalle.text_tokenizer import TextTokenizer
from vq.decode_each import decode_each
from vq.model import ImageTokenizer

if TYPE_CHECKING:
    from dalle.release import Card


IMPORTED = "dalle_pytorch"  # the kind of checkpoints that dalle.convert writes


@dataclass(frozen=True)
class GeneratedImage:
    """One image and how it came about."""

    image: Image.Image
    text: str
    index: int
    """Image `index` of the seed."""
    seed: int
    ids: Tensor
    """(N,) long, its image tokens."""
    log_likelihood: float
    """log p(image | text) in nats, over the tokens that were sampled."""
    null_log_likelihood: float | None
    """log p(image | no text); None without guidance or with a negative prompt."""
    seconds: float
    """This image's share of its batch's time."""
    key: str | None = None
    """Name of the text, as the request had it."""


class TextToImage:
    """A generator with its two tokenizers."""

    def __init__(
        self,
        generator: nn.Module,
        image_tokenizer: ImageTokenizer,
        text_tokenizer: TextTokenizer,
        sha256: str = "",
        fast: FastOptions = FastOptions(),  # noqa: B008 (frozen)
    ) -> None:
        self.image_tokenizer = image_tokenizer.eval()
        self.text_tokenizer = text_tokenizer
        self.config = generator.config
        self.sha256 = sha256
        self.directory: Path | None = None
        self.device = next(generator.parameters()).device
        self.fast = resolve_options(generator, fast)
        self.generator = prepare(generator.eval(), self.fast)
        self.kernels: dict[str, str] = self.generator.report.record()  # what ran, for images.jsonl
        self.line_encoder: LineEncoder | None = getattr(generator, "line_encoder", None)
        if image_tokenizer.codebook_size != self.config.codebook_size:
            raise ValueError(
                f"the generator samples from {self.config.codebook_size} image codes, the image tokenizer has "
                f"{image_tokenizer.codebook_size}: they do not belong together"
            )

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: str = "auto",
        fast: FastOptions = FastOptions(),  # noqa: B008 (frozen)
    ) -> "TextToImage":
        """A checkpoint directory of kind generator (or an imported one), a run directory, or a hub id.

        Raises FileNotFoundError or ValueError saying what is wrong with it.
        """
        directory = checkpoint.resolve(name)
        generator, text_tokenizer, config = load_generator(directory)
        image_tokenizer = ImageTokenizer.from_pretrained(directory / "image_tokenizer")
        own = config.get("image_tokenizer_sha256", image_tokenizer.sha256)
        if own != image_tokenizer.sha256:
            raise ValueError(
                f"{directory} was made with the image tokenizer {own[:12]}, but {directory / 'image_tokenizer'} is "
                f"{image_tokenizer.sha256[:12]}: they do not belong together"
            )
        target = pick_device(device)
        sha256 = config.get("sha256", "")
        pipeline = cls(generator.to(target), image_tokenizer.to(target), text_tokenizer, sha256, fast)
        pipeline.directory = directory
        return pipeline

    def __call__(
        self,
        text: str,
        num_images: int = 1,
        seed: int = 0,
        negative: str = "",
        batch_size: int = 8,
        source: Source | None = None,
        line: LineControl | None = None,
        **sampling: Any,
    ) -> list[Image.Image]:
        """Images 0 .. num_images - 1 of the seed; `line`: a drawing to follow; `sampling`: fields of SamplingOptions.

        Raises ValueError.
        """
        unknown = set(sampling) - {f.name for f in dataclasses.fields(SamplingOptions)}
        if unknown:
            raise ValueError(f"unknown sampling option {', '.join(sorted(unknown))}")
        images = self.generate(
            [text], num_images, seed, SamplingOptions(**sampling), negative, batch_size, source, line
        )
        return [image.image for image in images]

    def generate(
        self,
        texts: Iterable[str],
        num_images: int = 1,
        seed: int = 0,
        options: SamplingOptions = SamplingOptions(),  # noqa: B008 (frozen)
        negative: str = "",
        batch_size: int = 8,
        source: Source | None = None,
        line: LineControl | None = None,
    ) -> Iterator[GeneratedImage]:
        """Images 0 .. num_images - 1 of every text in order; texts may be endless. Raises ValueError."""
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, not {num_images}")
        requests = (Request(text, i) for text in texts for i in range(num_images))
        return self.generate_requests(requests, seed, options, negative, batch_size, source, line)

    def generate_requests(
        self,
        requests: Iterable[Request],
        seed: int,
        options: SamplingOptions,
        negative: str = "",
        batch_size: int = 8,
        source: Source | None = None,
        line: LineControl | None = None,
    ) -> Iterator[GeneratedImage]:
        """The same for a stream of requests. Raises ValueError for bad options at once, for a bad text at its turn."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, not {seed}")
        if negative and not options.is_guided:
            raise ValueError(
                "a negative prompt works through guidance: set cfg_scale to something other than 1"
            )
        null_ids = self.encode_text(negative)[0] if negative.strip() else self.null_ids()
        features = None if line is None else encode_control(self.line_encoder, line, self.device)
        stream = iter(requests)
        batches = iter(lambda: list(itertools.islice(stream, batch_size)), [])
        return (
            image
            for batch in batches
            for image in self._sample_batch(
                batch, seed, options, null_ids, bool(negative.strip()), source, features
            )
        )

    def encode_text(self, text: str) -> tuple[Tensor, str]:
        """Ids (1, T) and a note when the text was cut. Raises ValueError when nothing of it is known."""
        limit = self.config.max_text_len
        encoded = self.text_tokenizer.encode([text], limit)
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        if encoded.num_pieces == 0:
            raise ValueError(f"the text {shown!r} is empty: say what to generate")
        if encoded.num_unknown == encoded.num_pieces:
            raise ValueError(
                f"the text {shown!r} holds only characters that the text tokenizer does not know"
            )
        note = (
            f"the text {shown!r} is longer than {limit} tokens: the rest was cut"
            if encoded.num_truncated
            else ""
        )
        return encoded.ids.to(self.device), note

    def push_to_hub(self, repo_id: str, card: "Card | None" = None, private: bool = True) -> str:
        """Release the checkpoint that this was loaded from and upload it; returns the commit's address.

        A release goes up as it is, with its own card, unless another is given.
        Raises ValueError when there is no such checkpoint, or saying why the hub refused.
        """
        from dalle.release import Card, is_release, push_to_hub, release

        if self.directory is None:
            raise ValueError("only a pipeline that was loaded from a checkpoint directory can be pushed")
        if card is None and is_release(self.directory):
            return push_to_hub(self.directory, repo_id, private)
        with tempfile.TemporaryDirectory() as folder:
            directory = release(self.directory, Path(folder) / "release", card or Card())
            return push_to_hub(directory, repo_id, private)

    def null_ids(self) -> Tensor:
        config = self.config
        return sequence.null_captions(1, config.max_text_len, config.pad_id, self.device)

    def _sample_batch(
        self,
        batch: Sequence[Request],
        seed: int,
        options: SamplingOptions,
        null_ids: Tensor,
        is_negative: bool,
        source: Source | None,
        lines: LineFeatures | None,
    ) -> Iterator[GeneratedImage]:
        started = time.perf_counter()
        text_ids = torch.cat([self.encode_text(request.text)[0] for request in batch])  # (B, T)
        generators = [noise_generator(seed, request.index) for request in batch]
        canvas = source.canvas(generators, self.device) if source else None
        null_ids = null_ids.expand(len(batch), -1)
        sampled = sample_ids(self.generator, text_ids, null_ids, generators, options, canvas, lines)
        images = self.decode_ids(sampled.ids)
        seconds = (time.perf_counter() - started) / len(batch)
        scores = sampled.log_likelihood.tolist()
        if not all(map(math.isfinite, scores)):
            raise ValueError("the generator's numbers are not finite: its weights are damaged")
        no_nulls = sampled.null_log_likelihood is None or is_negative
        null_scores = [None] * len(batch) if no_nulls else sampled.null_log_likelihood.tolist()
        ids = sampled.ids.cpu()
        for i, request in enumerate(batch):
            metrics = (seed, ids[i], scores[i], null_scores[i], seconds)
            yield GeneratedImage(images[i], request.text, request.index, *metrics, key=request.key)

    def decode_ids(self, ids: Tensor) -> list[Image.Image]:
        """(B, N) long -> B images, each the same in any batch."""
        return [to_image(pixels) for pixels in decode_each(self.image_tokenizer, ids)]


def load_generator(directory: Path) -> tuple[nn.Module, TextTokenizer, dict[str, Any]]:
    """The model of a checkpoint directory by its kind, its text tokenizer, and its config.json."""
    config = read_json(directory / "config.json")
    kind = config.get("kind") if isinstance(config, dict) else None
    if kind == IMPORTED:
        from dalle.published.dalle_pytorch import BareTextTokenizer, DallePytorch

        return DallePytorch.from_pretrained(directory), BareTextTokenizer.from_pretrained(directory), config
    generator = model.Dalle.from_pretrained(directory)
    text_tokenizer = TextTokenizer.from_pretrained(directory)
    if text_tokenizer.vocab_size != generator.config.text_vocab_size:
        raise ValueError(
            f"the generator in {directory} reads {generator.config.text_vocab_size} text tokens, its text tokenizer "
            f"has {text_tokenizer.vocab_size}: they do not belong together"
        )
    return generator, text_tokenizer, config
