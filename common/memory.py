"""How much memory a device has left."""

from pathlib import Path

import torch

from common.distributed import pick_device


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
