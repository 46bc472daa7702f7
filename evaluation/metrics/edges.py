"""Does an image follow its line drawing? Edge precision, recall and F1 with a tolerance, at 128 pixels.

The image's edges are Canny's at 100 and 200, as ControlNet's annotator takes them; an edge pixel counts where a line
pixel lies within the tolerance, and the reverse for recall (the boundary matching of Martin et al. 2004, by distance
instead of by assignment).
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from common.square import resize_square
from data_tools.images.line_drawings import canny, fit_lines

SIDE = 128
TOLERANCE = 2.0  # pixels, Euclidean
INK = 127  # levels: brighter pixels of a drawing are lines


@dataclass(frozen=True)
class EdgeScore:
    """Shares in [0, 1]."""

    precision: float
    """Edge pixels of the image with a line of the drawing near them."""
    recall: float
    """Line pixels of the drawing with an edge of the image near them."""

    @property
    def f1(self) -> float:
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def edge_score(image: Image.Image, lines: np.ndarray, tolerance: float = TOLERANCE) -> EdgeScore:
    """RGB image and its drawing (H, W) uint8, white on black; both are brought to 128 pixels a side."""
    edges = canny(np.asarray(resize_square(image, SIDE))) > 0
    return match(edges, fit_lines(lines, SIDE) > INK, tolerance)


def match(edges: np.ndarray, lines: np.ndarray, tolerance: float = TOLERANCE) -> EdgeScore:
    """(H, W) bool twice. Without edges both shares are 0, unless there are no lines either: then both are 1."""
    if not edges.any() or not lines.any():
        alike = float(edges.any() == lines.any())
        return EdgeScore(alike, alike)
    near_lines, near_edges = _distance(lines) <= tolerance, _distance(edges) <= tolerance
    return EdgeScore(float(near_lines[edges].mean()), float(near_edges[lines].mean()))


def _distance(marked: np.ndarray) -> np.ndarray:
    """(H, W) bool -> (H, W) float32: Euclidean distance in pixels to the nearest marked one."""
    import cv2

    return cv2.distanceTransform((~marked).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
