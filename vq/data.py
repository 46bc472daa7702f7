"""The images of stage 1: shards or a plain folder, with masks of the goods where the data has them."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from common.image import to_tensor
from common.square import resize_square
from data_tools.images.decode import DECODE_ERRORS
from data_tools.shards.holdout import open_splits
from data_tools.shards.index import ShardIndex
from data_tools.shards.loader import IMAGE_SUFFIXES, Augment, CorruptSample, DecodeImage, open_image
from data_tools.shards.remote import RemoteOptions
from vq.image_folder import ImageFolder

MASK_SUFFIX = "mask.png"


@dataclass(frozen=True)
class DecodeMasked:
    """Sample -> image (3, S, S) in [-1, 1], mask (1, S, S) in [0, 1] or all -1 where the sample has none, key.

    The mask is `{key}.mask.png`, white on the goods, and goes through the same crops and mirrors as the image.
    """

    image_size: int
    augment: Augment | None = None

    def __call__(self, index: ShardIndex, i: int, rng: np.random.Generator) -> dict[str, Any]:
        members = index.read(i, (*IMAGE_SUFFIXES, MASK_SUFFIX))
        image = open_image(next((members[s] for s in IMAGE_SUFFIXES if s in members), b""))
        if MASK_SUFFIX in members:
            image.putalpha(_open_mask(members[MASK_SUFFIX]).resize(image.size))
        if self.augment is not None:
            image = self.augment(image, rng)
        size = self.image_size
        mask = torch.full((1, size, size), -1.0)
        if image.mode == "RGBA":
            grey = image.getchannel("A").convert("RGB")
            mask = (to_tensor(resize_square(grey, size))[:1] + 1) / 2
            image = image.convert("RGB")
        return {"image": to_tensor(resize_square(image, size)), "mask": mask, "key": index.samples[i].key}


def _open_mask(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=("PNG",)).convert("L")
    except DECODE_ERRORS as error:
        raise CorruptSample(f"undecodable mask ({type(error).__name__})") from error


def open_images(
    data: str, image_folder: str, split: str, remote: RemoteOptions | None = None
) -> ShardIndex | ImageFolder:
    """The images of one split. Raises FileNotFoundError or ValueError in one sentence."""
    if image_folder:
        return ImageFolder.open(image_folder, split)
    return ShardIndex.open(data, split, remote).require(*IMAGE_SUFFIXES)


def open_train_and_val(
    data: str, image_folder: str, remote: RemoteOptions | None = None
) -> tuple[ShardIndex | ImageFolder, ShardIndex | ImageFolder]:
    """The images to train on and those to validate with, which share none. Raises as `open_images`."""
    if image_folder:
        return ImageFolder.open(image_folder, "train"), ImageFolder.open(image_folder, "val")
    train, val = open_splits(data, remote)
    return train.require(*IMAGE_SUFFIXES), val.require(*IMAGE_SUFFIXES)


def train_decoder(
    index: ShardIndex | ImageFolder, image_size: int, augment: Augment, with_masks: bool
) -> DecodeImage | DecodeMasked:
    """`with_masks`: only if the data has any."""
    if with_masks and index.has(MASK_SUFFIX):
        return DecodeMasked(image_size, augment)
    return DecodeImage(image_size, augment)


def small_images(index: ShardIndex | ImageFolder, image_size: int, look_at: int = 200) -> str:
    """A sentence about images smaller than the training size, which get enlarged and blurred; "" if there are none.

    Looks at no more than `look_at` images, evenly spread.
    """
    indices = index.spread(look_at)
    small = 0
    for i in indices:
        members = index.read(i, IMAGE_SUFFIXES)
        try:
            image = open_image(next(iter(members.values()), b""))
        except CorruptSample:
            continue
        small += min(image.size) < image_size
    if not small:
        return ""
    return (
        f"{small} of {len(indices)} images looked at are smaller than {image_size} pixels and will be enlarged: "
        "leave them out when packing (--min-side) or train smaller"
    )
