"""Muon for matrices, AdamW for the rest, as one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) steps along the nearest orthogonal matrix of the
momentum, found by five Newton-Schulz rounds in bf16. Updates are scaled to the size that AdamW's have, 0.2 an entry
(Liu et al. 2025, arXiv:2502.16982, section 2.2), so one learning rate and one weight decay fit both.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c of the published rounds
ROUNDS = 5
ROUNDS_TOGETHER = (3, 2)  # of wide matrices
MOMENTUM = 0.95
UPDATE_SIZE = 0.2  # root mean square of an update's entries, in learning rates


class Muon(torch.optim.AdamW):
    """AdamW whose groups with `orthogonal` true take Muon's step instead.

    Tall matrices of k times as many rows as columns are k square ones: fused query, key and value projections are
    told apart so. Convolution kernels (out, in, h, w) are matrices (out, in * h * w).
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        shapes: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        for number, group in enumerate(self.param_groups):
            for parameter in group["params"] if group["orthogonal"] else ():
                if parameter.grad is not None:
                    shapes[number, *parameter.shape].append(parameter)
        for (number, *_), parameters in shapes.items():
            self._step_matrices(parameters, self.param_groups[number])
        super().step(closure)  # the rest: matrices have no gradient any more

    def _step_matrices(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Parameters of one shape at once: small products cost more in calls than in work."""
        gradients = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta = [self.state[p]["momentum"] for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        torch._foreach_lerp_(gradients, momenta, MOMENTUM)  # Nesterov's look ahead
        matrices = torch.stack(gradients).flatten(2)  # (P, rows, columns)
        rows, columns = matrices.shape[1:]
        side = columns if rows % columns == 0 else rows
        blocks = matrices.reshape(-1, side, columns)  # (P * k, side, columns)
        size = UPDATE_SIZE * max(side, columns) ** 0.5
        updates = orthogonalized(blocks).reshape(len(parameters), *parameters[0].shape).to(matrices.dtype)
        torch._foreach_mul_(list(parameters), 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(list(parameters), list(updates), alpha=-group["lr"] * size)


def orthogonalized(matrices: Tensor) -> Tensor:
    """(N, rows, columns) -> the same in bf16 with singular values between about 0.7 and 1.2.

    A round multiplies by a polynomial of the Gram matrix. For wide matrices several rounds are put together before they
    meet the columns, which is a third of the work; not all five, since the Gram matrix in bf16 does not hold the small
    singular values.
    """
    x = matrices.bfloat16()
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
