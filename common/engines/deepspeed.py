"""DeepSpeed ZeRO 1-3 behind the surface of PlainEngine.

ZeRO (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054) shards the optimizer's moments (stage 1), the
gradients too (2) and the weights too (3) over processes. Weights stay float32 and the task's own torch.autocast
computes in bf16, so every stage follows the curve of the plain engine. `weights` and `state` gather full tensors by
parameter name, in PlainEngine's layout: a run goes on under any engine and any number of processes, without
DeepSpeed's own checkpoints.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.distributed import BatchPlan, World
from common.engines.muon import Muon
from common.engines.plain import optimizer_name, require_optimizer, split_batch
from common.engines.zero_muon import matrix_shards

# Elements that travel at once. A GPU's links want 200 MB; on a CPU 20 MB stay warm, and save a tenth of a small step.
BUCKET = {"cuda": 50_000_000, "cpu": 5_000_000}


@dataclass(frozen=True)
class DeepSpeedConfig:
    """How DeepSpeed trains, when it does."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What is sharded over processes: 0 nothing (DDP), 1 the optimizer, 2 the gradients too, 3 the weights too."""
    cpu_offload: bool = False
    """Keep the optimizer's moments in host memory and update there: for a GPU that is too small."""


class DeepSpeedEngine:
    """One model and its optimizer, sharded. Training forwards go through `model`, or the gradients never meet."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        world: World,
        plan: BatchPlan,
        grad_clip: float,
        options: DeepSpeedConfig,
    ) -> None:
        self.raw_model, self.optimizer, self.world, self.stage = model, optimizer, world, options.zero_stage
        self.accumulation = 1
        self._groups = [
            list(g["params"]) for g in optimizer.param_groups
        ]  # ZeRO puts flat shards in their place
        config = zero_config(world.device.type, plan, grad_clip, options)
        with _plain_collectives(world) as deepspeed:
            self.model, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        if isinstance(optimizer, Muon):
            optimizer.shards = matrix_shards(optimizer, self.model.optimizer, self.stage, world)

    def micro_batches(self, batch: dict[str, Any], accumulation: int = 1) -> Iterator[dict[str, Any]]:
        """Slices of the process's batch; gradients meet at the last one, under stages 2 and 3 at each."""
        self.accumulation = accumulation
        for i, micro in enumerate(split_batch(batch, accumulation)):
            self.model.set_gradient_accumulation_boundary(i == accumulation - 1)
            yield micro

    def backward(self, loss: Tensor) -> None:
        """`loss`: the mean over one micro-batch."""
        self.model.backward(loss / self.accumulation)

    def step(self) -> float:
        """Average over processes, clip, update, clear; returns the gradient norm before clipping.

        A norm that is not finite is returned as infinity and leaves the weights alone.
        """
        self.model.step()
        return float(self.model.get_global_grad_norm())

    def zero_grad(self) -> None:
        self.model.zero_grad()

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

    @contextlib.contextmanager
    def full_weights(self) -> Iterator[nn.Module]:
        """`raw_model` with all its weights, to copy them or to average; see PlainEngine. All processes must enter."""
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(list(self.raw_model.parameters()), enabled=self.stage == 3):
            yield self.raw_model

    def weights(self) -> dict[str, Tensor]:
        """Full float32 weights under their plain names, on the main process. All processes must call it."""
        from deepspeed.runtime.zero import GatheredParameters

        full: dict[str, Tensor] = {}
        for name, tensor in self.raw_model.state_dict(keep_vars=True).items():
            with GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
                if self.world.is_main:
                    full[name] = tensor.detach().to("cpu", copy=True) if self.stage == 3 else tensor.detach()
        return full

    def state(self) -> dict[str, Any]:
        """Optimizer moments by parameter name as PlainEngine gives them, on the main process. All must call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        names = {p: n for n, p in self.raw_model.named_parameters()}
        moments: dict[str, dict[str, Any]] = {}
        self._link_moments()
        for group, parameters in enumerate(self._groups):
            flat = self._flat_shards(group)[0]
            entries = self.optimizer.state.get(flat, {})
            shared = {k: v.clone() for k, v in entries.items() if v.shape != flat.shape}  # the step count
            for parameter in parameters:
                full = {k: safe_get_full_optimizer_state(parameter, k) for k in entries if k not in shared}
                if self.world.is_main:
                    moments[names[parameter]] = {
                        k: v.to("cpu", copy=True) for k, v in (full | shared).items()
                    }
        return {"moments": moments, "optimizer": optimizer_name(self.optimizer)}

    def load_state(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Full weights and moments, as any engine's `weights` and `state` gave them, on every process.

        Raises ValueError for another optimizer's.
        """
        require_optimizer(self.optimizer, state)
        for name, tensor in self.raw_model.state_dict(keep_vars=True).items():
            self._set_weight(tensor, weights[name].to(self.world.device))
        names = {p: n for n, p in self.raw_model.named_parameters()}
        for group, parameters in enumerate(self._groups):
            self._set_moments(group, {p: state["moments"][names[p]] for p in parameters})

    def _set_weight(self, tensor: Tensor, value: Tensor) -> None:
        """The copy that forward reads, then the one that the optimizer updates."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        sharded = hasattr(tensor, "ds_id")
        with torch.no_grad(), GatheredParameters([tensor], modifier_rank=0, enabled=sharded):
            tensor.copy_(value)
        if sharded:
            safe_set_local_fp32_param(tensor, self._shard(tensor, value))
        else:
            safe_set_full_fp32_param(tensor, value)

    def _set_moments(self, group: int, moments: dict[nn.Parameter, dict[str, Any]]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        filled = {p: entries for p, entries in moments.items() if entries}
        if not filled:  # saved before the first step
            return
        parameter, entries = next(iter(filled.items()))
        shape = parameter.ds_shape if self.stage == 3 else parameter.shape
        keys = [k for k, v in entries.items() if v.shape == shape]
        for flat in self._flat_shards(group):
            fresh = {k: torch.zeros_like(flat) for k in keys}
            self.optimizer.state[flat] = fresh | {
                k: v.to(flat.device, copy=True) for k, v in entries.items() if k not in keys
            }
        self._link_moments()
        for parameter, entries in filled.items():
            for key in keys:
                value = entries[key].to(self.world.device)
                if self.stage == 3:
                    safe_set_local_optimizer_state(parameter, self._shard(parameter, value), key)
                else:
                    safe_set_full_optimizer_state(parameter, value, key)

    def _link_moments(self) -> None:
        """Stages 1 and 2 link moments to parameters after the first group has stepped, when the others have none."""
        zero = self.model.optimizer
        if self.stage < 3:
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def _flat_shards(self, group: int) -> list[Tensor]:
        """What this process's optimizer updates in place of a parameter group: one tensor, under stage 3 several."""
        zero = self.model.optimizer
        if self.stage < 3:
            return [zero.single_partition_of_fp32_groups[group]]
        return [
            f
            for i, f in enumerate(zero.fp32_partitioned_groups_flat)
            if zero.sub_group_to_group_id[i] == group
        ]

    def _shard(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This process's part of a full tensor, padded with zeros as stage 3 pads it."""
        size = parameter.ds_tensor.numel()
        flat = value.new_zeros(size * self.world.size)
        flat[: value.numel()] = value.flatten()
        return flat[self.world.rank * size :][:size]


def zero_config(device: str, plan: BatchPlan, grad_clip: float, options: DeepSpeedConfig) -> dict[str, Any]:
    """DeepSpeed's configuration from ours. The loop owns accumulation and schedule, autocast the precision."""
    bucket = BUCKET[device]
    zero: dict[str, Any] = {
        "stage": options.zero_stage,
        "reduce_bucket_size": bucket,
        "overlap_comm": device == "cuda",  # gradients travel during the backward
    }
    zero["allgather_bucket_size" if options.zero_stage < 3 else "stage3_prefetch_bucket_size"] = bucket
    if options.cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": 1,  # what micro_batches says counts, see there
        "gradient_clipping": grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW needs no compiler
    }


@contextlib.contextmanager
def _plain_collectives(world: World) -> Iterator[Any]:
    """The deepspeed module, joined to our process group through torch's own collectives.

    Without this DeepSpeed asks mpi4py for peers when no launcher set them, and on a CPU compiles a shared-memory
    collective, which needs g++ and ninja.
    """
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed refuses to start without
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != world.device.type:
        raise ValueError(
            f"DeepSpeed works on {get_accelerator().device_name()}, the run on {world.device.type}: set the "
            f"environment variable DS_ACCELERATOR={world.device.type}"
        )
    if not dist.is_initialized():
        dist.init_process_group(
            get_accelerator().communication_backend_name(), store=dist.HashStore(), rank=0, world_size=1
        )
    known = deepspeed.ops.__compatible_ops__
    compiled = known.get("deepspeed_shm_comm", False)
    known["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(auto_mpi_discovery=False)
        yield deepspeed
    finally:
        known["deepspeed_shm_comm"] = compiled
