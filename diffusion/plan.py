"""The memory of fine-tuning or of a LoRA, before it is started; nothing is downloaded for Stable Diffusion 1.5.

    python -m diffusion.plan                                    # full fine-tuning of SD 1.5 at 512 px
    python -m diffusion.plan --method lora --micro-batch-size 4 --precision fp16
    python -m diffusion.plan --base runs/sd_base --resolution 128 --micro-batch-size 8 --gpu-memory 24

Counted on tensors without data from the real networks (see diffusion.tuning.memory), with gradient checkpointing
and without. diffusion.finetune and diffusion.train_lora make the same plan before their first step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from common.config import command, parse_options
from common.files import read_json
from common.log import say
from diffusion.base import find_base
from diffusion.lora.adapters import LoraOptions, add_adapter
from diffusion.tuning.memory import GIB, Networks, StepMemory, plan_step
from diffusion.tuning.options import TunePrecision
from diffusion.tuning.quantize import BaseBits

# Stable Diffusion 1.5 as its repository configures it; Taiyi has the same UNet and autoencoder.
SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD15_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
SD15_TEXT_PARAMETERS = 123_060_480  # CLIP ViT-L/14's text encoder


@dataclass(frozen=True)
class Options:
    """What is trained, at which size."""

    method: Literal["full", "lora"] = "full"
    """full: every weight of the UNet; lora: adapters."""
    base: str = ""
    """Folder in diffusers' layout, run or hub id; empty: Stable Diffusion 1.5 (and Taiyi)."""
    resolution: int = 512
    """Side of the training images in pixels."""
    micro_batch_size: int = 1
    """Images of one forward pass."""
    accumulates: bool = False
    """Several passes a step: their gradients live through the next forward."""
    text_len: int = 77
    """Tokens of a text: 77 for CLIP, up to 512 for Taiyi."""
    precision: TunePrecision = "bf16"
    """What is computed in; fp32 keeps larger activations."""
    base_bits: BaseBits = 32
    """Bits of the frozen weights under a LoRA."""
    lora: LoraOptions = field(default_factory=LoraOptions)
    ema: bool = False
    """Keep a moving average of the trained weights."""
    processes: int = 1
    """Processes that DeepSpeed shards over."""
    zero_stage: Literal[0, 1, 2] = 0
    """1 shards the optimizer's moments, 2 the gradients too."""
    gpu_memory: float = 0.0
    """Memory of the GPU in GiB, to say whether it fits; 0: do not."""

    def __post_init__(self) -> None:
        for name in ("resolution", "micro_batch_size", "text_len", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.base_bits != 32 and self.method != "lora":
            raise ValueError("base_bits is for LoRA: full fine-tuning trains float32 weights")
        if self.gpu_memory < 0:
            raise ValueError(f"gpu_memory must not be negative, not {self.gpu_memory}")


@dataclass(frozen=True)
class Plan:
    """Bytes of one process."""

    weights: float
    """Of UNet, autoencoder and text encoder."""
    plain: StepMemory
    """Without gradient checkpointing."""
    checkpointed: StepMemory
    """With it."""
    trained: int
    """Parameters that are trained."""
    lines: tuple[str, ...]

    def total(self, checkpointing: bool) -> float:
        return self.weights + (self.checkpointed if checkpointing else self.plain).total


def count_parameters(config: dict[str, Any], kind: str) -> int:
    import diffusers

    with torch.device("meta"):
        return sum(p.numel() for p in getattr(diffusers, kind).from_config(config).parameters())


def read_configs(options: Options) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Configs of UNet and autoencoder, and the text encoder's parameters. Raises ValueError for a single file."""
    if not options.base:
        return SD15_UNET, SD15_VAE, SD15_TEXT_PARAMETERS
    folder = find_base(options.base)
    if folder.is_file():
        raise ValueError(
            f"{folder} holds no configs: name a folder in diffusers' layout, or no base for SD 1.5"
        )
    unet, vae = (read_json(folder / part / "config.json") for part in ("unet", "vae"))
    size = sum(f.stat().st_size for f in Path(folder / "text_encoder").glob("*.safetensors"))
    return unet, vae, size // 4


def make_plan(options: Options) -> Plan:
    """Raises FileNotFoundError or ValueError where the base cannot be read or the size does not fit its networks."""
    unet, vae, text_parameters = read_configs(options)
    trained: list[int] = []

    def prepare(module: nn.Module) -> None:
        module.requires_grad_(True)
        if options.method == "lora":
            add_adapter(module, options.lora, "unet")
        trained.append(sum(p.numel() for p in module.parameters() if p.requires_grad))

    networks = Networks(unet, vae, options.text_len, prepare)
    sizes = (options.micro_batch_size, options.resolution, options.precision)
    shared = (options.ema, options.processes, options.zero_stage, options.accumulates)
    plain, checkpointed = (plan_step(networks, *sizes, on, *shared) for on in (False, True))
    parameters = count_parameters(unet, "UNet2DConditionModel")
    others = count_parameters(vae, "AutoencoderKL") + text_parameters
    own_bits = options.base_bits if options.method == "lora" else 32
    extra = 4.0 * trained[0] if options.method == "lora" else 0.0
    weights = parameters * own_bits / 8 + others * 4.0 + extra
    lines = (
        f"base         {parameters / 1e6:.1f}M parameters of the UNet, {others / 1e6:.1f}M of autoencoder and text "
        "encoder",
        f"trained      {trained[0]:,} parameters ({options.method})",
        f"weights      {weights / GIB:.2f} GiB",
        f"gradients    {plain.gradients / GIB:.2f} GiB",
        f"optimizer    {plain.optimizer / GIB:.2f} GiB"
        + (f" and {plain.average / GIB:.2f} of moving average" if options.ema else ""),
        f"activations  {plain.activations / GIB:.2f} GiB, {checkpointed.activations / GIB:.2f} with gradient "
        f"checkpointing ({options.micro_batch_size} images of {options.resolution} px, {options.precision}), beside "
        "the gradients at the worst moment",
        f"encoding     {plain.encoding / GIB:.2f} GiB in the autoencoder, before the step (none with cached latents)",
    )
    return Plan(weights, plain, checkpointed, trained[0], lines)


def verdict(plan: Plan, gpu_memory: float) -> str:
    """Whether it fits into that many GiB."""
    plain, checkpointed = plan.total(False) / GIB, plan.total(True) / GIB
    said = f"total        {plain:.1f} GiB, {checkpointed:.1f} with gradient checkpointing"
    if not gpu_memory:
        return said
    usable = 0.95 * gpu_memory
    if plain <= usable:
        return f"{said}: it fits into {gpu_memory:g} GiB"
    if checkpointed <= usable:
        return f"{said}: it fits into {gpu_memory:g} GiB with --gradient-checkpointing"
    return f"{said}: it does not fit into {gpu_memory:g} GiB; a LoRA, fewer images a pass or DeepSpeed may"


@command
def main(argv: Sequence[str] | None = None) -> Plan:
    """Print the plan; returns it."""
    options = parse_options(Options, argv, description=__doc__)
    plan = make_plan(options)
    for line in plan.lines:
        say(line)
    say(verdict(plan, options.gpu_memory))
    return plan


if __name__ == "__main__":
    main()
