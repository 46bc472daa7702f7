"""How much memory a device has left, and how much a piece of work takes."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from common.distributed import pick_device

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
FORGET_PEAK = "5"  # of clear_refs, see proc(5)


def free_memory(device: str) -> float:
    """Bytes free for a model on this machine."""
    chosen = pick_device(device)
    if chosen.type == "cuda":
        return float(torch.cuda.mem_get_info(chosen)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


@dataclass
class PeakMemory:
    """What a piece of work took."""

    bytes: int | None = None
    """Most that was held at once beyond what was held before; None where the system does not tell."""


@contextmanager
def peak_memory(device: str) -> Iterator[PeakMemory]:
    """Measures what happens inside: memory of the GPU where `device` is one, else of this process (Linux).

    What an earlier piece of work freed is given back to the system first: what is taken anew would not show otherwise.
    """
    found, chosen = PeakMemory(), pick_device(device)
    gc.collect()
    if chosen.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(chosen)
        before = torch.cuda.memory_allocated(chosen)
        yield found
        found.bytes = torch.cuda.max_memory_allocated(chosen) - before
        return
    _trim()
    forgotten = _forget_peak()
    before = _resident("VmRSS")
    yield found
    peak = _resident("VmHWM")
    if forgotten and before is not None and peak is not None:
        found.bytes = max(0, peak - before)


def _trim() -> None:
    """Free pages of the heap go back to the system (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def _forget_peak() -> bool:
    try:
        CLEAR.write_text(FORGET_PEAK)
    except OSError:
        return False
    return True


def _resident(name: str) -> int | None:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
