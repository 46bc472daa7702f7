"""Bookkeeping every part shares: options, checkpoints, processes, the loop, optimizers, logs, pictures.

Knows torch and Pillow; knows nothing of models or of data.
"""

import sys


def _quiet_interrupt(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """sys.excepthook: Ctrl-C while modules are imported, which takes seconds, leaves no traceback."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    elif sys.stderr:
        sys.stderr.write("interrupted\n")


if sys.excepthook is sys.__excepthook__:
    sys.excepthook = _quiet_interrupt
