"""Line drawings beside codes: they lie on their views, moved or drawn anew."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from common.distributed import start_world
from common.square import resize_square
from data_tools.augment import Chain, ImageAugment
from data_tools.images.crops import CropFlip
from data_tools.images.decode import encode
from data_tools.images.line_drawings import canny, decode_lines, encode_lines, extract
from data_tools.ingest.records import Record
from data_tools.shards.image_shards import ShardWriter
from data_tools.shards.index import ShardIndex
from data_tools.shards.line_views import extract_views, move_lines
from data_tools.shards.loader import CorruptSample, DecodeTokens, view_lines
from vq.autoencoder import FastConfig
from vq.encode_shards import Options, encode_shards
from vq.model import ImageTokenizer, TokenizerConfig

FAST = FastConfig(
    haar_levels=1, channels=(32, 32), encoder_blocks=(0, 1), decoder_blocks=(0, 1), attention=False
)
SIZE = 32


def photo(index: int) -> Image.Image:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).polygon([(8 + index, 10), (50, 20), (40, 56)], fill=(180, 20 + index, 40))
    return image


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lines")
    for split, count in (("train", 6), ("val", 2)):
        with ShardWriter(folder / "images", split) as writer:
            for i in range(count):
                lines = encode_lines(canny(np.asarray(photo(i))))
                image = encode(photo(i), "png")
                writer.write(Record(f"{split}{i}", image, "png", ("三角",), {}, "test", {"line.png": lines}))
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(TokenizerConfig(image_size=SIZE, fast=FAST, codebook_size=16, codebook_dim=4))
    return folder, tokenizer


def encoded(made, target, **options) -> ShardIndex:
    folder, tokenizer = made
    settings = Options("", str(folder / "images"), target, views=3, check=0, **options)
    encode_shards(tokenizer, settings, start_world("cpu"))
    return ShardIndex.open(target, "train")


def test_each_view_has_the_drawing_of_its_own_pixels(made, tmp_path):
    index = encoded(made, tmp_path / "mixed", lines="mixed")
    lines = decode_lines(index.read(0)["line.png"])
    assert lines.shape == (3 * SIZE, SIZE)
    plain = resize_square(photo(0), SIZE)
    assert np.array_equal(lines[:SIZE], canny(np.asarray(plain)))
    moved = CropFlip()(photo(0), np.random.default_rng([1, *b"train0"]))
    assert np.array_equal(lines[SIZE : 2 * SIZE], extract(resize_square(moved, SIZE), "xdog"))
    batch = DecodeTokens(lines=True)(index, 0, np.random.default_rng(0))
    assert batch["line"].shape == (1, SIZE, SIZE) and batch["line"].dtype == torch.uint8


def test_given_drawings_move_with_their_images(made, tmp_path):
    move = ImageAugment(shift=0.1, rotate=10, brightness=0.3)
    index = encoded(made, tmp_path / "given", lines="given", move=move)
    lines = decode_lines(index.read(1)["line.png"])
    for view in (1, 2):
        rng = np.random.default_rng([view, *b"train1"])
        image = resize_square(Chain((move, CropFlip()))(photo(1), rng), SIZE)
        edges = canny(np.asarray(image)) > 0
        found = lines[view * SIZE : (view + 1) * SIZE] > 100
        y, x = np.nonzero(found)
        near = [edges[max(0, b - 1) : b + 2, max(0, a - 1) : a + 2].any() for b, a in zip(y, x, strict=True)]
        assert len(near) > 20 and np.mean(near) > 0.9


def test_without_lines_shards_are_the_old_ones(made, tmp_path):
    index = encoded(made, tmp_path / "none")
    assert set(index.samples[0].members) == {"ids.npy", "txt", "json"}
    assert "lines" not in (tmp_path / "none/tokenizer.json").read_text()
    with pytest.raises(ValueError, match="--lines none, not canny"):
        encoded(made, tmp_path / "none", lines="canny")
    with pytest.raises(CorruptSample, match=r"line\.png"):
        DecodeTokens(lines=True)(index, 0, np.random.default_rng(0))


def test_lines_of_another_shape_are_corrupt():
    with pytest.raises(CorruptSample, match="not 2 squares"):
        view_lines({"line.png": encode_lines(np.zeros((24, 8), np.uint8))}, 0, 2)


def test_views_of_one_method_and_a_drawing_at_another_size():
    views = [photo(0), photo(1)]
    drawn = extract_views("contour", views)
    assert np.array_equal(drawn[64:], extract(photo(1), "contour"))
    lines = canny(np.asarray(photo(0).resize((128, 128))))
    assert move_lines(lines, (64, 64), CropFlip(), iter(()), 32).shape == (32, 32)
