"""Against closed forms, definitions written out, and torchmetrics."""

import numpy as np
import pytest
import torch

from evaluation import statistics as st


def test_frechet_distance_of_known_gaussians():
    # Diagonal covariances: sum of (m - n)^2 + (s - t)^2 with standard deviations s, t.
    distance = st.frechet_distance(np.array([1.0, 2.0]), np.diag([4.0, 9.0]), np.array([0.0, 0.0]), np.eye(2))
    assert distance == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 1) ** 2)
    rng = np.random.default_rng(0)
    a = rng.normal(size=(6, 6))
    cov = a @ a.T
    assert st.frechet_distance(np.zeros(6), cov, np.zeros(6), cov) == pytest.approx(0, abs=1e-6)
    assert st.frechet_distance(np.zeros(6), cov, np.zeros(6), 4 * cov) == pytest.approx(
        np.trace(cov), rel=1e-6
    )


class Flat(torch.nn.Module):
    num_features = 12

    def forward(self, images):
        return images.flatten(1).float()


def test_frechet_and_kid_equal_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    torch.manual_seed(0)
    a = torch.rand(60, 3, 2, 2)
    b = torch.rand(60, 3, 2, 2) ** 2
    fid = FrechetInceptionDistance(feature=Flat(), normalize=True)
    fid.update(a, real=True)
    fid.update(b, real=False)
    ours = st.frechet_from_features(a.flatten(1).numpy(), b.flatten(1).numpy())
    assert ours == pytest.approx(float(fid.compute()), rel=1e-3)
    kid = KernelInceptionDistance(feature=Flat(), subset_size=60, subsets=1, normalize=True)
    kid.update(a, real=True)
    kid.update(b, real=False)
    ours = st.kernel_distance(a.flatten(1).numpy(), b.flatten(1).numpy(), 60, 1)
    assert ours.value == pytest.approx(float(kid.compute()[0]), rel=1e-3)


def test_kid_against_its_definition():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(5, 3)), rng.normal(size=(7, 3)) + 1

    def k(x, y):
        return (x @ y / 3 + 1) ** 3

    own_a = np.mean([k(a[i], a[j]) for i in range(5) for j in range(5) if i != j])
    own_b = np.mean([k(b[i], b[j]) for i in range(7) for j in range(7) if i != j])
    cross = np.mean([k(x, y) for x in a for y in b])
    assert st.polynomial_mmd(a, b) == pytest.approx(own_a + own_b - 2 * cross)


def test_inception_score_of_known_distributions():
    certain = np.eye(5)[np.arange(100) % 5]
    assert st.inception_score(certain, splits=1).value == pytest.approx(5, rel=1e-6)
    assert st.inception_score(np.full((50, 4), 0.25)).value == pytest.approx(1)


def test_inception_score_equals_torchmetrics():
    from torchmetrics.image.inception import InceptionScore

    torch.manual_seed(0)
    images = torch.rand(40, 3, 2, 2) * 4
    metric = InceptionScore(feature=Flat(), splits=1)  # the module gets the values as they are
    metric.update(images)
    probabilities = images.flatten(1).softmax(1).numpy()
    assert st.inception_score(probabilities, 1).value == pytest.approx(float(metric.compute()[0]), rel=1e-4)


def test_manifold_of_equal_and_of_distant_sets():
    points = np.random.default_rng(0).normal(size=(80, 4))
    same = st.manifold(points, points.copy())
    assert same.precision == same.recall == same.coverage == 1
    far = st.manifold(points, points + 100)
    assert far.precision == far.recall == far.density == far.coverage == 0
    half = st.manifold(points, np.concatenate([points[:40], points[40:] + 100]))
    assert (
        half.precision == pytest.approx(0.5) and half.coverage > 0.9
    )  # a ball of 5 holds one of the kept half
    with pytest.raises(ValueError, match="k 5"):
        st.manifold(points[:5], points)


def test_r_precision_of_constructed_features():
    similarity = np.eye(10)
    own = np.arange(10)
    assert st.r_precision_all(similarity, own, 1).mean() == 1
    assert st.r_precision_sampled(similarity, own, 5).mean() == 1
    shifted = np.roll(own, 1)
    assert st.r_precision_all(similarity, shifted, 1).mean() == 0
    flat = np.zeros((10, 10))  # ties give nothing away for free
    assert st.r_precision_all(flat, own, 5).mean() == 0
    assert st.r_precision_sampled(flat, own).mean() == 0
    ranked = np.tile(np.arange(10, 0, -1.0), (10, 1))
    assert st.r_precision_all(ranked, own, 5).tolist() == [1] * 5 + [0] * 5


def test_r_precision_by_chance_is_one_in_hundred():
    similarity = np.random.default_rng(0).normal(size=(4000, 200))
    hits = st.r_precision_sampled(similarity, np.zeros(4000, int), 100)
    assert 0.006 < hits.mean() < 0.015


def test_diversity():
    assert st.mean_pair_distance(np.eye(4)) == pytest.approx(1)
    assert st.mean_pair_distance(np.tile([[1.0, 0.0]], (3, 1))) == pytest.approx(0)


def test_bootstrap_covers_the_mean():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(60):
        interval = st.bootstrap_mean(rng.normal(3, 1, 50), draws=300, seed=seed)
        covered += interval.low <= 3 <= interval.high
    assert covered >= 50


def test_wilson_interval():
    interval = st.wilson(90, 100)
    assert interval.low == pytest.approx(0.8256, abs=1e-3) and interval.high == pytest.approx(
        0.9448, abs=1e-3
    )
    with pytest.raises(ValueError):
        st.wilson(0, 0)
