"""Small shards, and tokenizers for them, that every test of training shares."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.distributed import start_world
from data_tools.ingest.records import Record
from data_tools.shards.image_shards import ShardWriter
from vq.autoencoder import FastConfig
from vq.encode_shards import Options, encode_shards
from vq.model import ImageTokenizer, TokenizerConfig

COLORS = {"红色": (200, 30, 40), "蓝色": (30, 60, 200), "绿色": (40, 160, 60), "黑色": (20, 20, 20)}
FAST = FastConfig(
    haar_levels=1, channels=(32, 32), encoder_blocks=(0, 1), decoder_blocks=(0, 1), attention=False
)


def some_image(index: int, size: int = 16) -> bytes:
    """A disc in one of the colours on light background."""
    color = list(COLORS.values())[index % len(COLORS)]
    y, x = np.mgrid[:size, :size]
    rng = np.random.default_rng(index)
    center, radius = rng.uniform(0.4, 0.6, 2) * size, rng.uniform(0.2, 0.4) * size
    pixels = np.full((size, size, 3), 235, np.uint8)
    pixels[(x - center[0]) ** 2 + (y - center[1]) ** 2 < radius**2] = color
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_image_shards(folder: Path, num_train: int = 48, num_val: int = 8) -> Path:
    for split, count, first in (("train", num_train, 0), ("val", num_val, 1000)):
        with ShardWriter(folder, split, samples_per_shard=16) as writer:
            for i in range(first, first + count):
                caption = f"一个{list(COLORS)[i % len(COLORS)]}的圆盘"
                writer.write(Record(f"{i:06d}", some_image(i), "png", (caption,), {}, "test"))
    return folder


def write_image_tokenizer(folder: Path, seed: int = 0) -> Path:
    """Untrained: codes need no beauty here. 4x4 codes of 16."""
    torch.manual_seed(seed)
    model = ImageTokenizer(TokenizerConfig(image_size=16, fast=FAST, codebook_size=16, codebook_dim=4))
    folder.mkdir(parents=True)
    model.write(folder, 0)
    return folder


def write_made(folder: Path) -> Path:
    """images/, an untrained tokenizer/ and their tokens/."""
    write_image_shards(folder / "images")
    write_image_tokenizer(folder / "tokenizer")
    write_token_shards(folder / "tokens", folder / "images", folder / "tokenizer")
    return folder


def write_token_shards(folder: Path, images: Path, tokenizer: Path) -> Path:
    options = Options(str(tokenizer), images, folder, views=2, check=0)
    encode_shards(ImageTokenizer.from_pretrained(tokenizer), options, start_world("cpu"))
    return folder
