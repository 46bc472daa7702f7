"""Images of unknown origin to RGB and back: decode within limits, resize, encode. Never trusts a header.

Formats are an allow-list, so no PostScript interpreter or other helper ever starts; sizes are checked before pixels
are allocated. Transparency is laid on white, the background of product images.
"""

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageOps

from data_tools.images.color_profiles import profile_state, to_srgb
from data_tools.ingest.file_kinds import what_is
from data_tools.ingest.records import HINTS

# Suffix by content to the one Pillow plugin that may read it.
PLUGINS = {
    "jpg": "JPEG",
    "png": "PNG",
    "webp": "WEBP",
    "gif": "GIF",
    "bmp": "BMP",
    "tiff": "TIFF",
    "avif": "AVIF",
    "heic": "HEIF",
}
SUFFIXES = (
    *("jpg", "jpeg", "jpe", "jif", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"),
    *("heic", "heif", "hif"),
)  # a file with one of these claims to be an image; what it is, its bytes say
ResizeMode = Literal["keep", "square", "pad", "longest"]
ImageFormat = Literal["webp", "jpg", "png"]

# What Pillow's own `open` takes for a damaged file, and what its decoders have raised in fuzzing.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    RuntimeError,  # AVIF
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
)
BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_TRANSPOSE = {  # EXIF tag 0x0112, orientation: how to turn the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):
    """An image that is left out; `reason` is a code of `records.HINTS`."""

    def __init__(self, reason: str, what: str = ""):
        assert reason in HINTS, reason
        super().__init__(": ".join(filter(None, (reason.replace("_", " "), what))))
        self.reason, self.what = reason, what


@dataclass(frozen=True)
class ImageLimits:
    """What an image may be; outside of it is dropped and counted."""

    max_image_bytes: int = 64 * 2**20
    """Largest encoded file, in bytes."""
    max_pixels: int = 64_000_000
    """Most pixels (width x height), checked before they are allocated: a decompression bomb is refused."""
    min_side: int = 0
    """Smallest shorter side in pixels; 0 keeps all."""
    max_aspect: float = 0.0
    """Largest ratio of longer to shorter side; 0 keeps all."""

    def __post_init__(self):
        if self.max_image_bytes < 1 or self.max_pixels < 1:
            raise ValueError("max_image_bytes and max_pixels must be at least 1")
        if self.min_side < 0 or self.max_aspect < 0:
            raise ValueError("min_side and max_aspect must be 0 or more")


_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def sniff(data: bytes) -> str:
    """The suffix that the first bytes stand for (a key of PLUGINS), or "" for anything else. 64 bytes are enough."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if (
        data[:2] == b"BM" and len(data) > 26 and data[6:10] == b"\0\0\0\0"
    ):  # reserved fields, so no text "BM..."
        return "bmp"
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tiff"
    if data[4:8] == b"ftyp":
        brands = {data[8:12], *(data[i : i + 4] for i in range(16, min(len(data), 64), 4))}
        if brands & {b"avif", b"avis"}:
            return "avif"
        return "heic" if data[8:12] in _HEIC else ""
    return ""


def decode(
    data: bytes, limits: ImageLimits | None = None, near: int = 0, background: str = "white"
) -> Image.Image:
    """The first frame, upright, as an RGB image (W, H), uint8; what is transparent is laid on `background`.

    `near` > 0 allows a JPEG to be decoded at a half, a quarter or an eighth while both sides stay at or above `near`.
    Raises BadImage with the reason; never anything else for bad bytes.
    """
    limits = limits or ImageLimits()
    if not data:
        raise BadImage("empty_image")
    if len(data) > limits.max_image_bytes:
        raise BadImage("image_too_large", f"{len(data)} bytes")
    suffix = sniff(data)
    if not suffix:
        raise BadImage("not_an_image", what_is(data))
    try:
        with open_plugin(data, suffix) as image:
            _check_shape(image.size, limits)
            if near:
                image.draft(None, (near, near))
            image.load()
            return _to_rgb(_upright(image), background)
    except BadImage:
        raise
    except BOMB as error:
        raise BadImage("too_many_pixels", str(error)) from error
    except DECODE_ERRORS as error:
        raise BadImage(_reason(error), _one_line(error)) from error


def open_plugin(data: bytes, suffix: str) -> Image.Image:
    """The image, its header read, by the one plugin that may read it.

    Raises BadImage for HEIC without the package pillow-heif, and what the plugin raises.
    """
    if suffix != "heic":
        return Image.open(io.BytesIO(data), formats=(PLUGINS[suffix],))
    try:
        import pillow_heif
    except ModuleNotFoundError as error:
        raise BadImage("needs_pillow_heif") from error
    heif = pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=True)
    image = heif.to_pillow()
    image.info.pop("exif", None)  # libheif has turned it upright already
    return image


def image_size(data: bytes) -> tuple[int, int]:
    """(W, H) of the file of an image that `decode` accepts, as it is stored."""
    with open_plugin(data, sniff(data)) as image:
        return image.size


def is_plain_rgb(data: bytes) -> bool:
    """Whether any program shows this file as `decode` does: RGB, upright, no color profile that changes it."""
    with open_plugin(data, sniff(data)) as image:
        upright = image.getexif().get(0x0112, 1) == 1
        return image.mode == "RGB" and upright and profile_state(image) != "converted"


def open_file(path: Path, background: str = "white") -> Image.Image:
    """`decode` of an image file. Raises FileNotFoundError or ValueError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"no image {path}")
    try:
        return decode(path.read_bytes(), background=background)
    except BadImage as error:
        raise ValueError(f"{path} is no readable image: {error}") from error


