"""Colours of the synthetic goods, named by training images of known colour; what counts as goods."""

import json

import numpy as np
import pytest
from PIL import ImageFilter

from data_tools.synthetic.shards import COLORS, ensure_synthetic, render_sample
from evaluation import demo
from evaluation.metrics.pixel_colors import ColorHistogram, PixelColors, goods_mask


@pytest.fixture(scope="module")
def measured() -> PixelColors:
    samples = [render_sample(0, index) for index in range(400)]
    return PixelColors(ColorHistogram().features([s.image for s in samples]), [s.color for s in samples])


@pytest.mark.parametrize("blur", [0.0, 1.5])
def test_colours_of_held_out_images(measured, blur):
    samples = [render_sample(424_242, index) for index in range(200)]
    images = [s.image.filter(ImageFilter.GaussianBlur(blur)) if blur else s.image for s in samples]
    named = measured.named(ColorHistogram().features(images))
    right = [name == s.color for name, s in zip(named, samples, strict=True)]
    assert set(measured.colors) == set(COLORS) and np.mean(right) >= 0.97


def test_the_mask_is_what_is_not_joined_to_the_border():
    rgb = np.full((64, 64, 3), 0.9, dtype=np.float32)
    rgb[20:40, 10:50] = (0.8, 0.1, 0.1)
    rgb[25:30, 20:30] = 0.9  # a hole of the background's colour counts as goods
    mask = goods_mask(rgb)
    assert mask.sum() == 20 * 40 and mask[20:40, 10:50].all()


def test_the_demo_counts_the_colour_that_was_asked_for(tmp_path, monkeypatch):
    ensure_synthetic(tmp_path / "synthetic", num_train=150, num_val=1)
    monkeypatch.setattr(demo, "EMBEDDED", tmp_path / "synthetic")
    samples = [render_sample(77, index) for index in range(60)]
    red, blue = ([s.image for s in samples if s.color == color] for color in ("red", "blue"))
    for i, image in enumerate([*red[:3], blue[0]]):
        image.save(tmp_path / f"rank{i:02d}.png")
    for text, said in (("一件红色的连衣裙", "3 of the best 4 are 红色"), ("一件连衣裙", "no colour named")):
        (tmp_path / "images.jsonl").write_text(json.dumps({"text": text}) + "\n", "utf-8")
        assert demo.ranking_quality(tmp_path).startswith(said)
