"""Train a LoRA of a Stable Diffusion base on a style or a product line.

    python -m diffusion.train_lora --base runs/sd_base --data.source ../shared/data/emoji/train
    python -m diffusion.train_lora --config configs/diffusion/emoji.yaml --base runs/sd_base
    torchrun --nproc_per_node 2 -m diffusion.train_lora --config configs/diffusion/emoji.yaml --base runs/sd_base

The data are a folder of images/STEM.png and captions/STEM.txt, shards, or any format that data_tools reads. Every
checkpoint holds pytorch_lora_weights.safetensors, which diffusers' load_lora_weights reads, and with --layout kohya the
file for ComfyUI and WebUI too. The same command started again goes on from the newest checkpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from common.checkpoint import FORMAT
from common.config import command, parse_options, to_mapping
from common.distributed import World, start_world, stop_world
from common.files import sha256_file, write_json
from common.image import make_grid
from common.log import say
from common.loop import LoopConfig
from common.optim import OptimConfig
from diffusion.base import DiffusionBase, make_pipeline
from diffusion.lora.adapters import LoraOptions, add_adapter, base_norm, parts_of, trained_norm
from diffusion.lora.formats import WEIGHTS_FILE, Layout, write_lora
from diffusion.sampling import SamplingOptions
from diffusion.tuning.options import DataOptions, TuneOptions
from diffusion.tuning.prior import Prior, PriorOptions
from diffusion.tuning.quantize import BaseBits, quantize_base_
from diffusion.tuning.run import open_base, run
from diffusion.tuning.samples import sample_images

KIND = "lora"
KOHYA_FILE = "lora_kohya.safetensors"
SMALL_LR = 1e-6


def _optim() -> OptimConfig:
    return OptimConfig(
        lr=1e-4, warmup_steps=0, schedule="constant", weight_decay=0.01, beta2=0.999, grad_clip=1.0
    )


def _loop() -> LoopConfig:
    return LoopConfig(run_dir=Path("runs/lora"), num_steps=1000, global_batch_size=4)


@dataclass(frozen=True)
class Options(TuneOptions):
    """A base and images -> an adapter."""

    lora: LoraOptions = field(default_factory=LoraOptions)
    layout: Layout = "diffusers"
    """diffusers: pytorch_lora_weights.safetensors; kohya: for ComfyUI and WebUI lora_kohya.safetensors beside it."""
    base_bits: BaseBits = 32
    """Bits of the frozen base: 16 halves its memory; 8 and 4 need bitsandbytes or torchao (QLoRA)."""
    prior: PriorOptions = field(default_factory=PriorOptions)
    data: DataOptions = field(default_factory=DataOptions)
    optim: OptimConfig = field(default_factory=_optim)
    loop: LoopConfig = field(default_factory=_loop)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.deepspeed.zero_stage == 3:
            raise ValueError("deepspeed.zero_stage 3 shards weights that never change here: use 1 or 2")
        if self.prior.text and len(self.data.buckets.resolutions) > 1:
            raise ValueError("prior images have one size: give data.buckets.resolutions one number")
        if self.prior.text and not self.data.enlarge and self.data.buckets.max_aspect > 1:
            raise ValueError(
                "prior images are squares: set --data.buckets.max-aspect 1, or --data.enlarge True for small images"
            )


class LoraMethod:
    """What `TuneTask` asks of LoRA."""

    def __init__(self, options: Options, base: DiffusionBase, resolution: int) -> None:
        self.options, self.resolution, self.trains_text = options, resolution, options.lora.text_encoder
        self.modules = {"unet": base.unet}
        if self.trains_text:
            self.modules["text_encoder"] = base.text_encoder
        for part, module in self.modules.items():
            add_adapter(module, options.lora, part)
        self.norms = {part: base_norm(module) for part, module in self.modules.items()}
        self.before: list[Image.Image] = []

    def metrics(self) -> dict[str, float]:
        """The norm of the update over that of the weights it changes: what has been learned at all."""
        return {
            f"{part}_update": trained_norm(module, base=self.norms[part])
            for part, module in self.modules.items()
        }

    def save(self, directory: Path, step: int, base: DiffusionBase) -> None:
        parts = parts_of(base)
        path = write_lora(directory / WEIGHTS_FILE, parts)
        if self.options.layout == "kohya":
            write_lora(directory / KOHYA_FILE, parts, "kohya")
        config = {
            "format": FORMAT,
            "kind": KIND,
            "step": step,
            "sha256": sha256_file(path),
            "model": to_mapping(self.options.lora),
            "base": str(base.path),
            "base_licence": base.licence,
            "text_len": base.text_len,
            "versions": {"torch": torch.__version__},
        }
        write_json(directory / "config.json", config)

    def sample(self, base: DiffusionBase, texts: tuple[str, ...]) -> dict[str, Image.Image]:
        """For each text a row of the base above a row with the adapter, from the same noise."""
        pipeline, columns = make_pipeline(base), 4
        arguments = (base, texts, columns, self.resolution, self.options)
        if not self.before:
            pipeline.disable_lora()
            self.before = sample_images(*arguments)
            pipeline.enable_lora()
        after = sample_images(*arguments)
        rows: list[Image.Image] = []
        for start in range(0, len(after), columns):
            rows += self.before[start : start + columns] + after[start : start + columns]
        return {"before_after": make_grid(rows, columns)}


def warn_of_small_lr(options: Options) -> None:
    """The published 1e-7 moves nothing: docs/log/diffusion_tuning.md."""
    if options.optim.lr < SMALL_LR:
        say(
            f"warning: at learning rate {options.optim.lr:g} a LoRA learns next to nothing: 1e-4 is usual; watch "
            "unet_update, the norm of the update over that of the weights"
        )


def prepare_prior(options: Options, base: DiffusionBase, resolution: int, world: World) -> Prior | None:
    if not options.prior.text:
        return None
    sampling = SamplingOptions(num_steps=options.sample_steps, cfg_scale=options.guidance)
    return Prior.prepare(options.prior, base, resolution, sampling, world, options.precision)


@command
def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train; returns the last evaluation."""
    options = parse_options(Options, argv, description=__doc__)
    world = start_world(options.device)
    try:
        if world.is_main:
            warn_of_small_lr(options)

        def make(base: DiffusionBase, resolution: int) -> tuple[LoraMethod, dict[str, Any]]:
            prior = prepare_prior(options, base, resolution, world)
            said = quantize_base_(base.unet, options.base_bits, options.precision)
            if world.is_main:
                say(said)
            return LoraMethod(options, base, resolution), {"prior": prior}

        return run(options, world, open_base(options, world), make)
    finally:
        stop_world()


if __name__ == "__main__":
    main()
