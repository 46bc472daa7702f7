"""Images of any shape to squares; apart from common.image, which imports PyTorch."""

from PIL import Image


def resize_square(image: Image.Image, size: int) -> Image.Image:
    """Centre crop to a square, then resize to `size` pixels (Lanczos)."""
    image = image if image.mode == "RGB" else image.convert("RGB")
    side = min(image.size)
    if image.width != image.height:
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return image if side == size else image.resize((size, size), Image.Resampling.LANCZOS)
