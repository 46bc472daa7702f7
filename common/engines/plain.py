"""The step object of one process, or of many through DDP; what all engines share.

An engine keeps float32 master weights and gives its state in one common layout, so a run may go on under another
engine or another number of processes.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from common.distributed import World


def split_batch(batch: dict[str, Any], parts: int) -> Iterator[dict[str, Any]]:
    """Equal slices of every tensor or list in `batch`. Raises ValueError where they cannot be equal."""
    sizes = {name: len(value) for name, value in batch.items()}
    size = max(sizes.values())
    if size == 0 or size % parts or min(sizes.values()) != size:
        raise ValueError(f"a batch of {sizes} does not split into {parts} equal micro-batches")
    each = size // parts
    for start in range(0, size, each):
        yield {name: value[start : start + each] for name, value in batch.items()}


class PlainEngine:
    """One model and its optimizer on one process, or on many through DDP (gradients averaged)."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, world: World, grad_clip: float
    ) -> None:
        self.raw_model = model
        self.optimizer = optimizer
        self.grad_clip = grad_clip
        self.accumulation = 1
        self.model: nn.Module = model
        if world.size > 1:
            ids = [world.device.index] if world.device.type == "cuda" else None
            self.model = nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def micro_batches(self, batch: dict[str, Any], accumulation: int = 1) -> Iterator[dict[str, Any]]:
        """Slices of the process's batch; gradients meet at the last one only."""
        self.accumulation = accumulation
        for i, micro in enumerate(split_batch(batch, accumulation)):
            if isinstance(self.model, nn.parallel.DistributedDataParallel):
                self.model.require_backward_grad_sync = i == accumulation - 1
            yield micro

    def backward(self, loss: Tensor) -> None:
        """`loss`: the mean over one micro-batch."""
        (loss / self.accumulation).backward()

    def step(self) -> float:
        """Clip, update, clear; returns the gradient norm before clipping. A non-finite one leaves the weights alone."""
        parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.grad_clip or float("inf")))
        if math.isfinite(norm):
            self.optimizer.step()
        self.zero_grad()
        return norm

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

    @contextlib.contextmanager
    def full_weights(self) -> Iterator[nn.Module]:
        """`raw_model` with all its weights, to copy them or to average.

        All processes must enter, since ZeRO 3 gathers here and shards again at the end. It is not to be run inside
        (ZeRO 3 shards each layer after its forward): evaluate through `model`, sample from a copy.
        """
        yield self.raw_model

    def weights(self) -> dict[str, Tensor]:
        """Full float32 weights under their plain names. All processes must call it; the main one may use the result."""
        return {name: tensor.detach() for name, tensor in self.raw_model.state_dict().items()}

    def state(self) -> dict[str, Any]:
        """Optimizer moments by parameter name: the layout that every engine writes and reads.

        All processes must call it; the main one may use the result.
        """
        names = {p: n for n, p in self.raw_model.named_parameters()}
        moments = {}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                moments[names[parameter]] = dict(self.optimizer.state[parameter])
        return {"moments": moments, "optimizer": optimizer_name(self.optimizer)}

    def load_state(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Weights and moments as `weights` and `state` gave them. Raises ValueError for another optimizer's."""
        require_optimizer(self.optimizer, state)
        self.raw_model.load_state_dict(weights)
        for name, parameter in self.raw_model.named_parameters():
            if name in state["moments"]:
                moments = state["moments"][name]
                self.optimizer.state[parameter] = {
                    k: v.to(parameter.device, copy=True) for k, v in moments.items()
                }


def optimizer_name(optimizer: torch.optim.Optimizer) -> str:
    """As `optim.name` has it."""
    return type(optimizer).__name__.lower()


def require_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Raises ValueError where `state` holds another optimizer's moments."""
    before, now = state.get("optimizer", "adamw"), optimizer_name(optimizer)
    if before != now:
        raise ValueError(f"this run was trained with {before}, not with {now}: set --optim.name {before}")
