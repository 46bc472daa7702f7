"""How many CPUs this process may use; imported before torch, whose threads are counted when it is loaded."""

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def available_cpus() -> int:
    """Those of the affinity mask, no more than the quota of the cgroups (a container's --cpus) gives, rounded up."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota()
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def cgroup_quota(own: Path = OWN_CGROUPS, mounted: Path = CGROUPS) -> float | None:
    """CPUs that the process's cgroups and those above them grant, version 1 or 2; None where none limits it."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            quotas += _quotas(mounted, path, _quota_v2)
        elif "cpu" in controllers.split(","):
            quotas += _quotas(mounted / controllers, path, _quota_v1)
            quotas += _quotas(mounted / "cpu", path, _quota_v1)
    return min(quotas, default=None)


def _quotas(root: Path, path: str, read) -> list[float]:
    """Of a group and of all above it. In a container the group is often mounted as the root itself."""
    folder = root / path.lstrip("/")
    found = (read(parent) for parent in (folder, *folder.parents) if parent.is_relative_to(root))
    return [quota for quota in found if quota is not None]


def _quota_v2(folder: Path) -> float | None:
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    return float(quota) / float(period) if quota.isdigit() and period else None


def _quota_v1(folder: Path) -> float | None:
    quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    return float(quota) / float(period) if quota.isdigit() and period else None  # -1: none


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
