"""White backgrounds: a soft matte, options on its edge, and the composite onto pure white.

As published: alpha = floor(255 p) / 255, out = alpha image + (1 - alpha) 255, without a threshold. Where the matte
marks hardly anything or nearly everything, the method has failed and the image is left as it is.

`--whiten` of every command that generates is the last part of this file.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from common.files import sha256_file
from common.log import say
from data_tools.images.border import PLAUSIBLE
from diffusion.saliency import OnnxPreset, Saliency, SaliencyName, open_saliency


@dataclass(frozen=True)
class WhitenOptions:
    """How backgrounds become white."""

    method: SaliencyName = "border"
    """border: flood from the border, no weights; grabcut: OpenCV's; poolnet and onnx: networks with --weights."""
    weights: Path | None = None
    """PoolNet's state dict, or an ONNX file."""
    onnx_preset: OnnxPreset = "auto"
    """Network in the ONNX file; auto reads it off the file's name."""
    threshold: float = 0.0
    """Matte from which a pixel is all product, and below which all background; 0 keeps the matte soft."""
    erode: int = 0
    """Pixels that the product loses at its edge, against a rim of the old background."""
    feather: float = 0.0
    """Standard deviation in pixels of a blur of the matte, inside of the product alone."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must lie in [0, 1), not {self.threshold}")
        if self.erode < 0 or self.feather < 0:
            raise ValueError(f"erode and feather must be 0 or more, not {self.erode} and {self.feather}")


@dataclass(frozen=True)
class Whitened:
    """An image on white, or as it was."""

    image: Image.Image
    share: float
    """Of the image that is product, before the guard."""
    note: str
    """Why the image was left as it is; empty where it is on white."""

    @property
    def is_white(self) -> bool:
        return not self.note


@dataclass(frozen=True)
class Whitener:
    """Images onto white; for every command with `--whiten`."""

    options: WhitenOptions = field(default_factory=WhitenOptions)
    saliency: Saliency = field(default_factory=lambda: open_saliency("border"))

    @classmethod
    def open(cls, options: WhitenOptions, device: str = "cpu") -> "Whitener":
        """Raises what `open_saliency` raises."""
        return cls(options, open_saliency(options.method, options.weights, options.onnx_preset, device))

    def __call__(self, image: Image.Image) -> Whitened:
        """RGB image -> the same size."""
        image = image.convert("RGB")
        matte = refine(self.saliency.mask(image), self.options)
        share = float(matte.mean())
        low, high = PLAUSIBLE
        if not low <= share <= high:
            what = "no product was found" if share < low else "no background was found"
            return Whitened(image, share, f"left as it is: {what} ({share:.1%} of the image)")
        return Whitened(on_white(image, matte), share, "")

    def origin(self) -> dict[str, Any]:
        """What the result depends on, for the line of an image in images.jsonl."""
        o = self.options
        values = {"method": o.method, "threshold": o.threshold, "erode": o.erode, "feather": o.feather}
        return values | ({"weights_sha256": sha256_file(o.weights)} if o.weights else {})


def refine(matte: np.ndarray, options: WhitenOptions) -> np.ndarray:
    """(H, W) in [0, 1] -> (H, W), with the options' threshold, erosion and feather in this order."""
    import cv2

    matte = matte.astype(np.float32)
    if options.threshold:
        matte = (matte >= options.threshold).astype(np.float32)
    if options.erode:
        side = 2 * options.erode + 1
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
        matte = cv2.erode(matte, kernel)  # OpenCV's border does not erode: a product may leave the image
    if options.feather:
        # twice the blur minus one: falls from 1 inside to 0 at the old edge, so that no background comes back
        blurred = cv2.GaussianBlur(matte, (0, 0), options.feather, borderType=cv2.BORDER_REPLICATE)
        matte = np.minimum(matte, (2 * blurred - 1).clip(0, 1))
    return matte


def on_white(image: Image.Image, matte: np.ndarray) -> Image.Image:
    """The published composite: RGB image and (H, W) in [0, 1]; exactly 255 where the matte is below 1 / 255."""
    alpha = (np.floor(255 * matte.clip(0, 1)) / 255).astype(np.float32)[..., None]
    pixels = alpha * np.asarray(image, np.float32) + (1 - alpha) * 255
    return Image.fromarray(np.round(pixels).astype(np.uint8))


# --- --whiten of generating commands -------------------------------------------------------------------------------

AnyImage = TypeVar("AnyImage", bound=Any)
"""A dataclass with a field `image`."""


def require_whiten(whiten: bool, options: WhitenOptions) -> None:
    """Raises ValueError for options that have no effect."""
    if options != WhitenOptions() and not whiten:
        raise ValueError("options of --white need --whiten")


def whiten_origin(whiten: bool, options: WhitenOptions) -> dict[str, Any]:
    """What lines of images.jsonl say of it; nothing where images stay as they are."""
    return {"whiten": Whitener.open(options).origin()} if whiten else {}


def onto_white(images: Iterator[AnyImage], whiten: bool, options: WhitenOptions) -> Iterator[AnyImage]:
    """The same on white where asked for; those that had to be left as they are are counted and said."""
    if not whiten:
        yield from images
        return
    whitener, notes = Whitener.open(options), []
    for made in images:
        found = whitener(made.image)
        notes += [found.note] if found.note else []
        yield replace(made, image=found.image)
    if notes:
        say(f"note: {len(notes)} images were not put on white, the last one {notes[-1]}")
