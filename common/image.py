"""Images and tensors: the one place that knows [-1, 1], and the grids people look at."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_levels(image: Image.Image) -> Tensor:
    """RGB image -> uint8 (3, S, S): a quarter of the bytes, for the way between processes."""
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return torch.from_numpy(np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1)))


def from_levels(levels: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]"""
    return levels.float().div_(127.5).sub_(1.0)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> float32 (3, S, S) in [-1, 1]."""
    return from_levels(to_levels(image))


def to_image(tensor: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> RGB image: the exact inverse of `to_tensor`; values outside are clamped."""
    levels = ((tensor.detach().float().clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def make_grid(images: Sequence[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """Images of one size on white, row by row; `columns` None: as square as it gets."""
    if not images:
        raise ValueError("a grid needs at least one image")
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    rows = -(-len(images) // columns)
    width, height = images[0].size
    canvas = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        canvas.paste(image, ((i % columns) * (width + gap), (i // columns) * (height + gap)))
    return canvas


def stack_rows(rows: Sequence[Sequence[Image.Image]], gap: int = 2) -> Image.Image:
    """One grid of equally long rows (originals above reconstructions, a prompt a row)."""
    return make_grid([image for row in rows for image in row], columns=len(rows[0]), gap=gap)
