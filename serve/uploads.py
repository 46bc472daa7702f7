"""Uploaded images: decoded within the limits that training has, and the region of an edit."""

import io

import numpy as np
from PIL import Image

from data_tools.images import BadImage, ImageLimits, decode
from serve.schemas import ApiError

LIMITS = ImageLimits(max_image_bytes=20 << 20, max_pixels=32_000_000)


def readable(data: bytes, param: str) -> bytes:
    """The upload itself, once it has shown that it can be decoded. Raises ApiError."""
    decoded(data, param)
    return data


def decoded(data: bytes, param: str, background: str = "white") -> Image.Image:
    """Upright, in RGB, transparency laid on `background`. Raises ApiError."""
    try:
        return decode(data, LIMITS, ground=background)
    except BadImage as error:
        reason = f"{error.reason.replace('_', ' ')} {error.what}".strip()
        raise ApiError(400, f"The image cannot be read: {reason}.", "invalid_image", param) from error


def edit_region(image: bytes, mask: bytes | None) -> bytes:
    """A PNG that is white where the image is to be sampled anew.

    As in OpenAI's API that is where the mask is transparent, or the image itself when there is no mask; a mask without
    transparency is white there. Raises ApiError when nothing is left or the shapes differ.
    """
    param = "image" if mask is None else "mask"
    data = image if mask is None else mask
    on_white, on_black = decoded(data, param), decoded(data, param, "black")
    clear = (np.asarray(on_white) != np.asarray(on_black)).any(2)
    if mask is not None and not clear.any():
        clear = np.asarray(on_white.convert("L")) > 127
    if not clear.any():
        raise ApiError(
            400,
            "Nothing is marked: make transparent, or white in the mask, what is to change.",
            "invalid_mask",
            param,
        )
    if mask is not None:
        _require_shape(on_white, decoded(image, "image"))
    buffer = io.BytesIO()
    Image.fromarray(clear.astype(np.uint8) * 255).save(buffer, format="PNG")
    return buffer.getvalue()


def _require_shape(mask: Image.Image, image: Image.Image) -> None:
    if abs(mask.width * image.height - mask.height * image.width) > 0.02 * mask.height * image.width:
        sizes = f"{mask.width} x {mask.height}, the image {image.width} x {image.height}"
        raise ApiError(400, f"The mask is {sizes}: both must have the same shape.", "invalid_mask", "mask")
