"""Kernels: code that computes what a model's own files define, faster on a CPU, where a script switches it on.

    report = kernels.accelerate(model)
    say(report)             # kernels: 8 of 8 blocks by compiled code, ...

See README.md: what each computes, for which CPUs, and how to leave it out.
"""

import common  # noqa: F401 (before torch: Ctrl-C meanwhile leaves no traceback)

# isort: split

from torch import nn

from kernels.report import OFF, Kernels, Report

__all__ = ["OFF", "Kernels", "Report", "accelerate"]


def accelerate(*modules: nn.Module, in_bf16: bool = True, insist: bool = False) -> Report:
    """Let kernels compute what they know inside these modules, in place; a second time changes nothing.

    in_bf16: whether it will be computed under `common.precision.autocast` in bf16; the compiled passes of training
    compute in nothing else. insist: encode images by compiled code even where PyTorch is faster; raises ValueError
    where it cannot.
    """
    from kernels import swap  # all kernels and the compiler: nothing of them is imported before

    return swap.accelerate(modules, in_bf16, insist)
