"""Kernels: code that computes what a model's own files define, faster on a CPU, where a script switches it on.

    report = kernels.accelerate(model)
    say(report)             # kernels: 8 of 8 blocks by compiled code, ...

See README.md: what each computes, for which CPUs, and how to leave it out.
"""

import common  # noqa: F401 (before torch: Ctrl-C meanwhile leaves no traceback)

# isort: split

from kernels.swap import OFF, Kernels, Report, accelerate

__all__ = ["OFF", "Kernels", "Report", "accelerate"]
