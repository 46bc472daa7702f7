"""Against closed forms, definitions written out, and torchmetrics."""

import numpy as np
import pytest
import torch

from evaluation.metrics import statistics as st


class Flat(torch.nn.Module):
    num_features = 12

    def forward(self, images):
        return images.flatten(1).float()


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


def test_wilson_interval():
    interval = st.wilson(90, 100)
    assert interval.low == pytest.approx(0.8256, abs=1e-3) and interval.high == pytest.approx(
        0.9448, abs=1e-3
    )
    with pytest.raises(ValueError):
        st.wilson(0, 0)
