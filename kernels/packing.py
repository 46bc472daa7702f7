"""Memory as the kernels want it: groups of weights, and huge pages."""

import contextlib
import mmap

import torch
from torch import Tensor

GROUP = 32  # outputs of a group of weights, as in kernels.h
HUGE_PAGE = 2**21


def memory(size: int) -> Tensor:
    """(size,) bytes, on huge pages where the kernel has them: what is read at a stride misses them less."""
    whole = -(-size // HUGE_PAGE) * HUGE_PAGE
    pages = mmap.mmap(-1, whole + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    raw = torch.frombuffer(pages, dtype=torch.uint8)
    return raw[-raw.data_ptr() % HUGE_PAGE :][:size]


def group_weights(weight: Tensor) -> Tensor:
    """(N, T, K), K even -> (N' / 32, T, K / 2, 2, 16, 2): N' = N rounded up to 32, the rest zeros; see kernels.h."""
    outputs, taps, inputs = weight.shape
    weight = torch.nn.functional.pad(weight, (0, 0, 0, 0, 0, -outputs % GROUP))
    groups = weight.view(-1, 2, GROUP // 2, taps, inputs // 2, 2)
    return groups.permute(0, 3, 4, 1, 2, 5).contiguous()
