"""Weights in 16 or 8 bits, for checkpoints that are given away.

8 bits: each row of a large matrix or kernel is a whole number from -127 to 127 times a scale of the row, which costs a
weight at most 1/254 of the largest one in its row. Small tensors stay in 16 bits. `common.checkpoint` widens both to
float32 when it reads them.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Precision = Literal["int8", "float16", "bfloat16", "float32"]
SCALE = ".int8_scale"
LARGE = 2**14  # elements; norms, biases and codebooks of 8 dimensions are smaller


def compact(weights: dict[str, Tensor], precision: Precision) -> dict[str, Tensor]:
    """Floating tensors in fewer bits. Raises ValueError where a value does not fit."""
    if precision not in get_args(Precision):
        raise ValueError(f"unknown precision {precision!r}: one of {', '.join(get_args(Precision))}")
    dtype = torch.float16 if precision == "int8" else getattr(torch, precision)
    result = {}
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            result[name] = tensor
        elif not tensor.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite")
        elif precision == "int8" and tensor.ndim >= 2 and tensor.numel() >= LARGE:
            result[name], result[name + SCALE] = _rows_to_int8(tensor.float())
        else:
            result[name] = tensor.to(dtype)
            if not result[name].isfinite().all():
                raise ValueError(f"{name} does not fit into {dtype}: use --precision bfloat16")
    return result


def widen(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The float32 tensors that `compact` was given, as far as they survived. Raises ValueError on a lost part."""
    result = {}
    for name, tensor in weights.items():
        if name.endswith(SCALE):
            if name.removesuffix(SCALE) not in weights:
                raise ValueError(f"{name} scales a weight that is not there")
        elif name + SCALE in weights:
            scale = weights[name + SCALE]
            if tensor.dtype != torch.int8 or scale.shape != tensor.shape[:1]:
                raise ValueError(f"{name} and its scale do not belong together")
            result[name] = tensor.float() * scale.reshape(-1, *[1] * (tensor.ndim - 1))
        else:
            result[name] = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
    return result


def _rows_to_int8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(R, ...) float32 -> (R, ...) int8, (R,) float32"""
    largest = tensor.abs().flatten(1).amax(1)
    scale = torch.where(largest > 0, largest, 1.0) / 127
    return (tensor / scale.reshape(-1, *[1] * (tensor.ndim - 1))).round().to(torch.int8), scale
