"""Muon for matrices, AdamW for the rest, as one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) steps along the nearest orthogonal matrix of the
momentum, found by five Newton-Schulz rounds in bf16. Updates are scaled to the size that AdamW's have, 0.2 an entry
(Liu et al. 2025, arXiv:2502.16982, section 2.2), so one learning rate and one weight decay fit both. Where bf16 is only
emulated, as on CPUs without AVX512-BF16 or AMX, the rounds are in float32: emulated products are 400 times slower.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.precision import has_native_bf16

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c of the published rounds
ROUNDS = 5
ROUNDS_TOGETHER = (3, 2)  # of wide matrices
MOMENTUM = 0.95
UPDATE_SIZE = 0.2  # root mean square of an update's entries, in learning rates


class Muon(torch.optim.AdamW):
    """AdamW whose groups with `orthogonal` true take Muon's step instead.

    Tall matrices of k times as many rows as columns are k square ones: fused query, key and value projections are
    told apart so. Convolution kernels (out, in, h, w) are matrices (out, in * h * w). Where `shards`
    is filled, a parameter of these groups is no matrix but this process's flat part of some.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shards: dict[Tensor, Shard] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None] if group["orthogonal"] else []
            if parameters:
                self._step_matrices(parameters, group)
        super().step(closure)  # the rest: matrices have no gradient any more

    def _step_matrices(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta = [self.state[p]["momentum"] for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        torch._foreach_lerp_(gradients, momenta, MOMENTUM)  # Nesterov's look ahead
        if self.shards:
            updates = [self.shards[p].update(g) for p, g in zip(parameters, gradients, strict=True)]
        else:
            updates = orthogonal_updates(gradients)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])


@dataclass(frozen=True)
class Piece:
    """What a process holds of a matrix: `size` elements from `start` on, standing at `at` in its flat part."""

    start: int
    size: int
    at: int


@dataclass(frozen=True)
class Shard:
    """A process's flat part of matrices that several processes share, as ZeRO cuts them."""

    pieces: tuple[Piece, ...]
    gather: Callable[[Tensor], list[Tensor]]
    """The flat part -> the whole matrix of every piece. All processes call it together."""

    def update(self, flat: Tensor) -> Tensor:
        """What `orthogonal_updates` gives for the matrices, of it this process's part."""
        result = torch.zeros_like(flat)
        updates = orthogonal_updates(self.gather(flat.to(product_dtype(flat.device))))
        for piece, update in zip(self.pieces, updates, strict=True):
            part = update.flatten()[piece.start : piece.start + piece.size]
            result[piece.at : piece.at + piece.size] = part
        return result


def orthogonal_updates(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Of the same shapes, float32, entries of 0.2.

    Those of one shape are done at once: small products cost more in calls than in work.
    """
    shapes: dict[torch.Size, list[int]] = defaultdict(list)
    for i, matrix in enumerate(matrices):
        shapes[matrix.shape].append(i)
    updates: dict[int, Tensor] = {}
    for shape, indices in shapes.items():
        stacked = torch.stack([matrices[i] for i in indices]).flatten(2)  # (P, rows, columns)
        rows, columns = stacked.shape[1:]
        side = columns if rows % columns == 0 else rows
        blocks = orthogonalized(stacked.reshape(-1, side, columns))  # (P * k, side, columns)
        size = UPDATE_SIZE * max(side, columns) ** 0.5
        updates |= dict(zip(indices, blocks.float().mul_(size).reshape(len(indices), *shape), strict=True))
    return [updates[i] for i in range(len(matrices))]


def product_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if has_native_bf16(device) else torch.float32


def orthogonalized(matrices: Tensor) -> Tensor:
    """(N, rows, columns) -> the same in `product_dtype` with singular values between about 0.7 and 1.2.

    A round multiplies by a polynomial of the Gram matrix. For wide matrices several rounds are put together before they
    meet the columns, which is a third of the work; not all five, since the Gram matrix in bf16 does not hold the small
    singular values.
    """
    x = matrices.to(product_dtype(matrices.device))
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if x.shape[2] < 2 * x.shape[1]:
        for _ in range(ROUNDS):
            x = _round(x, _factor(x @ x.mT))
    else:
        for rounds in ROUNDS_TOGETHER:
            x = _rounds(x @ x.mT, rounds) @ x
    return x.mT if tall else x


def _rounds(gram: Tensor, rounds: int) -> Tensor:
    """(N, side, side), the matrix by which `rounds` rounds multiply what has the Gram matrix `gram`."""
    product = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    for left in reversed(range(rounds)):
        factor = _factor(gram)
        product = _round(product, factor)
        if left:
            gram = _round(_round(gram, factor).mT, factor)
    return product


def _factor(gram: Tensor) -> Tensor:
    """b G + c G G"""
    _, b, c = NEWTON_SCHULZ
    return torch.baddbmm(gram, gram, gram, beta=b, alpha=c)


def _round(x: Tensor, factor: Tensor) -> Tensor:
    """a x + factor x"""
    return torch.baddbmm(x, factor, x, beta=NEWTON_SCHULZ[0])
