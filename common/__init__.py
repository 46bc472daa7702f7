"""Bookkeeping every part shares: options, checkpoints, processes, the loop, optimizers, logs, images.

Knows torch and Pillow; knows nothing of models or of data.
"""

import os
import sys

from common.machine.cpus import available_cpus, cgroup_quota


def _quiet_interrupt(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """sys.excepthook: Ctrl-C while modules are imported, which takes seconds, leaves no traceback."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    elif sys.stderr:
        sys.stderr.write("interrupted\n")


if sys.excepthook is sys.__excepthook__:
    sys.excepthook = _quiet_interrupt


def _share_the_machine() -> None:
    """Threads of PyTorch, whose OpenMP reads this when it is loaded: no more than a container's quota lets run, and
    threads that wait spin for about a tenth of a millisecond, not for ten, before they sleep. Spinning takes the time
    slices that other processes and the own threads need. What the user has set stays."""
    alone = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))) == 1
    if alone and cgroup_quota() is not None:  # common.distributed shares them out among several
        os.environ.setdefault("OMP_NUM_THREADS", str(available_cpus()))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


_share_the_machine()
