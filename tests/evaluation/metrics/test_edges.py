"""Edge scores by hand."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_tools.images.line_drawings import canny
from evaluation.metrics.edges import EdgeScore, edge_score, match


def column(x: int, length: int = 20, size: int = 32) -> np.ndarray:
    marked = np.zeros((size, size), bool)
    marked[4 : 4 + length, x] = True
    return marked


@pytest.mark.parametrize(("shift", "expected"), [(0, 1.0), (1, 1.0), (2, 1.0), (3, 0.0)])
def test_the_tolerance_is_two_pixels(shift, expected):
    assert match(column(10), column(10 + shift)) == EdgeScore(expected, expected)


def test_precision_and_recall_of_a_half():
    # 20 pixels of lines; edges cover rows 4..13 of it, and 10 more pixels far away
    edges = column(10, 10) | column(25, 10)
    found = match(edges, column(10))
    assert found.precision == 0.5
    assert found.recall == 12 / 20  # rows 4..13, and two below within the tolerance
    assert found.f1 == pytest.approx(2 * 0.5 * 0.6 / 1.1)


def test_diagonal_distances_are_euclidean():
    first, second = np.zeros((9, 9), bool), np.zeros((9, 9), bool)
    first[4, 4] = second[6, 5] = True  # sqrt(5) apart
    assert match(first, second).f1 == 0 and match(first, second, tolerance=2.24).f1 == 1


def test_empty_sides():
    nothing = np.zeros((8, 8), bool)
    assert match(nothing, column(4, 4, 8)).f1 == 0 and match(column(4, 4, 8), nothing).f1 == 0
    assert match(nothing, nothing).f1 == 1


def test_an_image_against_its_own_canny_and_another_drawing():
    image = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(image).rectangle((30, 40, 90, 100), fill=(20, 40, 160))
    lines = canny(np.asarray(image))
    assert edge_score(image, lines).f1 == 1
    other = np.zeros((128, 128), np.uint8)
    other[5, :] = 255
    assert edge_score(image, other).f1 == 0


def test_sizes_need_not_agree():
    image = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(image).rectangle((60, 80, 180, 200), fill=(20, 40, 160))
    assert edge_score(image, canny(np.asarray(image))).f1 > 0.95
