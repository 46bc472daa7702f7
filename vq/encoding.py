"""Images to codes in batches, in the numbers that the machine computes fastest in."""

import torch
from torch import Tensor

from common.precision import Precision, autocast
from vq.model import ImageTokenizer


class ImageEncoder:
    """`ImageTokenizer.encode_ids` of finished weights, on a device and in a precision."""

    def __init__(
        self, tokenizer: ImageTokenizer, device: torch.device, precision: Precision = "auto"
    ) -> None:
        self.tokenizer, self.device, self.precision = tokenizer, device, precision

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, N) long, raster order, on the device."""
        images = images.to(self.device, memory_format=torch.channels_last)
        with autocast(self.device, self.precision):
            return self.tokenizer.encode_ids(images)
