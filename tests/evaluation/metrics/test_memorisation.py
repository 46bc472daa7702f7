"""Nearest training images: found whatever was done to a copy, and the threshold means what it says."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter
from tiny_goods import COLORS, KINDS, draw

from evaluation.metrics.features import PerceptualHash
from evaluation.metrics.memorisation import nearest_by_cosine, nearest_by_hash, nearest_training

HASHES = PerceptualHash()


def photo(seed: int) -> Image.Image:
    """Smooth noise: as different from one another as photographs are."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 7, 3), np.uint8))
    return small.resize((64, 64), Image.Resampling.BICUBIC)


def test_nearest_by_cosine_equals_all_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(20, 6)), rng.normal(size=(50, 6))
    similarity = (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (
        b / np.linalg.norm(b, axis=1, keepdims=True)
    ).T
    distances, rows = nearest_by_cosine(a, b)
    np.testing.assert_array_equal(rows, similarity.argmax(1))
    np.testing.assert_allclose(distances, 1 - similarity.max(1), atol=1e-6)
    assert nearest_by_cosine(b, b * 3)[0].max() < 1e-6


def test_nearest_by_hash_counts_bits_and_lets_colour_decide():
    grey = photo(1).convert("L")
    training = [Image.merge("RGB", [grey, grey, grey]), photo(2)]
    tinted = Image.merge("RGB", [grey, grey.point(lambda v: v * 0.99), grey])
    rows = HASHES.features([*training, tinted])
    distances, nearest = nearest_by_hash(rows[2:], rows[:2])
    bits = int((rows[2, :64] != rows[0, :64]).sum())
    assert nearest.tolist() == [0] and bits <= distances[0] < bits + 1
    twins = HASHES.features([draw("杯子", color, 3) for color in COLORS])
    _, nearest = nearest_by_hash(twins, twins)
    assert nearest.tolist() == [0, 1, 2, 3]  # equal outlines, told apart by colour


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image,
        lambda image: image.filter(ImageFilter.GaussianBlur(1.0)),
        lambda image: image.resize((48, 48)).resize((64, 64)),
        lambda image: ImageEnhance.Brightness(image).enhance(1.1),
        lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    ],
)
def test_a_copy_is_found_and_counts_as_one(change):
    training = [photo(i) for i in range(40)]
    validation = [photo(1000 + i) for i in range(200)]
    copies, fresh = [change(training[i]) for i in (3, 17)], [photo(5000 + i) for i in range(20)]

    def views(images):
        mirrored = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images]
        return HASHES.features(images), HASHES.features(mirrored)

    found = nearest_training(
        "hash", nearest_by_hash, views([*copies, *fresh]), views(validation), HASHES.features(training)
    )
    assert found.rows[:2].tolist() == [3, 17] and found.copies[:2].tolist() == [1, 1]
    assert found.copies[2:].mean() <= 0.1 and found.distances[:2].max() < found.real_mean
    closest = found.closest(5)
    assert {closest[0].sample, closest[1].sample} == {0, 1} and closest[0].distance <= closest[1].distance


def test_the_threshold_lets_its_share_of_real_images_pass():
    rng = np.random.default_rng(4)
    training, validation, samples = (
        rng.normal(size=(200, 3)),
        rng.normal(size=(500, 3)),
        rng.normal(size=(4000, 3)),
    )
    found = nearest_training("x", nearest_by_cosine, (samples,), (validation,), training, 0.05)
    assert 0.02 < found.copies.mean() < 0.09
    with pytest.raises(ValueError, match="quantile"):
        nearest_training("x", nearest_by_cosine, (samples,), (validation,), training, 0)


def test_every_training_image_is_shown_once():
    training = np.eye(3)
    samples = np.array([[1, 0, 0], [1, 0.1, 0], [0, 1, 0.2], [0, 0.3, 1]], float)
    found = nearest_training("x", nearest_by_cosine, (samples,), (np.ones((4, 3)),), training)
    assert [(n.sample, n.row) for n in found.closest()] == [(0, 0), (2, 1), (3, 2)]
    assert len(found.closest(1)) == 1


def test_the_hash_keeps_bits_and_grid():
    rows = HASHES.features([draw(kind, "红色", 1) for kind in KINDS])
    assert rows.shape == (3, 112) and set(np.unique(rows[:, :64])) == {0.0, 1.0}
    assert rows[:, 64:].min() >= 0 and rows[:, 64:].max() <= 1
