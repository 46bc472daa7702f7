"""Embedded color profiles: pixels that are meant in another color space to sRGB, by Pillow's ImageCms (LittleCMS).

Phones write Display P3, cameras Adobe RGB, printers CMYK: read as sRGB their colors come out pale or wrong.
"""

import functools
import io

from PIL import Image, ImageCms

BROKEN = "broken"  # of `profile_state`
_SPACES = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK", "LAB": "Lab "}  # Pillow's mode to the profile's field


def to_srgb(image: Image.Image) -> Image.Image:
    """The image in sRGB, with its transparency; as it is where it has no profile, that of sRGB, or a broken one."""
    data = image.info.get("icc_profile")
    if not data:
        return image
    colors, alpha = _colors_and_alpha(image)
    transform = _transform(data, colors.mode)
    if transform is None:
        return image
    converted = ImageCms.applyTransform(colors, transform)
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def profile_state(image: Image.Image) -> str:
    """ "" for none or sRGB's, `converted` for one that changes the pixels, BROKEN for one that cannot be used."""
    data = image.info.get("icc_profile")
    if not data:
        return ""
    mode = _colors_mode(image)
    if _is_broken(data, mode):
        return BROKEN
    return "" if _transform(data, mode) is None else "converted"


def _colors_mode(image: Image.Image) -> str:
    if image.mode in _SPACES:
        return image.mode
    return "L" if image.mode in ("1", "LA", "La") or image.mode.startswith("I;16") else "RGB"


def _colors_and_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    mode = _colors_mode(image)
    return (image if image.mode == mode else image.convert("RGBA").convert(mode)), alpha


@functools.lru_cache(maxsize=32)
def _open(data: bytes) -> ImageCms.ImageCmsProfile | None:
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(data))
    except (OSError, ImageCms.PyCMSError, TypeError, ValueError):
        return None


def _is_broken(data: bytes, mode: str) -> bool:
    profile = _open(data)
    if profile is None or profile.profile.xcolor_space != _SPACES[mode]:
        return True
    return not _is_srgb(data) and _transform(data, mode) is None


def _is_srgb(data: bytes) -> bool:
    """By its own name: converting would only round."""
    profile = _open(data)
    return profile is not None and "sRGB" in (profile.profile.profile_description or "")


@functools.lru_cache(maxsize=32)
def _transform(data: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None where nothing is to be done or the profile cannot be used."""
    profile = _open(data)
    if profile is None or profile.profile.xcolor_space != _SPACES[mode] or _is_srgb(data):
        return None
    try:
        return ImageCms.buildTransform(profile, _srgb(), mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC)
    except (ImageCms.PyCMSError, ValueError):
        return None


@functools.cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.createProfile("sRGB")
