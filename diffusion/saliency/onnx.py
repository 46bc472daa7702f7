"""Saliency networks in ONNX files through onnxruntime, an optional package: U2-Net, ISNet and BiRefNet as published.

Each preset is a side, what the levels become, and what the output is: U2-Net (Qin et al. 2020) and ISNet (Qin et al.
2022) give saliency that is stretched to [0, 1], BiRefNet (Zheng et al. 2024) logits.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.console.terminal import first_line

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preset:
    """How a network wants its image."""

    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    by_brightest: bool
    """Levels are divided by the image's brightest one instead of 255."""
    gives_logits: bool


PRESETS: dict[str, Preset] = {
    "u2net": Preset(320, IMAGENET_MEAN, IMAGENET_STD, by_brightest=True, gives_logits=False),
    "isnet": Preset(1024, (0.5, 0.5, 0.5), (1.0, 1.0, 1.0), by_brightest=True, gives_logits=False),
    "birefnet": Preset(1024, IMAGENET_MEAN, IMAGENET_STD, by_brightest=False, gives_logits=True),
}


class OnnxSaliency:
    """`mask` of an ONNX file; see `diffusion.saliency.Saliency`."""

    def __init__(self, session: Any, preset: Preset) -> None:
        """session: an onnxruntime.InferenceSession, or anything with its `get_inputs` and `run`."""
        self.session, self.preset = session, preset
        shape = session.get_inputs()[0].shape
        if len(shape) != 4 or (isinstance(shape[1], int) and shape[1] != 3):
            raise ValueError(f"the ONNX file reads inputs of shape {shape}, not images (B, 3, H, W)")
        self.name = session.get_inputs()[0].name
        fixed = [side for side in shape[2:] if isinstance(side, int)]
        self.size = (fixed[1], fixed[0]) if len(fixed) == 2 else (preset.side, preset.side)  # (W, H)

    @classmethod
    def open(cls, path: Path, preset: str = "auto") -> "OnnxSaliency":
        """Raises FileNotFoundError, ValueError for what is no such network, ModuleNotFoundError without onnxruntime."""
        if not path.is_file():
            raise FileNotFoundError(f"no ONNX file {path}")
        chosen = preset_of(path, preset)
        try:
            import onnxruntime
        except ModuleNotFoundError:
            raise ValueError(
                "ONNX files need the optional package onnxruntime: pip install onnxruntime, or choose --method border"
            ) from None
        try:
            session = onnxruntime.InferenceSession(str(path), providers=onnxruntime.get_available_providers())
        except Exception as error:  # its own exception types share no base class
            raise ValueError(f"{path} is no readable ONNX file: {first_line(error)}") from error
        return cls(session, chosen)

    def mask(self, image: Image.Image) -> np.ndarray:
        p = self.preset
        small = image.convert("RGB").resize(self.size, Image.Resampling.LANCZOS)
        levels = np.asarray(small, np.float32)
        levels = levels / max(levels.max(), 1e-6) if p.by_brightest else levels / 255
        x = ((levels - np.float32(p.mean)) / np.float32(p.std)).transpose(2, 0, 1)[None].astype(np.float32)
        found = np.asarray(self.session.run(None, {self.name: x})[0], np.float32)  # (1, 1, h, w)
        if found.ndim < 2 or found.size != found.shape[-1] * found.shape[-2]:
            raise ValueError(f"the ONNX file gives outputs of shape {found.shape}, not one mask (1, 1, H, W)")
        found = found.reshape(found.shape[-2:])
        stretched = (found - found.min()) / max(float(np.ptp(found)), 1e-6)
        found = 1 / (1 + np.exp(-found)) if p.gives_logits else stretched
        matte = Image.fromarray(found).resize(image.size, Image.Resampling.BILINEAR)
        return np.asarray(matte, np.float32).clip(0, 1)


def preset_of(path: Path, preset: str) -> Preset:
    """By name, or by the file's name. Raises ValueError where the latter says nothing."""
    name = preset
    if preset == "auto":
        stem = path.stem.lower().replace("-", "").replace("_", "")
        aliases = {"u2net": "u2net", "silueta": "u2net", "isnet": "isnet", "birefnet": "birefnet"}
        name = next((found for alias, found in aliases.items() if alias in stem), "")
    if name not in PRESETS:
        raise ValueError(
            f"the name of {path} does not say what network it is: pass --onnx-preset {', '.join(PRESETS)}"
        )
    return PRESETS[name]
