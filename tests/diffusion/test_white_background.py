"""The composite onto white by hand-computed pixels, options of the matte, and the guard."""

from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from diffusion.white_background import Whitener, WhitenOptions, on_white, refine


@dataclass
class Fixed:
    """A saliency that always finds the same."""

    matte: np.ndarray

    def mask(self, image):
        return self.matte


def test_the_published_composite():
    image = Image.fromarray(np.full((1, 4, 3), 100, np.uint8))
    found = np.asarray(on_white(image, np.array([[0.0, 0.5, 1.0, 0.0039]])))[0, :, 0]
    half = 127 / 255  # floor(127.5) / 255
    assert found.tolist() == [255, round(half * 100 + (1 - half) * 255), 100, 255]


def test_threshold_erosion_and_feather():
    matte = np.zeros((21, 21), np.float32)
    matte[5:16, 5:16] = 0.6
    hard = refine(matte, WhitenOptions(threshold=0.5))
    assert set(np.unique(hard)) == {0.0, 1.0} and hard.sum() == 121
    assert refine(matte, WhitenOptions(threshold=0.7)).sum() == 0
    eroded = refine(matte, WhitenOptions(threshold=0.5, erode=2))
    assert eroded.sum() == 49 and eroded[7:14, 7:14].min() == 1
    feathered = refine(matte, WhitenOptions(threshold=0.5, feather=1.0))
    assert feathered[10, 10] == pytest.approx(1, abs=1e-4) and (feathered <= hard).all()
    assert 0 < feathered[10, 5] < 0.5 and feathered[10, 4] == 0
    whole = np.ones((9, 9), np.float32)
    assert refine(whole, WhitenOptions(erode=1, feather=1.0)).min() == pytest.approx(1)


@pytest.mark.parametrize(("share", "said"), [(0.01, "no product"), (0.96, "no background"), (0.5, "")])
def test_the_guard(share, said):
    matte = np.zeros((10, 100), np.float32)
    matte[:, : round(100 * share)] = 1
    image = Image.fromarray(np.full((10, 100, 3), 90, np.uint8))
    found = Whitener(saliency=Fixed(matte))(image)
    assert found.share == pytest.approx(share)
    assert found.is_white == (not said) and said in found.note
    pixels = np.asarray(found.image)
    assert (pixels == 90).all() if said else (pixels[:, 50:] == 255).all()


def test_bad_options():
    for options in ({"threshold": 1.0}, {"erode": -1}, {"feather": -0.5}):
        with pytest.raises(ValueError, match=next(iter(options))):
            WhitenOptions(**options)
