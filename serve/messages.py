"""What the service and its model worker say to each other, over a pipe between two processes of our own."""

from dataclasses import dataclass, field
from typing import Literal

from common.outputs.label import LabelOptions
from dalle.options import SamplingOptions


@dataclass(frozen=True)
class SourceImage:
    """An image that new ones start from: PNG files of the model's size."""

    mode: Literal["inpaint", "vary", "recolour"]
    image: bytes
    mask: bytes = b""
    """White where the image is to be sampled anew."""
    strength: float = 0.5


@dataclass(frozen=True)
class LineDrawing:
    """A drawing that images follow."""

    image: bytes
    """PNG of the model's `line_size`, one channel, white on black."""
    scale: float = 1.0


@dataclass(frozen=True)
class Work:
    """A request as the worker needs it."""

    id: str
    prompt: str
    num_images: int
    num_candidates: int
    """Images that are sampled; the best `num_images` are returned."""
    seed: int
    options: SamplingOptions
    negative: str
    rank: bool
    side: int
    output_format: Literal["png", "jpeg", "webp"]
    label: LabelOptions
    partial_images: int = 0
    source: SourceImage | None = None
    line: LineDrawing | None = None
    whiten: bool = False
    """Put the products on pure white."""


@dataclass(frozen=True)
class Cancel:
    """Forget a request."""

    id: str


@dataclass(frozen=True)
class Stop:
    """Finish what was begun, then end."""


@dataclass(frozen=True)
class ModelInfo:
    """What the worker loaded."""

    name: str
    sha256: str
    image_size: int
    num_tokens: int
    max_images: int
    engine: str
    weights: str
    ranker: str
    line_size: int
    """Side in pixels of the line drawings that the generator takes; 0 where it takes none."""
    images_per_second: float
    """Of full batches, measured when the worker started."""


@dataclass(frozen=True)
class Ready:
    """The worker can take requests."""

    info: ModelInfo


@dataclass(frozen=True)
class Failed:
    """The worker could not start, in one sentence."""

    reason: str


@dataclass(frozen=True)
class Refused:
    """A request that cannot be served, in one sentence."""

    id: str
    reason: str


@dataclass(frozen=True)
class Partial:
    """An image on its way: rows of tokens that stand already, the rest grey."""

    id: str
    index: int
    """Of the seed."""
    number: int
    """0, 1 ...: how many partial images of it came before."""
    data: bytes


@dataclass(frozen=True)
class ServedImage:
    """A finished image."""

    data: bytes
    index: int
    """Image `index` of the seed."""
    log_likelihood: float
    score: float | None
    percentile: float | None
    """Share of real images with their own captions that score lower, in percent."""
    is_white: bool | None = None
    """Whether it is on pure white, where that was asked for."""


@dataclass(frozen=True)
class Done:
    """All images of a request, best first where they were ranked."""

    id: str
    images: tuple[ServedImage, ...]
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """wait, sample, decode, whiten, rank, encode"""


@dataclass(frozen=True)
class Fill:
    """How full the batch is, told now and then."""

    active: int
    waiting: int
    tokens: int
    """Tokens sampled since the last of these."""
