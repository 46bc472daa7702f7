"""Intervals over prompts: they cover what they should, pair between systems, equal the plain statistics."""

import numpy as np
import pytest
import torch
from plain_statistics import frechet_distance, kernel_distance, manifold

from evaluation.metrics import statistics as st
from evaluation.metrics.distribution import (
    Frechet,
    diversity_values,
    inception_estimate,
    kernel_estimate,
    manifold_estimates,
)
from evaluation.metrics.resampling import Resampling, difference, interval_of, mean_estimate, set_estimate


def texts_of(count: int, each: int = 1) -> list[str]:
    return [f"text {i // each}" for i in range(count)]


def features(count: int, dim: int = 5, shift: float = 0.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dim)) + shift


def test_a_drawing_takes_all_images_of_a_prompt():
    resampling = Resampling(texts_of(12, 3), replicates=50)
    weights = resampling.weights()
    assert weights.shape == (50, 12)
    assert (weights.reshape(50, 4, 3) == weights.reshape(50, 4, 3)[:, :, :1]).all()
    np.testing.assert_array_equal(weights.sum(1), 12)


def test_drawings_depend_on_the_set_of_prompts_alone():
    one = Resampling(["a", "b", "c"], 20)
    other = Resampling(["c", "a", "b", "b"], 20)
    np.testing.assert_array_equal(one.weights()[:, [2, 0, 1]], other.weights()[:, :3])


def test_one_prompt_draws_images():
    resampling = Resampling(["a"] * 6, 30)
    assert resampling.unit == "images" and len(np.unique(resampling.weights())) > 2


def test_the_mean_has_the_interval_of_its_prompts():
    """Images of a prompt that are all alike say no more than one image."""
    rng = np.random.default_rng(1)
    per_prompt = rng.normal(size=40)
    single = mean_estimate(per_prompt, Resampling(texts_of(40), 2000))
    tripled = mean_estimate(np.repeat(per_prompt, 3), Resampling(texts_of(120, 3), 2000))
    assert tripled.interval.value == pytest.approx(single.interval.value)
    wide = [e.interval.high - e.interval.low for e in (single, tripled)]
    assert wide[1] == pytest.approx(wide[0], rel=0.1)
    rng = np.random.default_rng(5)
    means = [per_prompt[rng.integers(0, 40, 40)].mean() for _ in range(2000)]
    assert single.interval.low == pytest.approx(np.quantile(means, 0.025), abs=0.03)
    assert single.by_prompt["text 3"] == pytest.approx(per_prompt[3]) and len(single.by_prompt) == 40


def test_the_interval_covers_the_mean():
    covered = 0
    for seed in range(60):
        values = np.random.default_rng(seed).normal(3, 1, 50)
        interval = mean_estimate(values, Resampling(texts_of(50), 300, seed)).interval
        covered += interval.low <= 3 <= interval.high
    assert covered >= 50


def test_unknown_values_are_left_out_and_counted():
    estimate = mean_estimate(np.array([1.0, np.nan, 3.0, np.nan]), Resampling(texts_of(4), 100))
    assert (
        estimate.interval.value == 2
        and estimate.count == 2
        and set(estimate.by_prompt) == {"text 0", "text 2"}
    )
    assert mean_estimate(np.full(3, np.nan), Resampling(texts_of(3), 100)) is None


def test_a_share_of_nothing_or_all_has_an_interval_of_its_own():
    none = mean_estimate(np.zeros(40), Resampling(texts_of(40), 100), is_share=True).interval
    assert none.value == none.low == 0 and none.high == pytest.approx(st.wilson(0, 40).high)
    some = mean_estimate(np.arange(40) < 1.0, Resampling(texts_of(40), 500), is_share=True).interval
    assert 0 <= some.low <= some.value <= some.high <= 1


def test_a_biased_statistic_keeps_its_value_inside_the_interval():
    """The largest value of a drawing is never larger than that of the set."""
    values = np.arange(30.0)
    estimate = set_estimate(lambda w: float(values[w > 0].max()), Resampling(texts_of(30), 400), 400)
    assert estimate.interval.low < 29 == estimate.interval.value <= estimate.interval.high


def test_a_paired_difference_is_narrower_than_two_intervals():
    rng = np.random.default_rng(2)
    hard = rng.normal(size=60)
    resampling = Resampling(texts_of(60), 1000)
    a, b = (mean_estimate(hard + shift + 0.1 * rng.normal(size=60), resampling) for shift in (0.0, 0.3))
    found = difference(b.interval.value, b.replicates, a.interval.value, a.replicates)
    assert 0.2 < found.low < found.value < found.high < 0.4
    assert found.high - found.low < 0.3 * (a.interval.high - a.interval.low)
    with pytest.raises(ValueError, match="do not pair"):
        difference(0.0, a.replicates, 0.0, a.replicates[:5])


def test_unknown_ends_stay_unknown():
    interval = interval_of(1.0, np.array([np.nan, np.nan]))
    assert interval.value == 1 and np.isnan(interval.low) and np.isnan(interval.high)
    with pytest.raises(ValueError, match="no images"):
        Resampling([])


