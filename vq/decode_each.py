"""Image tokens to pixels with the same rounding in any batch and on any number of threads.

The convolutions of oneDNN split their work by batch and threads, and round by how they split: of a batch of 3 on two
threads a quarter of the values differ by one level from those of a batch of 8. So every image is decoded alone, by
one thread; the images of a batch by several threads at once, which takes no longer than the whole batch did.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from common.precision import autocast

CHUNK = 8  # images at once on an accelerator, always as many


class Decoder(Protocol):
    """An image tokenizer."""

    def decode_ids(self, ids: Tensor) -> Tensor:
        """(B, N) long -> (B, 3, S, S)."""


def decode_each(tokenizer: Decoder, ids: Tensor) -> Tensor:
    """(B, N) long -> float32 (B, 3, S, S) on the CPU, row i a function of `ids[i]` alone."""
    if ids.device.type != "cpu":
        return torch.cat([_padded(tokenizer, part) for part in ids.split(CHUNK)])
    threads = torch.get_num_threads()
    if threads == 1:
        return torch.cat([_decode(tokenizer, row) for row in ids.split(1)])
    workers = min(threads, len(ids))
    try:  # set_num_threads is of the calling thread, and of threads that start later
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return torch.cat(list(pool.map(lambda row: _decode(tokenizer, row), ids.split(1))))
    finally:
        torch.set_num_threads(threads)


def _padded(tokenizer: Decoder, ids: Tensor) -> Tensor:
    rows = torch.arange(CHUNK, device=ids.device).clamp(max=len(ids) - 1)
    return _decode(tokenizer, ids[rows])[: len(ids)]


@torch.inference_mode()
def _decode(tokenizer: Decoder, ids: Tensor) -> Tensor:
    with autocast(ids.device):
        return tokenizer.decode_ids(ids).float().cpu()
