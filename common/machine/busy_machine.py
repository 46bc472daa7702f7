"""Threads of a training on a machine that other processes use too.

Threads of oneDNN wait for each other in a loop that never sleeps (the weight gradients of convolutions). Where another
process has the core of one of them, all others spin through whole time slices: on two cores and two threads a ranker
trained at a third of its speed beside one busy process, and at a seventeenth beside another training. With as many
threads as there are free CPUs it keeps 85 % (docs/log/speed.md).

The last bits of a result depend on the number of threads, so a number that the user set (OMP_NUM_THREADS) stays.
"""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

LOOK_S = 5.0  # between two looks at the machine
MARGIN = 0.25  # CPUs that must be free beyond a half before a thread is added again


class Usage(NamedTuple):
    """CPU seconds since some moment in the past."""

    clock: float
    """Wall-clock seconds."""
    machine: float
    """Used by all processes, and by other guests of the hardware where the kernel knows."""
    own: float
    """Used by this process and all below it."""


def read_usage(proc: Path = Path("/proc")) -> Usage | None:
    """Of Linux; None elsewhere."""
    try:
        ticks = [int(x) for x in (proc / "stat").read_text().partition("\n")[0].split()[1:9]]
        user, nice, system, _, _, irq, softirq, steal = ticks
        per_second = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None
    machine = (user + nice + system + irq + softirq + steal) / per_second
    return Usage(time.monotonic(), machine, _of_tree(os.getpid(), proc) / per_second)


def _of_tree(root: int, proc: Path) -> int:
    """Ticks of a process, of all below it, and of those below it that have ended."""
    used, children = {}, {}
    for path in proc.glob("[0-9]*/stat"):
        try:
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        pid = int(path.parent.name)
        children.setdefault(int(fields[1]), []).append(pid)
        # user and system, its own and of children that it waited for
        used[pid] = sum(map(int, fields[11:15]))
    total, todo = 0, [root]
    while todo:
        pid = todo.pop()
        total += used.get(pid, 0)
        todo += children.get(pid, [])
    return total


class BusyMachine:
    """Follows how many CPUs others leave free; `follow` is called between steps."""

    def __init__(self, alone: bool = True, read: Callable[[], Usage | None] = read_usage) -> None:
        """`alone`: whether no other process works on the same step, since those share the CPUs among themselves."""
        self.most, self.cpus, self._read = torch.get_num_threads(), os.cpu_count() or 1, read
        self._is_lowered = False
        self._last = read() if alone and self.most > 1 and "OMP_NUM_THREADS" not in os.environ else None

    def follow(self) -> str:
        """Set PyTorch's threads by what others used since the last look; says so where that is a change, else ""."""
        if self._last is None or time.monotonic() - self._last.clock < LOOK_S:
            return ""
        before, now = self._last, self._read()
        self._last = now
        if now is None:
            return ""
        others = (now.machine - before.machine - (now.own - before.own)) / (now.clock - before.clock)
        threads = self.threads(torch.get_num_threads(), max(0.0, others))
        if threads == torch.get_num_threads():
            return ""
        torch.set_num_threads(threads)
        self._is_lowered = threads < self.most
        return (
            f"note: other processes use {others:.1f} of {self.cpus} CPUs, so this one computes with {threads} "
            f"thread{'s' * (threads > 1)} from here on; OMP_NUM_THREADS sets a number that stays"
        )

    def restore(self) -> None:
        """The number of threads that it began with: the process may go on to something else."""
        if self._is_lowered:
            torch.set_num_threads(self.most)

    def threads(self, present: int, others: float) -> int:
        """How many threads to take, `present` now, while others use so many CPUs."""
        free = self.cpus - others
        wanted = max(1, min(self.most, math.floor(free + 0.5)))
        if wanted > present:  # a little later up than down, so that it settles
            wanted = max(present, min(wanted, math.floor(free + 0.5 - MARGIN)))
        return wanted
