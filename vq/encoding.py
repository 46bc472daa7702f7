"""Images to codes in batches, in the numbers that the machine computes fastest in; and whose codes a folder holds."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.files import read_json
from common.precision import Precision, autocast
from vq.model import ImageTokenizer

TOKENIZER_FILE = "tokenizer.json"  # beside token shards


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


def require_tokenizer(folder: Path, sha256: str) -> dict[str, Any]:
    """`tokenizer.json` of token shards. Raises ValueError when they were made by another tokenizer."""
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {TOKENIZER_FILE}: make token shards with vq.encode_shards"
        )
    made_by = read_json(path)
    if not isinstance(made_by, dict):
        raise ValueError(f"{path} is no description of token shards: encode the images again")
    if made_by.get("sha256") != sha256:
        raise ValueError(
            f"the token shards in {folder} were made by the tokenizer {str(made_by.get('sha256'))[:12]}, not by "
            f"{sha256[:12]}: encode the images again with `python -m vq.encode_shards` into another folder"
        )
    return made_by
