"""Line drawings as a condition of the generator: conditional decoding (ControlAR, Li et al. 2024, section 3.2).

A small convolutional encoder gives one feature vector an image token, f_0 .. f_{N-1} in raster order. What stands in
the sequence where image token k is predicted is the token before it, so f_k is added there: every prediction sees the
drawing at its own place, one ahead of its input.

    input     ... BOI + f_0    image_0 + f_1    ...    image_{N-2} + f_{N-1}
    predicts      image_0      image_1          ...    image_{N-1}

The last product starts at zero, so a generator that gets an encoder is the old one until it is trained. Without a
drawing nothing is added, which training keeps usable by dropping drawings at random.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.options import MOST_SCALE

NUM_BLOCKS = 2  # residual blocks on the token grid: they see four tokens each way
GROUPS = 8


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, width), nn.GroupNorm(GROUPS, width)
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(y)))


class LineEncoder(nn.Module):
    """(B, 1, S, S) in [0, 1], white lines on black -> (B, N, D), N = (S / factor)^2"""

    def __init__(self, dim: int, factor: int, width: int) -> None:
        """factor: pixels a token, a power of two; width: channels at the token grid, a multiple of 8."""
        super().__init__()
        levels = factor.bit_length() - 1
        widths = [max(GROUPS, width >> (levels - level)) for level in range(levels + 1)]
        self.first = nn.Conv2d(1, widths[0], 3, padding=1)
        pairs = itertools.pairwise(widths)
        self.down = nn.ModuleList(nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in pairs)
        self.blocks = nn.ModuleList(ResidualBlock(widths[-1]) for _ in range(NUM_BLOCKS))
        self.out = nn.Conv2d(widths[-1], dim, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, drawings: Tensor) -> Tensor:
        x = self.first(drawings)
        for down in self.down:
            x = down(F.silu(x))
        for block in self.blocks:
            x = block(x)
        return self.out(F.silu(x)).flatten(2).transpose(1, 2)  # (B, N, D)


def require_line_config(factor: int, width: int) -> None:
    """Raises ValueError for what `LineEncoder` cannot be built of."""
    if factor < 2 or factor & (factor - 1):
        raise ValueError(f"line_factor must be a power of two from 2 on, or 0 for no drawings, not {factor}")
    if width < GROUPS or width % GROUPS:
        raise ValueError(f"line_width must be a multiple of {GROUPS}, not {width}")


@dataclass(frozen=True)
class LineControl:
    """A drawing that images follow, and how closely."""

    lines: np.ndarray
    """(S, S) uint8, white on black, S the generator's `line_size`."""
    scale: float = 1.0
    """Multiplies the drawing's features; 0 is no drawing."""
    cfg_scale: float = 1.0
    """Guidance on the drawing: how far to go from the image without it (0) through the plain one (1) beyond it."""

    def __post_init__(self) -> None:
        for name in ("scale", "cfg_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 <= value <= MOST_SCALE):
                raise ValueError(f"line {name} must lie in [0, {MOST_SCALE:.0f}], not {value}")


@dataclass(frozen=True)
class LineFeatures:
    """What the sampling loop adds to image inputs."""

    features: Tensor
    """(N, D) float32, scaled already."""
    cfg_scale: float = 1.0

    @property
    def is_guided(self) -> bool:
        return self.cfg_scale != 1.0


@torch.inference_mode()
def encode_control(encoder: LineEncoder | None, control: LineControl, device: torch.device) -> LineFeatures:
    """Features of a drawing. Raises ValueError where the generator has no encoder."""
    if encoder is None:
        raise ValueError(
            "this generator follows no drawings: train it with `python train_dalle.py --lines --init CHECKPOINT`"
        )
    drawing = to_drawing(control.lines)[None].to(device)  # (1, 1, S, S)
    weight = encoder.out.weight
    features = encoder(drawing.to(weight.dtype))[0].float() * control.scale
    return LineFeatures(features, control.cfg_scale)


def no_lines(config: Any, num_rows: int) -> Tensor | None:
    """Features of rows that follow no drawing yet, (R, N, D) float32; None for a generator that follows none."""
    return torch.zeros(num_rows, config.num_image_tokens, config.dim) if config.line_factor else None


def to_drawing(lines: np.ndarray) -> Tensor:
    """(S, S) uint8 -> (1, S, S) float32 in [0, 1]"""
    return torch.from_numpy(np.ascontiguousarray(lines)).float().div_(255)[None]
