"""Images and tensors."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.image import make_grid, stack_rows, to_image, to_tensor
from common.square import resize_square


def test_to_image_inverts_to_tensor_at_every_level():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([levels, levels[::-1], levels.T], axis=2))
    tensor = to_tensor(image)
    assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32
    assert tensor.min() == -1.0 and tensor.max() == 1.0
    assert np.array_equal(np.asarray(to_image(tensor)), np.asarray(image))


def test_values_outside_are_clamped_and_alpha_is_dropped():
    assert to_image(torch.tensor([-3.0, 0.0, 3.0]).view(3, 1, 1)).getpixel((0, 0)) == (0, 128, 255)
    assert to_tensor(Image.new("RGBA", (2, 2), (255, 0, 0, 7)))[:, 0, 0].tolist() == [1.0, -1.0, -1.0]


def test_resize_square_crops_the_middle():
    image = Image.new("RGB", (30, 10), "red")
    image.paste(Image.new("RGB", (10, 10), "blue"), (10, 0))
    for size in (10, 5):
        square = resize_square(image, size)
        assert square.size == (size, size) and square.getpixel((size // 2, size // 2)) == (0, 0, 255)
    assert resize_square(image, 10).getcolors() == [(100, (0, 0, 255))]


def test_grid_places_images_row_by_row_on_white():
    colors = ["red", "green", "blue"]
    grid = make_grid([Image.new("RGB", (4, 3), c) for c in colors], columns=2, gap=2)
    assert grid.size == (10, 8)
    assert grid.getpixel((0, 0)) == (255, 0, 0) and grid.getpixel((6, 0)) == (0, 128, 0)
    assert grid.getpixel((0, 5)) == (0, 0, 255)
    assert grid.getpixel((6, 5)) == grid.getpixel((4, 0)) == (255, 255, 255)
    assert make_grid([Image.new("RGB", (4, 4))] * 5, gap=0).size == (12, 8)
    with pytest.raises(ValueError, match="at least one image"):
        make_grid([])


def test_rows_stand_under_each_other():
    rows = [[Image.new("RGB", (2, 2), c)] * 3 for c in ("red", "blue")]
    stacked = stack_rows(rows, gap=0)
    assert stacked.size == (6, 4)
    assert stacked.getpixel((5, 0)) == (255, 0, 0) and stacked.getpixel((0, 3)) == (0, 0, 255)
