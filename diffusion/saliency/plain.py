"""Methods without weights: the flood from the border, and GrabCut (Rother et al. 2004) started from it."""

import numpy as np
from PIL import Image

from data_tools.images.border import border_matte, is_plausible

ROUNDS = 4  # of GrabCut
MARGIN = 0.03  # of the shorter side: taken for background where the flood has found no product


class Border:
    """What no flood of background-like colours from the border reaches."""

    def mask(self, image: Image.Image) -> np.ndarray:
        return border_matte(image)


class GrabCut:
    """Colour models of product and background, cut where they change: finds products on textured backgrounds too."""

    def mask(self, image: Image.Image) -> np.ndarray:
        import cv2

        pixels = np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1])
        labels = self._start(image)
        if not {cv2.GC_BGD, cv2.GC_PR_BGD} & set(np.unique(labels)) or (labels == cv2.GC_BGD).all():
            return np.ones(labels.shape, np.float32)
        models = np.zeros((1, 65)), np.zeros((1, 65))
        cv2.setRNGSeed(0)  # its colour models start from OpenCV's own generator
        cv2.grabCut(pixels, labels, None, *models, ROUNDS, cv2.GC_INIT_WITH_MASK)
        product = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.float32)
        return cv2.GaussianBlur(product, (3, 3), 0)

    def _start(self, image: Image.Image) -> np.ndarray:
        """(H, W) uint8 of GrabCut's labels: the flood as a guess, the frame alone where it found no product."""
        import cv2

        matte = border_matte(image)
        edge = max(1, round(MARGIN * min(matte.shape)))
        if min(matte.shape) <= 2 * edge:
            return np.full(matte.shape, cv2.GC_PR_FGD, np.uint8)
        labels = np.full(matte.shape, cv2.GC_PR_FGD, np.uint8)
        if is_plausible(matte):
            labels[matte < 0.5] = cv2.GC_PR_BGD
            return labels
        labels[:edge], labels[-edge:], labels[:, :edge], labels[:, -edge:] = (cv2.GC_BGD,) * 4
        return labels
