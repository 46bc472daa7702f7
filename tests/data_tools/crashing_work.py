"""Work for the tests of parallel.py, in a module of its own so that worker processes start fast."""

import os


def crash_on_three(numbers):
    """Ten times each number; the process dies on the number 3."""
    if 3 in numbers:
        os._exit(1)
    return [number * 10 for number in numbers]
