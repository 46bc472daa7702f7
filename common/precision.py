"""What numbers a machine computes in: bf16 autocast where it has bf16, and our compiled kernels where it has not."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Literal

import torch

Precision = Literal["auto", "bf16", "fp32"]
_kernels_in_bf16 = contextvars.ContextVar("compiled kernels compute in bf16", default=False)


def has_native_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False  # mps: float32 unless bf16 is asked for, since not all of Apple's GPUs have it
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def autocast(device: torch.device, precision: Precision = "auto") -> contextlib.AbstractContextManager:
    """bf16 autocast where the machine computes it natively (AMX or AVX512-BF16 CPUs, Ampere and later), else fp32.

    On other CPUs the compiled kernels of a training step alone compute in bf16: what PyTorch emulates is hundreds of
    times slower than fp32.
    """
    if precision == "fp32":
        return contextlib.nullcontext()
    if device.type == "cpu" and not has_native_bf16(device):
        return _bf16_kernels(True)
    if precision == "auto" and not has_native_bf16(device):
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def trains_in_bf16() -> bool:
    """Whether what is computed here on a CPU, inside `autocast`, may be computed in bf16."""
    in_bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return in_bf16 or _kernels_in_bf16.get()


def checkpoint_contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """For torch.utils.checkpoint: what is computed again is computed as it was."""
    return contextlib.nullcontext(), _bf16_kernels(_kernels_in_bf16.get())


@contextlib.contextmanager
def _bf16_kernels(on: bool) -> Iterator[None]:
    token = _kernels_in_bf16.set(on)
    try:
        yield
    finally:
        _kernels_in_bf16.reset(token)
