import numpy as np
import pytest
import torch

from evaluation.metrics import statistics
from evaluation.metrics.distribution import Frechet
from evaluation.metrics.resampling import Resampling
from gan.validation import frechet_distance, mean_pair_distance


@pytest.mark.parametrize("shape", [(20, 5), (12, 40)], ids=["more images", "more dimensions"])
def test_the_frechet_distance_is_that_of_evaluation(shape):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=shape), rng.normal(0.5, 2.0, size=(shape[0] + 3, shape[1]))
    found = frechet_distance(torch.from_numpy(a), torch.from_numpy(b))
    same_prompt = Resampling(["text"] * len(a), 1)
    assert found == pytest.approx(Frechet(b).estimate(a, same_prompt, 1).interval.value, rel=1e-6)
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(a)) == pytest.approx(0, abs=1e-9)


def test_the_pair_distance_is_that_of_evaluation_around_a_centre():
    rng = np.random.default_rng(1)
    rows, center = rng.normal(size=(7, 4)), rng.normal(size=4)
    seen = rows - center
    expected = statistics.mean_pair_distance(seen / np.linalg.norm(seen, axis=1, keepdims=True))
    assert mean_pair_distance(torch.from_numpy(rows), torch.from_numpy(center)) == pytest.approx(expected)


def test_one_image_has_neither():
    one, two = torch.zeros(1, 3), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="at least 2 images"):
        frechet_distance(one, two)
    with pytest.raises(ValueError, match="at least 2 images"):
        mean_pair_distance(one, one[0])
