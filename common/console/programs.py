"""Our own commands, started as a user would start them."""

import signal
import subprocess
import sys
from collections.abc import Sequence


def run_program(program: Sequence[str]) -> int:
    """`python PROGRAM...` in this terminal; returns its exit code.

    Ctrl-C reaches it from the terminal and SIGTERM is handed on: it saves and ends, and this waits for it.
    """
    child = subprocess.Popen([sys.executable, *program])
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda number, frame: child.send_signal(number))
    try:
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:
                continue
    finally:
        signal.signal(signal.SIGTERM, before)
