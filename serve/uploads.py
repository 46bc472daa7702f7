"""Uploaded images: decoded within the limits that training has, and what the worker gets of them.

It gets PNG files of the model's own size, so that no upload, whatever its size, holds up the images of others. All of
this is called in threads, a few at a time (`Service.prepare`).
"""

import binascii

import numpy as np
from PIL import Image

from common.square import resize_square
from data_tools.images.decode import BadImage, ImageLimits, decode, encode
from data_tools.images.line_drawings import encode_lines, extract, fit_lines, read_drawing
from serve.messages import LineDrawing, ModelInfo, SourceImage
from serve.schemas import ApiError

LIMITS = ImageLimits(max_image_bytes=20 << 20, max_pixels=32_000_000)


def from_base64(text: str, param: str) -> bytes:
    """The file in a base64 string or `data:` URL. Raises ApiError."""
    try:
        return binascii.a2b_base64(text.rpartition(",")[2], strict_mode=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"'{param}' is no base64: {error}.", "invalid_base64", param) from error


def decoded(data: bytes, param: str, background: str = "white") -> Image.Image:
    """Upright, in RGB, transparency laid on `background`. Raises ApiError."""
    try:
        return decode(data, LIMITS, background=background)
    except BadImage as error:
        raise _unreadable(error, param) from error


def _unreadable(error: BadImage, param: str) -> ApiError:
    return ApiError(400, f"The image cannot be read: {error}.", "invalid_image", param)


def to_vary(image: bytes, strength: float, model: ModelInfo) -> SourceImage:
    """Raises ApiError."""
    return SourceImage("vary", _square_png(decoded(image, "image"), model), strength=strength)


def to_edit(image: bytes, mask: bytes | None, model: ModelInfo) -> SourceImage:
    """Raises ApiError, as `edit_region` does."""
    region = edit_region(image, mask, model.image_size)
    return SourceImage("inpaint", _square_png(decoded(image, "image"), model), region)


def to_recolour(image: bytes, line_scale: float, model: ModelInfo) -> tuple[SourceImage, LineDrawing]:
    """A photo whose shape and plain background stay, and its lines, as `generate.py --like` has them.

    Raises ApiError.
    """
    photo = decoded(image, "image")
    lines = extract(resize_square(photo, model.line_size), "canny")
    return SourceImage("recolour", _square_png(photo, model)), LineDrawing(encode_lines(lines), line_scale)


def to_line_drawing(data: bytes, scale: float, model: ModelInfo) -> LineDrawing:
    """As `generate.py --line` has it: dark on light or light on dark, bars added to a square. Raises ApiError."""
    try:
        drawing = read_drawing(data, LIMITS)
    except BadImage as error:
        raise _unreadable(error, "line") from error
    except ValueError as error:
        raise ApiError(400, f"The drawing cannot be used: {error}.", "invalid_drawing", "line") from error
    return LineDrawing(encode_lines(fit_lines(drawing.lines, model.line_size)), scale)


def edit_region(image: bytes, mask: bytes | None, side: int) -> bytes:
    """A PNG of `side` pixels that is white where the image is to be sampled anew.

    As in OpenAI's API that is where the mask is transparent, or the image itself when there is no mask; a mask without
    transparency is white there. Raises ApiError when nothing is left or the shapes differ.
    """
    param = "image" if mask is None else "mask"
    data = image if mask is None else mask
    on_white, on_black = decoded(data, param), decoded(data, param, "black")
    clear = (np.asarray(on_white) != np.asarray(on_black)).any(2)
    if mask is not None and not clear.any():
        clear = np.asarray(on_white.convert("L")) > 127
    if mask is not None:
        _require_shape(on_white, decoded(image, "image"))
    region = resize_square(Image.fromarray(clear.astype(np.uint8) * 255), side)
    if not (np.asarray(region.convert("L")) > 127).any():
        raise ApiError(
            400,
            "Nothing is marked: make transparent, or white in the mask, what is to change.",
            "invalid_mask",
            param,
        )
    return encode(region, "png")


def _square_png(image: Image.Image, model: ModelInfo) -> bytes:
    return encode(resize_square(image, model.image_size), "png")


def _require_shape(mask: Image.Image, image: Image.Image) -> None:
    if abs(mask.width * image.height - mask.height * image.width) > 0.02 * mask.height * image.width:
        sizes = f"{mask.width} x {mask.height}, the image {image.width} x {image.height}"
        raise ApiError(400, f"The mask is {sizes}: both must have the same shape.", "invalid_mask", "mask")