def _check_shape(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    short, long = min(size), max(size)
    if width * height > limits.max_pixels:
        raise BadImage("too_many_pixels", f"{width} x {height}")
    if short < max(1, limits.min_side):
        raise BadImage("image_too_small", f"{width} x {height}")
    if limits.max_aspect and long > limits.max_aspect * short:
        raise BadImage("aspect_ratio", f"{width} x {height}")


def _reason(error: BaseException) -> str:
    return "truncated_image" if "truncat" in str(error).lower() else "undecodable"


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(0x0112, 1)
    except DECODE_ERRORS:  # damaged EXIF beside sound pixels: as if there were none
        return image
    method = _TRANSPOSE.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image, background: str) -> Image.Image:
    """In sRGB; a profile that is broken is as none (`color_profiles.profile_state` tells)."""
    if image.mode.startswith("I;16"):  # 16-bit grey: keep the high byte
        import numpy as np

        info, levels = image.info, (np.asarray(image) >> 8).astype("uint8")  # (H, W)
        image = Image.fromarray(levels)
        image.info = info
    if image.mode in ("I", "F"):
        raise BadImage("unsupported_mode", f"mode {image.mode}")
    image = to_srgb(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    rgb = image.convert("RGB")
    rgb.info = {}  # no profile, EXIF or comment of the source goes on into our files
    return rgb


def resize(image: Image.Image, mode: ResizeMode, size: int) -> Image.Image:
    """Lanczos. `square`: short side to `size`, centre crop; `pad`: long side to `size`, white bars; `longest`: at most.

    `keep` returns the image; `longest` never enlarges. Output (size, size) for `square` and `pad`.
    """
    width, height = image.size
    if mode == "keep":
        return image
    if mode == "square":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        if (width, height) == (size, size):
            return image
        return image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    if mode in ("pad", "longest"):
        scale = size / max(width, height)
        if mode == "longest" and scale >= 1:
            return image
        shape = (max(1, round(width * scale)), max(1, round(height * scale)))
        scaled = image if shape == image.size else image.resize(shape, Image.Resampling.LANCZOS)
        if mode == "longest":
            return scaled
        return ImageOps.pad(scaled, (size, size), Image.Resampling.LANCZOS, color="white")
    raise ValueError(f"resize mode {mode!r}: choose keep, square, pad or longest")


def encode(
    image: Image.Image, image_format: ImageFormat = "webp", quality: int = 90, **metadata: Any
) -> bytes:
    """The file's bytes, the same each time. `quality` 1-100; PNG is lossless and ignores it. `metadata`: what
    `common.outputs.label` gives for the format."""
    buffer = io.BytesIO()
    if image_format == "webp":
        image.save(buffer, "WEBP", quality=quality, method=4, **metadata)
    elif image_format == "jpg":
        image.save(buffer, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2, **metadata)
    elif image_format == "png":
        image.save(buffer, "PNG", **metadata)
    else:
        raise ValueError(f"image format {image_format!r}: choose webp, jpg or png")
    return buffer.getvalue()
