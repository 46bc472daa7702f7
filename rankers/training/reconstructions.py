"""Training images as a generator shows them: some are replaced by what an image tokenizer makes of them.

A ranker that has seen photographs alone is asked about images which a decoder made, and judges their blur and their
lost print instead of what they show. Reconstructions have the same losses, and known captions.
"""

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from common.image import to_image, to_tensor
from common.precision import Precision, autocast
from common.square import resize_square
from rankers.training.growing import at_size
from vq.model import ImageTokenizer

CHUNK = 32  # images at once outside of training


@dataclass(frozen=True)
class ReconstructionConfig:
    """Reconstructions among the training images."""

    tokenizer: str = ""
    """Image tokenizer that makes them: checkpoint or run directory, or hub id; empty: none are made."""
    share: float = 0.5
    """Share of training images that are replaced by their reconstructions."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"reconstructions.share must lie in (0, 1], not {self.share}")
        if not self.tokenizer and self.share != 0.5:
            raise ValueError("reconstructions.share has no effect without --reconstructions.tokenizer")


class Reconstructions:
    """Makes them, the same ones for the same seed."""

    def __init__(self, config: ReconstructionConfig, device: torch.device, precision: Precision) -> None:
        """Raises FileNotFoundError or ValueError where there is no such tokenizer."""
        self.share, self.device, self.precision = config.share, device, precision
        self.tokenizer = ImageTokenizer.from_pretrained(config.tokenizer, device).requires_grad_(False)
        self.image_size = self.tokenizer.image_size
        self.identity = f"{self.tokenizer.sha256} {self.share:g}"

    def some_of(self, images: Tensor, seed: int) -> Tensor:
        """(B, 3, S, S) in [-1, 1] -> the same, a share of the rows replaced."""
        chosen = torch.rand(len(images), generator=torch.Generator().manual_seed(seed)) < self.share
        if not chosen.any():
            return images
        result = images.clone()
        result[chosen] = self.of(images[chosen])
        return result

    @torch.no_grad()
    def of(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) in [-1, 1] -> what is left of them at the tokenizer's size, at their own size again."""
        with autocast(self.device, self.precision):
            decoded, _ = self.tokenizer(at_size(images, self.image_size))
        return at_size(decoded.float().clamp(-1, 1), images.shape[-1])

    def of_images(self, images: list[Image.Image]) -> list[Image.Image]:
        """Square reconstructions of the tokenizer's size."""
        found = []
        for start in range(0, len(images), CHUNK):
            part = [to_tensor(resize_square(i, self.image_size)) for i in images[start : start + CHUNK]]
            found += [to_image(image) for image in self.of(torch.stack(part).to(self.device))]
        return found
