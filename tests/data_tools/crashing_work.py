"""Work for the tests of parallel.py, in a module of its own so that worker processes start fast."""

import os
import time


def crash_on_three(numbers):
    """Ten times each number; the process dies on the number 3."""
    if 3 in numbers:
        os._exit(1)
    return [number * 10 for number in numbers]


def slow_tens(numbers):
    """Ten times each number, a twentieth of a second each."""
    time.sleep(0.05 * len(numbers))
    return [number * 10 for number in numbers]
