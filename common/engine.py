"""The step object that hides how gradients meet: `micro_batches`, `backward`, `step`.

Whether that is one process, DDP or DeepSpeed ZeRO is decided here, so no script asks.
"""

from typing import Any, Literal

import torch
from torch import nn

from common.distributed import BatchPlan, World
from common.engines.deepspeed import DeepSpeedConfig, DeepSpeedEngine
from common.engines.plain import PlainEngine

EngineName = Literal["auto", "plain", "ddp", "deepspeed"]


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
        return DeepSpeedEngine(model, optimizer, world, plan, grad_clip, deepspeed)
    raise ValueError(f"unknown engine {name!r}")
