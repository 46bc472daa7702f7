"""Small operations on one of PyTorch's threads."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch's CPU operations of this block run on the calling thread alone.

    OpenMP's threads look for work for milliseconds after an operation that they took part in. Between two calls of
    compiled code (kernels/csrc/team.h) that takes a core from its threads. A thread that is started meanwhile keeps
    one for ever (PyTorch gives a new thread the number of that moment), so blocks are short and start none.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
