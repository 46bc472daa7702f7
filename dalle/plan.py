"""What a training will cost: parameters, memory, tokens, operations, hours, disk."""

import time

import torch
from torch import nn

from common.distributed import Precision, autocast
from dalle.model import DalleConfig


def train_flops(config: DalleConfig, text_len: int) -> float:
    """Floating-point operations of forward and backward for one sample, recomputation not counted.

    Kaplan et al. 2020, section 2.1, exact for our blocks: 2 a weight and input in the forward pass, twice that in
    the backward pass; causal attention at the half of the square that it needs.
    """
    c = config
    length = text_len + c.num_image_tokens
    block = c.dim * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim + c.dim**2 + 3 * c.dim * c.ffn_dim
    attention = 2 * c.dim * (length + 1) / 2  # scores and mixing, an average query sees half
    body = length * c.num_layers * (block + attention)
    heads = c.num_image_tokens * c.dim * c.codebook_size
    if c.text_head:
        heads += (text_len - 1) * c.text_embed_dim * c.text_vocab_size
    if c.text_embed_dim != c.dim:
        heads += 2 * text_len * c.text_embed_dim * c.dim
    return 3 * 2.0 * (body + heads)


def measure_peak_flops(
    device: torch.device, precision: Precision = "auto", size: int = 2048, repeats: int = 3
) -> float:
    """Operations a second of a square matrix product in the training precision: the best of `repeats`."""
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    with autocast(device, precision), torch.no_grad():
        dtype = nn.functional.linear(a[:8], b).dtype
        a, b = a.to(dtype), b.to(dtype)
        seconds = []
        for _ in range(repeats + 1):  # the first one warms up
            _synchronize(device)
            started = time.perf_counter()
            nn.functional.linear(a, b)
            _synchronize(device)
            seconds.append(time.perf_counter() - started)
    return 2.0 * size**3 / min(seconds[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
