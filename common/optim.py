"""Optimizers and their groups, the learning-rate curve, and the moving average of weights."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.engines.muon import Muon


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: orthogonal steps for the matrices between embeddings and heads, AdamW for the rest. Muon learns
    more from an image; its moments are half of AdamW's."""
    muon_lr_ratio: float = 4.0
    """Learning rate of Muon's matrices, in those of the rest; an update of either has entries of like size."""
    lr: float = 3e-4
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """Last learning rate as a share of the peak."""
    warmup_steps: int = 200
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls from its peak to its last value over num_steps."""
    weight_decay: float = 0.05
    """AdamW decay of matrices and kernels; vectors (norms, biases) and embeddings have none."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 leaves it alone."""

    def __post_init__(self) -> None:
        if self.muon_lr_ratio <= 0:
            raise ValueError(f"muon_lr_ratio must be above 0, not {self.muon_lr_ratio}")
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, not {self.lr}")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio must lie in [0, 1], not {self.min_lr_ratio}")
        if self.warmup_steps < 0 or self.grad_clip < 0 or self.weight_decay < 0:
            raise ValueError("warmup_steps, grad_clip and weight_decay must not be negative")


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """The rate of step `step` (from 0) of `num_steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps))
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "linear":
        share = 1 - progress
    elif config.schedule == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        raise ValueError(f"unknown schedule {config.schedule!r}")
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """What `config` names. Raises ValueError for muon where the model has no `hidden_layers` to name its matrices."""
    if config.name == "adamw":
        return adamw(model, config)
    if config.name == "muon":
        return muon(model, config)
    raise ValueError(f"unknown optimizer {config.name!r}")


def muon(model: nn.Module, config: OptimConfig) -> Muon:
    """Muon for the matrices and kernels of `model.hidden_layers`; weight decay is the same share a step for all."""
    if not hasattr(model, "hidden_layers"):
        raise ValueError("optim.name muon is for the generator and the fast image tokenizer: use adamw here")
    hidden = {p for layer in model.hidden_layers for p in layer.parameters() if p.ndim >= 2}
    decay, plain = decay_groups(model, config)
    matrices = {
        "params": [p for p in decay["params"] if p in hidden],
        "weight_decay": config.weight_decay / config.muon_lr_ratio,
        "lr_scale": config.muon_lr_ratio,
        "orthogonal": True,
    }
    decay["params"] = [p for p in decay["params"] if p not in hidden]
    groups = [matrices, decay | {"orthogonal": False}, plain | {"orthogonal": False}]
    return Muon([g for g in groups if g["params"]], **_adam_options(config))


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW([g for g in decay_groups(model, config) if g["params"]], **_adam_options(config))


def decay_groups(model: nn.Module, config: OptimConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Decay for tensors of two or more axes that are no embeddings; none for the rest."""
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    decay, plain = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decay if parameter.ndim >= 2 and parameter not in embeddings else plain).append(parameter)
    return {"params": decay, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}


def _adam_options(config: OptimConfig) -> dict[str, Any]:
    return {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": 1e-8, "fused": True}


class Ema:
    """Exponential moving average of a model's floating-point tensors, kept in float32.

    The decay is warmed up as (1 + n) / (10 + n), n the number of updates, so that early averages are not stuck at
    the random start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay must lie in [0, 1), not {decay}")
        self.decay = decay
        self.num_updates = 0
        self.shadow = {n: t.detach().clone() for n, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        state = model.state_dict()
        floats = [n for n, t in self.shadow.items() if t.is_floating_point()]
        torch._foreach_lerp_([self.shadow[n] for n in floats], [state[n] for n in floats], 1 - decay)
        for name, tensor in self.shadow.items():
            if not tensor.is_floating_point():
                tensor.copy_(state[name])

    def state(self) -> dict[str, Tensor | int]:
        return {"num_updates": self.num_updates, **{f"shadow.{n}": t for n, t in self.shadow.items()}}

    def load_state(self, state: dict[str, Tensor | int]) -> None:
        self.num_updates = int(state["num_updates"])
        for name, tensor in self.shadow.items():
            tensor.copy_(state[f"shadow.{name}"])
