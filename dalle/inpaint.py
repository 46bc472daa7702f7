"""Starting from an image: keep its upper rows, redraw what a mask covers, make variations, or keep its background.

All of them keep some of the image's tokens and sample the others in raster order, so a new token is sampled to fit what
stands above it and to its left. It cannot know what is kept below or to its right: a hole is filled well where its
upper and left borders say what belongs there, and can end in a seam at its lower and right borders. What is kept goes
through the image tokenizer and loses what any reconstruction loses.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common.image import to_tensor
from common.square import resize_square
from dalle.sampling import Canvas
from data_tools.images.border import border_matte, is_plausible
from vq.model import ImageTokenizer

LEAST_COVER = 0.1  # of a pixel of a token: what the product covers less is background
BLOB = 4  # token cells across: variations change patches of about this size rather than single cells


@dataclass(frozen=True)
class Source:
    """An image as tokens, and which of them new images keep."""

    ids: Tensor  # (N,) long
    keep: Tensor | None  # (N,) bool, the same for every image; None: chosen anew for each
    strength: float = 1.0  # share of tokens that is redrawn where `keep` is None

    def canvas(self, generators: Sequence[torch.Generator], device: torch.device) -> Canvas:
        """One row a generator; random choices are the generators' first draws."""
        ids = self.ids.expand(len(generators), -1).to(device)
        if self.keep is None:
            keep = torch.stack([scattered(len(self.ids), self.strength, g) for g in generators])
            return Canvas(ids, keep.to(device))
        prefix_len = int(self.keep.long().cumprod(0).sum())
        return Canvas(
            ids, self.keep.expand(len(generators), -1).to(device), min(prefix_len, len(self.ids) - 1)
        )


def encode_image(tokenizer: ImageTokenizer, image: Image.Image) -> Tensor:
    """Cropped to a square, scaled to the tokenizer's side: (N,) long."""
    device = next(tokenizer.parameters()).device
    pixels = to_tensor(resize_square(image, tokenizer.image_size))
    return tokenizer.encode_ids(pixels[None].to(device))[0].cpu()


def prime(tokenizer: ImageTokenizer, image: Image.Image, keep_rows: int | None = None) -> Source:
    """Keep the upper `keep_rows` rows of tokens (None: half). Raises ValueError outside [1, grid_size - 1]."""
    side = tokenizer.grid_size
    rows = side // 2 if keep_rows is None else keep_rows
    if not 1 <= rows < side:
        raise ValueError(f"keep_rows must lie between 1 and {side - 1} (rows of image tokens), not {rows}")
    return Source(encode_image(tokenizer, image), torch.arange(side**2) < rows * side)


def inpaint(tokenizer: ImageTokenizer, image: Image.Image, mask: Image.Image) -> Source:
    """Redraw every token of which the mask covers (white) any part. Raises ValueError for an all black mask."""
    size, factor = tokenizer.image_size, tokenizer.downsample_factor
    white = np.asarray(resize_square(mask, size).convert("L")) > 127
    covered = F.max_pool2d(torch.from_numpy(white).float()[None, None], factor)[0, 0].bool()  # (h, w)
    if not covered.any():
        raise ValueError("the mask is all black: paint white what is to be redrawn")
    return Source(encode_image(tokenizer, image), ~covered.flatten())


def vary(tokenizer: ImageTokenizer, image: Image.Image, strength: float) -> Source:
    """Redraw the share `strength` of the tokens, in patches that differ for each image. Raises ValueError."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength must lie in (0, 1], not {strength}")
    return Source(encode_image(tokenizer, image), None, strength)


def keep_background(tokenizer: ImageTokenizer, image: Image.Image) -> Source | None:
    """Redraw the tokens that the product touches and keep the others; None where no plain background is found."""
    size, factor = tokenizer.image_size, tokenizer.downsample_factor
    matte = border_matte(resize_square(image, size))
    if not is_plausible(matte):
        return None
    touched = F.max_pool2d(torch.from_numpy(matte)[None, None], factor)[0, 0] > LEAST_COVER  # (h, w)
    if touched.all():
        return None
    return Source(encode_image(tokenizer, image), ~touched.flatten())


def scattered(num_tokens: int, strength: float, generator: torch.Generator) -> Tensor:
    """(N,) bool, False in smooth random patches that make up the share `strength` of a square grid."""
    side = round(num_tokens**0.5)
    coarse = torch.randn(1, 1, max(2, -(-side // BLOB)), max(2, -(-side // BLOB)), generator=generator)
    field = F.interpolate(coarse, size=(side, side), mode="bicubic")[0, 0].flatten()
    redrawn = field.topk(max(1, round(strength * num_tokens))).indices
    return torch.ones(num_tokens, dtype=torch.bool).index_fill(0, redrawn, False)
