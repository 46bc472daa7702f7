"""What happens to the images of one record on its way into a shard: decode within limits, resize, encode.

Kept apart from the command so that its worker processes import nothing but Pillow.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from PIL import Image

from data_tools.images.color_profiles import BROKEN, profile_state
from data_tools.images.decode import (
    SUFFIXES,
    BadImage,
    ImageLimits,
    ResizeMode,
    decode,
    encode,
    is_plain_rgb,
    open_plugin,
    resize,
)
from data_tools.ingest.records import Problem, Record, problem


@dataclass(frozen=True)
class ImageOptions:
    """Size, format and limits of the images in the shards."""

    resize: ResizeMode = "square"
    """square: short side to `size`, centre crop; pad: long side, white bars; longest: at most `size`; keep: as is."""
    size: int = 256
    """Side in pixels; not used by keep."""
    image_format: Literal["webp", "jpg", "png", "same"] = "webp"
    """Format of the files; same keeps the bytes of sound upright RGB JPEG, PNG and WebP and needs --resize keep."""
    quality: int = 90
    """1 to 100, for webp and jpg."""
    max_pixels: int = 64_000_000
    """Most pixels (width x height) of a source image; more are refused before they are allocated."""
    min_side: int = 0
    """Smallest shorter side of a source image in pixels; 0 keeps all."""
    max_aspect: float = 0.0
    """Largest ratio of longer to shorter side; 0 keeps all."""

    def __post_init__(self):
        if not 1 <= self.size <= 8192:
            raise ValueError(f"--size must be 1 to 8192 pixels, not {self.size}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality must be 1 to 100, not {self.quality}")
        if self.image_format == "same" and self.resize != "keep":
            raise ValueError(
                f"--image-format same keeps the bytes, so it needs --resize keep, not {self.resize}"
            )
        self.limits(1)

    def limits(self, max_image_bytes: int) -> ImageLimits:
        """The limits as `images.decode` takes them."""
        return ImageLimits(max_image_bytes, self.max_pixels, self.min_side, self.max_aspect)


@dataclass(frozen=True)
class Prepare:
    """A picklable function from records to records with finished images, or to problems, in order."""

    options: ImageOptions
    max_image_bytes: int

    def __call__(self, records: Sequence[Record]) -> list[Record | Problem]:
        return [self.one(record) for record in records]

    def one(self, record: Record) -> Record | Problem:
        """The record with its image, and the images among its further members, decoded and encoded anew."""
        if not record.image:
            return problem(record.where, record.key, "no_image")
        try:
            suffix, image = self._image(record.image, record.suffix)
            extra = dict(self._extra(name, data) for name, data in record.extra.items())
        except BadImage as error:
            return problem(record.where, record.key, error.reason, error.what)
        meta = record.meta
        if _has_broken_profile(record.image, record.suffix):
            meta = {**meta, "color_profile": BROKEN}
        return replace(record, suffix=suffix, image=image, extra=extra, meta=meta)

    def _image(self, data: bytes, suffix: str) -> tuple[str, bytes]:
        image = self._decode(data)
        if self.options.image_format == "same":
            if suffix in ("jpg", "png", "webp") and is_plain_rgb(data):
                return suffix, data
            return "png", encode(image, "png")  # lossless, since "same" promises the pixels
        return self.options.image_format, encode(image, self.options.image_format, self.options.quality)

    def _extra(self, name: str, data: bytes) -> tuple[str, bytes]:
        """A drawing is cut like its photo and stays lossless; what is no image is passed on."""
        head, _, suffix = name.rpartition(".")
        if suffix not in SUFFIXES:
            return name, data
        return (f"{head}.png" if head else "png"), encode(self._decode(data), "png")

    def _decode(self, data: bytes) -> Image.Image:
        options = self.options
        near = (
            0 if options.resize == "keep" else 2 * options.size
        )  # twice: Lanczos still has pixels to average
        image = decode(data, options.limits(self.max_image_bytes), near)
        return resize(image, options.resize, options.size)


def _has_broken_profile(data: bytes, suffix: str) -> bool:
    with open_plugin(data, suffix) as image:
        return profile_state(image) == BROKEN
