"""Aspect buckets: nearest in log space, nothing enlarged, one bucket an image, an order that resumes exactly."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from diffusion.tuning.buckets import LEFT_OUT, BucketConfig, BucketOrder, Buckets, crop_to

SIZES = np.random.default_rng(0).integers(70, 1400, (200, 2))


def test_the_shapes_of_a_resolution():
    config = BucketConfig((512,), max_aspect=2.0, step=64)
    shapes = config.shapes(512)
    assert (512, 512) in shapes and (704, 320) not in shapes and (640, 384) in shapes and (384, 640) in shapes
    assert all(w % 64 == h % 64 == 0 and w * h <= 512 * 512 and max(w, h) <= 2 * min(w, h) for w, h in shapes)
    assert sorted((h, w) for w, h in shapes) == sorted(shapes)
    assert BucketConfig((512,), max_aspect=1.0).shapes(512) == [(s, s) for s in (512,)]


def test_the_nearest_in_log_space_by_brute_force():
    buckets = Buckets(SIZES, BucketConfig((256,), step=32))
    for (width, height), number in zip(SIZES, buckets.assign(0, 0), strict=True):
        if number == LEFT_OUT or min(width, height) < 400:
            continue
        shapes = buckets.config.shapes(256)
        distances = [abs(math.log(width / height) - math.log(w / h)) for w, h in shapes]
        chosen = buckets.shapes[number]
        assert abs(math.log(width / height) - math.log(chosen[0] / chosen[1])) == pytest.approx(
            min(distances)
        )


def test_in_log_space_an_image_and_its_quarter_turn_are_alike():
    buckets = Buckets(np.array([[1000, 700], [700, 1000]]), BucketConfig((512,)))
    a, b = (buckets.shapes[n] for n in buckets.assign(0, 0))
    assert a == b[::-1]


@pytest.mark.parametrize("resolutions", [(256,), (192, 256, 384)])
def test_nothing_is_enlarged_and_each_image_has_one_bucket(resolutions):
    buckets = Buckets(SIZES, BucketConfig(resolutions))
    for epoch in range(3):
        assigned = buckets.assign(1, epoch)
        assert assigned.shape == (len(SIZES),)
        for (width, height), number in zip(SIZES, assigned, strict=True):
            w, h = buckets.shapes[number]
            assert w <= width and h <= height and number != LEFT_OUT
    assert len(buckets.left_out) == 0


def test_several_resolutions_are_all_seen():
    buckets = Buckets(np.full((300, 2), 1000), BucketConfig((256, 384, 512)))
    counts = Counter(buckets.shapes[n] for n in buckets.assign(0, 0))
    assert set(counts) == {(256, 256), (384, 384), (512, 512)} and min(counts.values()) > 70
    assert not np.array_equal(buckets.assign(0, 0), buckets.assign(0, 1))
    assert np.array_equal(buckets.assign(0, 1), buckets.assign(0, 1))


def test_small_and_unreadable_images_are_counted():
    sizes = np.array([[512, 512], [300, 200], [40, 400], [0, 0], [600, 600]])
    buckets = Buckets(sizes, BucketConfig((512,)))
    assert buckets.left_out.tolist() == [2, 3]
    w, h = buckets.shapes[buckets.assign(0, 0)[1]]
    assert (w, h) == (256, 128)  # 300x200: of the smaller buckets the nearest in aspect that fits
    assert buckets.num_small == 2 and "smaller than 512 are not enlarged" in buckets.describe()
    assert "2 left out" in buckets.describe() and "512x512 2" in buckets.describe()


def test_every_batch_is_of_one_bucket_and_every_image_comes_once_an_epoch():
    buckets = Buckets(SIZES, BucketConfig((192, 256)))
    order = BucketOrder(buckets, seed=3, batch_size=6)
    seen = Counter()
    for epochs, samples, bucket in itertools.islice(order.batches(), 180):
        assert len(samples) == 6
        for epoch, sample in zip(epochs, samples.tolist(), strict=True):
            assert buckets.assign(3, epoch)[sample] == bucket
            seen[epoch, sample] += 1
    assert set(seen.values()) == {1}  # none is repeated within an epoch
    counts = Counter(epoch for epoch, _ in seen)
    missing = sum(len(SIZES) - counts[epoch] for epoch in range(3))
    assert missing <= 5 * len(buckets.shapes)  # those that still wait for a full batch


def test_the_walk_resumes_exactly_and_depends_on_the_seed():
    buckets = Buckets(SIZES, BucketConfig((192, 256)))
    whole = list(itertools.islice(BucketOrder(buckets, 3, 4).walk(0), 900))
    for start in (4, 200, 600):
        assert list(itertools.islice(BucketOrder(buckets, 3, 4).walk(start), 40)) == whole[start : start + 40]
    assert list(itertools.islice(BucketOrder(buckets, 4, 4).walk(0), 900)) != whole
    shapes = [shape for _, _, shape in whole]
    assert all(len(set(shapes[i : i + 4])) == 1 for i in range(0, 900, 4))
    with pytest.raises(ValueError, match="within a batch of 4"):
        next(BucketOrder(buckets, 3, 4).walk(6))


def test_the_identity_follows_the_buckets():
    identity = Buckets(SIZES, BucketConfig((256,))).identity
    assert identity == Buckets(SIZES.copy(), BucketConfig((256,))).identity
    others = [BucketConfig((192,)), BucketConfig((256,), max_aspect=1.5), BucketConfig((192, 256))]
    assert identity not in {Buckets(SIZES, config).identity for config in others}
    assert identity != Buckets(SIZES + 200, BucketConfig((256,))).identity


def test_cropping_takes_the_middle():
    image = Image.new("RGB", (300, 100), "blue")
    image.paste("red", (90, 0, 210, 100))  # Lanczos looks a little past the cut
    assert crop_to(image, (64, 64)).getcolors() == [(64 * 64, (255, 0, 0))]
    assert crop_to(image, (128, 64)).size == (128, 64)
    assert crop_to(image, (300, 100)) is image


def test_no_image_fits():
    buckets = Buckets(np.array([[30, 30]]), BucketConfig((64,)))
    with pytest.raises(ValueError, match=r"lower --buckets\.step"):
        next(BucketOrder(buckets, 0, 1).walk(0))


@pytest.mark.parametrize(
    "values", [{"resolutions": ()}, {"resolutions": (500,)}, {"max_aspect": 0.5}, {"resolutions": (64, 64)}]
)
def test_bad_options(values):
    with pytest.raises(ValueError):
        BucketConfig(**values)
