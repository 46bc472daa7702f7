"""Processes, devices, precision, and the step object that hides how gradients meet.

A task calls `micro_batches`, `backward` and `step`; whether that is one process, DDP or DeepSpeed ZeRO is decided
here, so no script asks. Every engine keeps float32 master weights and gives its state in one common layout, so a run
may go on under another engine or another number of processes.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.cpus import available_cpus

EngineName = Literal["auto", "plain", "ddp", "deepspeed"]


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    launcher: Literal["none", "torchrun", "deepspeed"]

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(device_ids=[self.device.index] if dist.get_backend() == "nccl" else None)

    def mean(self, values: dict[str, float], weight: float = 1.0) -> dict[str, float]:
        """The mean over processes of each value; the keys must agree. `weight`: this process's samples."""
        if self.size == 1 or not values:
            return values
        names = sorted(values)
        weighted = [values[n] * weight if weight else 0.0 for n in names]
        stacked = torch.tensor([*weighted, weight], dtype=torch.float64, device=self._reduce_device)
        dist.all_reduce(stacked)
        means = dict(zip(names, (stacked[:-1] / stacked[-1]).tolist(), strict=True))
        return {n: means[n] for n in values}

    def any(self, flags: dict[str, bool]) -> dict[str, bool]:
        """Whether a flag is up on any process; the keys must agree."""
        if self.size == 1:
            return flags
        names = sorted(flags)
        raised = torch.tensor([float(flags[n]) for n in names], device=self._reduce_device)
        dist.all_reduce(raised)
        return {n: bool(r) for n, r in zip(names, raised.tolist(), strict=True)}

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over processes in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_main_(self, tensor: Tensor) -> Tensor:
        """Rank 0's `tensor` on every process, in place."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    @property
    def _reduce_device(self) -> torch.device:
        return self.device if dist.get_backend() == "nccl" else torch.device("cpu")


def start_world(device: str = "auto", join_seconds: float = 600.0) -> World:
    """Read the launcher's environment and join the process group when there is more than one process.

    Processes of one machine share its cores. Raises ValueError for a device that this machine lacks, and when not all
    processes come within `join_seconds`.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    launcher = "none"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = "torchrun"
    elif "CROSS_SIZE" in os.environ or "LOCAL_SIZE" in os.environ:  # what the deepspeed launcher sets
        launcher = "deepspeed"
    chosen = pick_device(device, local_rank)
    if size > 1 and not dist.is_initialized():
        store = _meet(rank, size, join_seconds)
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    if (
        local_size > 1 and "OMP_NUM_THREADS" not in os.environ
    ):  # torchrun sets it, the deepspeed launcher does not
        torch.set_num_threads(max(1, available_cpus() // local_size))
    return World(rank, size, local_rank, chosen, launcher)


def _meet(rank: int, size: int, seconds: float) -> dist.Store:
    """The store of the launcher's process group, once everybody is there."""
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=timedelta(seconds=seconds)))
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ValueError(
            f"the {size} processes of this run did not all meet at {address} within {seconds:.0f} seconds: check with "
            "`python -m common.nodes HOSTFILE` that every node is up, and that it reaches that address"
        ) from error
    store.set_timeout(timedelta(minutes=30))
    return store


def pick_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """`auto` takes the process's CUDA GPU if there is one, then Apple's GPU (mps), else the CPU; `cuda` takes that GPU.

    Raises ValueError for an unusable name.
    """
    if name == "auto":
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "mps" if _has_mps() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}: use auto, cpu, mps, cuda or cuda:N") from error
    if device.type == "mps" and not _has_mps():
        raise ValueError(
            f"device {name!r} was asked for, but this machine has no GPU of Apple's: use --device cpu"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {name!r} was asked for, but this machine has no usable GPU: use --device cpu"
        )
    if device.type != "cuda":
        return device
    index = local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"device cuda:{index} was asked for, but this machine has {torch.cuda.device_count()} GPUs"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _has_mps() -> bool:
    """One process drives it: gloo cannot reduce its tensors."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    return alone and torch.backends.mps.is_available()


def stop_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class BatchPlan:
    """How `global_batch_size` divides over processes and accumulation."""

    global_batch_size: int
    micro_batch_size: int
    world_size: int

    def __post_init__(self) -> None:
        if self.global_batch_size < 1 or self.micro_batch_size < 1:
            raise ValueError(
                f"global_batch_size and micro_batch_size must be at least 1, not {self.global_batch_size} and "
                f"{self.micro_batch_size}"
            )
        if self.global_batch_size % self.world_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} does not divide over {self.world_size} processes: "
                f"use a multiple of {self.world_size}"
            )
        if self.rank_batch_size % self.micro_batch_size:
            raise ValueError(
                f"{self.rank_batch_size} samples a process do not divide into micro-batches of "
                f"{self.micro_batch_size}: choose micro_batch_size among the divisors of {self.rank_batch_size}"
            )

    @property
    def rank_batch_size(self) -> int:
        return self.global_batch_size // self.world_size

    @property
    def accumulation(self) -> int:
        return self.rank_batch_size // self.micro_batch_size


def batch_plan(global_batch_size: int, world_size: int, micro_batch_size: int | None = None) -> BatchPlan:
    """`micro_batch_size` None: the whole share of a process at once."""
    if micro_batch_size is None:
        micro_batch_size = max(1, global_batch_size // world_size)
    return BatchPlan(global_batch_size, micro_batch_size, world_size)


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


@dataclass(frozen=True)
class DeepSpeedConfig:
    """How DeepSpeed trains, when it does."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What is sharded over processes: 0 nothing (DDP), 1 the optimizer, 2 the gradients too, 3 the weights too."""
    cpu_offload: bool = False
    """Keep the optimizer's moments in host memory and update there: for a GPU that is too small."""


def make_engine(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    plan: BatchPlan,
    grad_clip: float = 1.0,
    name: EngineName = "auto",
    deepspeed: DeepSpeedConfig | None = None,
) -> Any:
    """The engine for this launcher: DeepSpeed under `deepspeed`, DDP under `torchrun`, else plain.

    Raises ValueError for options that the engine cannot follow, ModuleNotFoundError without the deepspeed package.
    """
    deepspeed = deepspeed or DeepSpeedConfig()
    if name == "auto":
        name = "deepspeed" if world.launcher == "deepspeed" else "plain"
    if deepspeed.cpu_offload and (
        name != "deepspeed" or deepspeed.zero_stage == 0 or world.device.type == "cpu"
    ):
        raise ValueError(
            "cpu_offload needs DeepSpeed, a zero_stage of 1 to 3 and a GPU to take the moments from"
        )
    if name in ("plain", "ddp") or (name == "deepspeed" and deepspeed.zero_stage == 0):
        return PlainEngine(model, optimizer, world, grad_clip)
    if name == "deepspeed":
        from common.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(model, optimizer, world, plan, grad_clip, deepspeed)
    raise ValueError(f"unknown engine {name!r}")
