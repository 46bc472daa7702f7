"""The memory of a fine-tuning step before it is taken: counted on tensors without data, from the real networks.

Forward and backward run on fake tensors, which have shapes and lifetimes and no numbers; every storage that an
operation makes is counted while it lives. So activations, gradients, casts of autocast and what checkpointing computes
again are all in the peak, as they would be on the device; workspaces of convolutions and fragmentation are not.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.distributed import BatchPlan, World
from common.log import say
from common.machine.memory import free_memory
from diffusion.tuning.options import TuneOptions, TunePrecision
from diffusion.tuning.step import computed_in

GIB = 2**30
SLACK = 0.95  # of the free memory may be planned with: allocators round up


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made inside and that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:  # no view
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += self._sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors made inside have shapes and no data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        yield


def _become_fake_(module: nn.Module) -> None:
    """Parameters and buffers as fake tensors on the CPU, where autocast knows them."""
    for layer in module.modules():
        for name, value in layer._parameters.items():
            if value is not None:
                fake = torch.empty(value.shape, dtype=value.dtype)
                layer._parameters[name] = nn.Parameter(fake, value.requires_grad)
        for name, value in layer._buffers.items():
            layer._buffers[name] = None if value is None else torch.empty(value.shape, dtype=value.dtype)


def _autocast_of_any_machine(precision: TunePrecision) -> AbstractContextManager:
    """Casts as the device would, whatever this machine computes natively; `auto` is bf16."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast("cpu", torch.float16 if precision == "fp16" else torch.bfloat16)


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one process, beside the weights."""

    gradients: float
    """Of the trained weights, float32."""
    optimizer: float
    """AdamW's two moments, float32."""
    average: float
    """The moving average, float32."""
    activations: float
    """What is alive beside the gradients at the worst moment: activations, casts, what is computed again."""
    encoding: float
    """The most that the autoencoder needs while it encodes a micro-batch; gone before the UNet's step."""

    @property
    def total(self) -> float:
        """What a step needs on top of the weights at its worst moment."""
        kept = self.optimizer + self.average
        return kept + max(self.gradients + self.activations, self.encoding)


def step_peak(
    unet: nn.Module,
    latent_shape: Sequence[int],
    text_shape: Sequence[int],
    precision: TunePrecision,
    accumulates: bool = False,
) -> float:
    """Bytes alive at the worst moment of forward and backward: gradients, activations, casts. To be called on fake
    tensors; latent_shape (B, C, h, w), text_shape (B, T, D). `accumulates`: a second pass adds to the gradients of the
    first, which live through its forward."""
    noisy, hidden = torch.randn(*latent_shape), torch.randn(*text_shape)
    timesteps = torch.zeros(latent_shape[0], dtype=torch.long)
    with LiveBytes() as live:
        for _ in range(1 + accumulates):
            with _autocast_of_any_machine(precision):
                prediction = unet(noisy, timesteps, hidden).sample
            (prediction.float() - noisy).square().mean().backward()
            del prediction
        return float(live.peak)


def encoding_peak(vae: nn.Module, image_shape: Sequence[int], precision: TunePrecision) -> float:
    """Bytes alive at the worst moment of encoding images (B, 3, H, W). To be called on fake tensors."""
    images = torch.randn(*image_shape)
    with torch.no_grad(), LiveBytes() as live, _autocast_of_any_machine(precision):
        vae.encode(images)
        return float(live.peak)


@dataclass(frozen=True)
class Networks:
    """What is planned for, by configs alone."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_len: int
    prepare: Callable[[nn.Module], Any]
    """Given the UNet: switches on what is trained, puts adapters in."""


def plan_step(
    networks: Networks,
    micro_batch_size: int,
    side: int,
    precision: TunePrecision,
    checkpointing: bool,
    ema: bool = False,
    processes: int = 1,
    zero_stage: int = 0,
    accumulates: bool = False,
) -> StepMemory:
    """Of one process, for square images of `side` pixels. ZeRO 1 shards the moments, 2 the gradients too."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(networks.unet).train()
        vae = AutoencoderKL.from_config(networks.vae).eval()
    networks.prepare(unet)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    with fake_tensors():
        for module in (unet, vae):
            _become_fake_(module)
        trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        latents = (micro_batch_size, unet.config.in_channels, side // factor, side // factor)
        text = (micro_batch_size, networks.text_len, unet.config.cross_attention_dim)
        peak = step_peak(unet, latents, text, precision, accumulates)
        encoding = encoding_peak(
            vae, (micro_batch_size, 3, side, side), "fp32" if precision == "fp16" else precision
        )
    gradients = 4.0 * trained
    return StepMemory(
        gradients / (processes if zero_stage >= 2 else 1),
        8.0 * trained / (processes if zero_stage >= 1 else 1),
        4.0 * trained * ema,
        max(0.0, peak - gradients),
        encoding,
    )


def require_memory(task: Any, options: TuneOptions, plan: BatchPlan, data: Any, world: World) -> None:
    """Say what the first step will need; raises ValueError where it cannot fit, unless told to ignore that."""
    base, side = task.base, data.resolution
    trained = {n.removeprefix("unet."): p for n, p in task.trained.items() if n.startswith("unet.")}
    zero = options.deepspeed.zero_stage if world.launcher == "deepspeed" else 0

    def prepare(unet: nn.Module) -> None:
        lora = getattr(options, "lora", None)
        if lora is not None:
            from diffusion.lora.adapters import add_adapter

            add_adapter(unet, lora, "unet")
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(name in trained)

    networks = Networks(dict(base.unet.config), dict(base.vae.config), base.text_len, prepare)
    precision = computed_in(options.precision, world.device)
    sizes = (plan.micro_batch_size, side, precision, options.gradient_checkpointing)
    memory = plan_step(networks, *sizes, task.ema is not None, world.size, zero, plan.accumulation > 1)
    free = free_memory(str(world.device))
    if world.is_main:
        say(
            f"memory: a step needs about {memory.total / GIB:.2f} GiB beside the base's weights "
            f"({memory.gradients / GIB:.2f} gradients, {memory.optimizer / GIB:.2f} optimizer, "
            f"{memory.activations / GIB:.2f} activations); {free / GIB:.1f} GiB are free"
        )
    if memory.total > SLACK * free and not options.ignore_memory:
        raise ValueError(shortage(memory, free, options, plan))


def shortage(memory: StepMemory, free: float, options: TuneOptions, plan: BatchPlan) -> str:
    """What to do, in one sentence."""
    advice = []
    if plan.micro_batch_size > 1:
        advice.append(f"--loop.micro-batch-size {max(1, plan.micro_batch_size // 2)}")
    if not options.gradient_checkpointing:
        advice.append("--gradient-checkpointing")
    if not hasattr(options, "lora"):
        advice.append("a LoRA (diffusion.train_lora) or DeepSpeed with several GPUs")
    advice.append("--ignore-memory to try nevertheless")
    return (
        f"a step needs about {memory.total / GIB:.2f} GiB beside the weights and {free / GIB:.2f} GiB are free: "
        f"use {', or '.join(advice)}"
    )
