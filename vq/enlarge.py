"""A tokenizer of images of S pixels -> one of 2 S pixels with the same codes, whose decoder is then trained.

    python -m vq.enlarge pretrained/goods-128/generator/image_tokenizer runs/goods_256_start
    python train_vqgan.py --config configs/goods_256/vqgan_decoder.yaml      # --init runs/goods_256_start

One more level of the Haar transform stands before the first and after the last convolution. The encoder reads the new
coarse bands alone, so it gives an image the codes of its 2x2 means: token shards and generators stay valid, and so does
the number of codes an image. The decoder writes zeros into the new fine bands until it is trained (`--freeze-codes`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from common.config import command, parse_options
from common.log import say
from common.outputs.record import new_directory, require_new
from vq.autoencoder import coarse_bands
from vq.model import ImageTokenizer


@dataclass(frozen=True)
class Options:
    """Twice the side, the same codes."""

    source: Annotated[str, tyro.conf.Positional]
    """Image tokenizer of the fast architecture: a checkpoint, a run directory or a hub id."""
    target: Annotated[Path, tyro.conf.Positional]
    """Directory to write."""


def enlarged(tokenizer: ImageTokenizer) -> ImageTokenizer:
    """Twice the image size: `encode_ids` is that of 2x2 means, `decode_ids` repeats each pixel 2x2 times.

    Raises ValueError for an architecture other than fast.
    """
    config = tokenizer.config
    if config.architecture != "fast":
        raise ValueError(
            f"only tokenizers of the fast architecture can be enlarged, not of {config.architecture}"
        )
    levels = config.fast.haar_levels + 1
    larger = replace(config, image_size=2 * config.image_size, fast=replace(config.fast, haar_levels=levels))
    result = ImageTokenizer(larger)
    weights, bands = tokenizer.state_dict(), coarse_bands(levels)
    # A coarse band of the large image is twice the band of its 2x2 means (the transform is orthonormal).
    taken = weights["encoder.conv_in.weight"]
    weights["encoder.conv_in.weight"] = _spread(taken / 2, bands, dim=1)
    for name in ("decoder.conv_out.weight", "decoder.conv_out.bias"):
        weights[name] = _spread(weights[name] * 2, bands, dim=0)
    result.load_state_dict(weights)
    return result.eval()


def _spread(weight: Tensor, bands: Tensor, dim: int) -> Tensor:
    """Zeros but for the coarse bands along `dim`, which is four times as long."""
    shape = list(weight.shape)
    shape[dim] *= 4
    return torch.zeros(shape, dtype=weight.dtype).index_copy_(dim, bands, weight)


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, argv, description=__doc__)
    require_new(options.target)
    result = enlarged(ImageTokenizer.from_pretrained(options.source))
    with new_directory(options.target) as directory:
        result.write(directory, 0)
    config = result.config
    say(f"{options.target}: {config.image_size} px, {config.grid_size**2} codes {result.codes_sha256[:12]}")


if __name__ == "__main__":
    main()
