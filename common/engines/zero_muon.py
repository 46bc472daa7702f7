"""Muon's matrices under ZeRO, where each process updates a flat part of them.

Stages 1 and 2 lay the matrices of a group in a row and cut the row into as many parts as there are processes; stage 3
cuts every matrix. Momenta stay cut. A step gathers the momenta in bf16, which is how Muon reads them, and each process
makes orthogonal what its part touches: under stages 1 and 2 its share of the matrices, under stage 3 all.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.distributed import World
from common.engines.muon import Muon, Piece, Shard


def matrix_shards(optimizer: Muon, zero: Any, stage: int, world: World) -> dict[Tensor, Shard]:
    """For what `optimizer` steps under DeepSpeed's `zero`: flat tensor -> what it holds."""
    shards = {}
    for group, options in enumerate(optimizer.param_groups):
        if not options["orthogonal"]:
            continue
        if stage < 3:
            flat = zero.single_partition_of_fp32_groups[group]
            starts = zero.round_robin_bit16_offsets[group]
            shards[flat] = _part_of_a_row(zero.round_robin_bit16_groups[group], starts, flat.numel(), world)
            continue
        for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
            if zero.sub_group_to_group_id[number] == group:
                shards[flat] = _parts_of_each(zero.fp16_groups[number], world)
    return shards


def _part_of_a_row(matrices: list[Tensor], starts: list[int], size: int, world: World) -> Shard:
    """Elements rank * size to (rank + 1) * size of a row in which the matrices begin at `starts`."""
    first, last = world.rank * size, (world.rank + 1) * size
    pieces, layouts = [], []
    for matrix, start in zip(matrices, starts, strict=True):
        begin, end = max(start, first), min(start + matrix.numel(), last)
        if begin < end:
            pieces.append(Piece(begin - start, end - begin, begin - first))
            layouts.append((start, matrix.numel(), matrix.shape))

    def gather(flat: Tensor) -> list[Tensor]:
        row = _from_all(flat, world)
        return [row[start : start + numel].view(shape) for start, numel, shape in layouts]

    return Shard(tuple(pieces), gather)


def _parts_of_each(parameters: list[Any], world: World) -> Shard:
    """One part of every matrix after the other, each padded to what a process holds at most."""
    pieces, layouts, at = [], [], 0
    for parameter in parameters:
        size, numel = parameter.ds_tensor.numel(), parameter.ds_numel
        start = min(world.rank * size, numel)
        pieces.append(Piece(start, min(size, numel - start), at))
        layouts.append((at, size, numel, parameter.ds_shape))
        at += size

    def gather(flat: Tensor) -> list[Tensor]:
        rows = _from_all(flat, world).view(world.size, -1)
        return [rows[:, at : at + size].flatten()[:numel].view(shape) for at, size, numel, shape in layouts]

    return Shard(tuple(pieces), gather)


def _from_all(flat: Tensor, world: World) -> Tensor:
    """(size,) of each process -> (processes * size,), on the device where processes meet."""
    flat = flat.to(world.device)
    if world.size == 1:
        return flat
    row = flat.new_empty(world.size * flat.numel())
    dist.all_gather_into_tensor(row.view(torch.uint8), flat.view(torch.uint8))  # gloo does not know bf16
    return row