@pytest.mark.parametrize(("count", "dim"), [(30, 5), (8, 40), (50, 50)])
def test_frechet_equals_the_plain_formula_at_any_rank(count, dim):
    fake, real = features(count, dim, 0.5), features(20, dim, seed=3)
    estimate = Frechet(real).estimate(fake, Resampling(texts_of(count), 30), 30)
    assert estimate.interval.value == pytest.approx(frechet_distance(fake, real), rel=1e-6)
    assert estimate.interval.low <= estimate.interval.value <= estimate.interval.high


def test_frechet_of_known_gaussians():
    """Diagonal covariances: sum of (m - n)^2 + (s - t)^2 with standard deviations s, t."""
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(40_000, 2)), rng.normal(size=(40_000, 2)) * [2, 3] + [1, 2]
    estimate = Frechet(real).estimate(fake, Resampling(texts_of(40_000), 2), 2)
    assert estimate.interval.value == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 1) ** 2, rel=0.03)


class Flat(torch.nn.Module):
    num_features = 12

    def forward(self, images):
        return images.flatten(1).float()


def test_frechet_and_kid_equal_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    torch.manual_seed(0)
    real, fake = torch.rand(60, 3, 2, 2), torch.rand(60, 3, 2, 2) ** 2
    fid = FrechetInceptionDistance(feature=Flat(), normalize=True)
    kid = KernelInceptionDistance(feature=Flat(), subset_size=60, subsets=1, normalize=True)
    for metric in (fid, kid):
        metric.update(real, real=True)
        metric.update(fake, real=False)
    rows = [images.flatten(1).numpy() for images in (real, fake)]
    resampling = Resampling(texts_of(60), 20)
    found = Frechet(rows[0]).estimate(rows[1], resampling, 2).interval.value
    assert found == pytest.approx(float(fid.compute()), rel=1e-3)
    found = kernel_estimate(rows[1], rows[0], resampling).interval.value
    assert found == pytest.approx(float(kid.compute()[0]), rel=1e-3)


def test_weights_count_like_copies():
    fake, real = features(9, 4, 0.3), features(30, 4, seed=5)
    resampling = Resampling(texts_of(9), 40)
    copies = [np.repeat(fake, weights.astype(int), axis=0) for weights in resampling.weights()]
    drawn = Frechet(real).estimate(fake, resampling, 40).replicates
    np.testing.assert_allclose(drawn, [frechet_distance(rows, real) for rows in copies], rtol=1e-6)
    probabilities = np.exp(fake) / np.exp(fake).sum(1, keepdims=True)
    drawn = inception_estimate(probabilities, resampling).replicates
    parts = [np.repeat(probabilities, w.astype(int), axis=0) for w in resampling.weights()]
    np.testing.assert_allclose(drawn, [st.inception_score(rows, 1).value for rows in parts])


def test_kernel_distance_equals_its_definition_and_pairs_no_image_with_itself():
    fake, real = features(520, 3, 0.4), features(20, 3, seed=6)  # more than a block of rows
    resampling = Resampling(texts_of(520), 60)
    estimate = kernel_estimate(fake, real, resampling)
    assert estimate.interval.value == pytest.approx(kernel_distance(fake, real))
    assert estimate.replicates.mean() == pytest.approx(
        estimate.interval.value, abs=3 * estimate.replicates.std() / 60**0.5
    )


def test_manifold_of_equal_and_of_distant_sets():
    points = np.random.default_rng(0).normal(size=(80, 4))

    def values(fake):
        found = manifold_estimates(fake, points, Resampling(texts_of(len(fake)), 20))
        return {name: estimate.interval.value for name, estimate in found.items()}

    same = values(points.copy())
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    assert set(values(points + 100).values()) == {0}
    half = values(np.concatenate([points[:40], points[40:] + 100]))
    assert (
        half["precision"] == pytest.approx(0.5) and half["coverage"] > 0.9
    )  # a ball of 5 holds one of the half


def test_manifold_equals_the_plain_one():
    fake, real = features(60, 3, 0.5), features(50, 3, seed=7)
    found, plain = manifold_estimates(fake, real, Resampling(texts_of(60), 100)), manifold(real, fake)
    for name, estimate in found.items():
        assert estimate.interval.value == pytest.approx(plain[name]), name
        assert estimate.interval.low <= estimate.interval.value <= estimate.interval.high, name


@pytest.mark.parametrize("count", [1, 3])
def test_too_few_images_are_named(count):
    rows, real = features(count), features(10)
    resampling = Resampling(texts_of(count), 20)
    with pytest.raises(ValueError, match="more than 5 images a side"):
        manifold_estimates(rows, real, resampling)
    if count == 1:
        for call in (lambda: Frechet(real).estimate(rows, resampling, 20), lambda: Frechet(rows)):
            with pytest.raises(ValueError, match="at least 2"):
                call()
        with pytest.raises(ValueError, match="at least 2"):
            kernel_estimate(rows, real, resampling)


def test_diversity_is_within_prompts():
    rows = np.array([[1.0, 0], [0, 1], [1, 0], [1, 0], [0, 2]])
    values = diversity_values(rows, ["a", "a", "b", "b", "c"])
    np.testing.assert_allclose(values, [1, 1, 0, 0, np.nan], atol=1e-12)
