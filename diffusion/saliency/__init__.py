"""Where the product is: one interface for methods with and without weights.

saliency = open_saliency("border")                        # no weights
saliency = open_saliency("poolnet", Path("final.pth"))    # published weights
matte = saliency.mask(image)                              # (H, W) float32 in [0, 1]
"""

from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image

SaliencyName = Literal["border", "grabcut", "poolnet", "onnx"]
OnnxPreset = Literal["auto", "u2net", "isnet", "birefnet"]
"""What an ONNX file holds (onnx.py)."""


class Saliency(Protocol):
    """A method that finds the product in an image."""

    def mask(self, image: Image.Image) -> np.ndarray:
        """RGB image (W, H) -> (H, W) float32 in [0, 1], the share of each pixel that is product."""


def open_saliency(
    name: SaliencyName, weights: Path | None = None, preset: OnnxPreset = "auto", device: str = "cpu"
) -> Saliency:
    """The method called `name`. Raises FileNotFoundError or ValueError for weights that are missing, of another
    architecture or given to a method without any; ModuleNotFoundError where an optional package is not installed."""
    if name in ("border", "grabcut") and weights is not None:
        raise ValueError(f"the method {name} has no weights: leave {weights} out, or choose poolnet or onnx")
    if name in ("poolnet", "onnx") and weights is None:
        raise ValueError(f"the method {name} needs a file of weights: name one with --weights FILE")
    if name == "border":
        from diffusion.saliency.plain import Border

        return Border()
    if name == "grabcut":
        from diffusion.saliency.plain import GrabCut

        return GrabCut()
    if name == "poolnet":
        from diffusion.saliency.poolnet import PoolNetSaliency

        return PoolNetSaliency.open(weights, device)
    if name == "onnx":
        from diffusion.saliency.onnx import OnnxSaliency

        return OnnxSaliency.open(weights, preset)
    raise ValueError(f"unknown method {name!r}: choose border, grabcut, poolnet or onnx")
