"""Processes, devices, precision, and the step object that hides how gradients meet.

A task calls `micro_batches`, `backward` and `step`; whether that is one process, DDP or DeepSpeed ZeRO is decided
here, so no script asks. Every engine keeps float32 master weights and gives its state in one common layout, so a run
may go on under another engine or another number of processes.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from common.machine.cpus import available_cpus


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
