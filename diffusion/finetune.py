"""Fine-tune a Stable Diffusion base on images and captions: every weight of its UNet.

    python -m diffusion.finetune --base runs/sd_base --data.source ../shared/data/goods --data.buckets.resolutions 128
    python -m diffusion.finetune --config configs/diffusion/ecommerce.yaml --data.source ECOMMERCE_T2I
    torchrun --nproc_per_node 8 -m diffusion.finetune --config configs/diffusion/ecommerce.yaml
    deepspeed --num_gpus 8 --module diffusion.finetune --config configs/diffusion/ecommerce.yaml

The data are Tianchi ECommerce-T2I's TSV files, shards, a folder of images/ and captions/, or any other format that
data_tools reads. Before the first step the memory is planned (see diffusion.plan). Every checkpoint is an ordinary
StableDiffusionPipeline folder. The same command started again goes on from the newest checkpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from common.checkpoint import FORMAT
from common.config import command, parse_options
from common.distributed import start_world, stop_world
from common.files import read_json, write_json
from common.loop import LoopConfig
from common.optim import OptimConfig
from diffusion.base import KIND, DiffusionBase, base_sha256, save_base
from diffusion.tuning.options import DataOptions, TuneOptions
from diffusion.tuning.run import open_base, run
from diffusion.tuning.samples import sample_grid


def _optim() -> OptimConfig:
    return OptimConfig(
        lr=1e-5, warmup_steps=1000, schedule="constant", weight_decay=0.01, beta2=0.999, grad_clip=1.0
    )


def _loop() -> LoopConfig:
    return LoopConfig(run_dir=Path("runs/finetune"), num_steps=10_000, global_batch_size=8)


@dataclass(frozen=True)
class Options(TuneOptions):
    """A base and images -> a base."""

    train_text_encoder: bool = False
    """Train the text encoder too."""
    ema_decay: float = 0.0
    """Decay of the moving average of weights that is saved; 0: none."""
    data: DataOptions = field(default_factory=DataOptions)
    optim: OptimConfig = field(default_factory=_optim)
    loop: LoopConfig = field(default_factory=_loop)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), not {self.ema_decay}")
        if self.ema_decay and self.deepspeed.zero_stage == 3:
            raise ValueError("a moving average needs whole weights: use deepspeed.zero_stage 1 or 2")


class FullMethod:
    """What `TuneTask` asks of full fine-tuning."""

    def __init__(self, options: Options, base: DiffusionBase, resolution: int) -> None:
        self.options, self.resolution, self.trains_text = options, resolution, options.train_text_encoder
        self.base_costs = recorded_costs(base.path)
        base.unet.requires_grad_(True)
        if self.trains_text:
            base.text_encoder.requires_grad_(True)
            for name, parameter in base.text_encoder.named_parameters():
                if name.startswith("pooler."):  # of BERT: its output is not read
                    parameter.requires_grad_(False)

    def metrics(self) -> dict[str, float]:
        return {}

    def save(self, directory: Path, step: int, base: DiffusionBase) -> None:
        save_base(base, directory)
        config = {
            "format": FORMAT,
            "kind": KIND,
            "step": step,
            "sha256": base_sha256(directory),
            "model": {"fine_tuned_from": str(base.path), "text_len": base.text_len},
            "base_costs": self.base_costs,
            "versions": {"torch": torch.__version__},
        }
        write_json(directory / "config.json", config)

    def sample(self, base: DiffusionBase, texts: tuple[str, ...]) -> dict[str, Image.Image]:
        return {"samples": sample_grid(base, texts, self.resolution, self.options)}


def recorded_costs(path: Path) -> dict[str, Any]:
    """Hours and images that the base's own training took, as far as it records them."""
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    names = ("training_hours", "images_seen")
    return {name: config[name] for name in names if isinstance(config, dict) and name in config}


@command
def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train; returns the last evaluation."""
    options = parse_options(Options, argv, description=__doc__)
    world = start_world(options.device)
    try:

        def make(base: DiffusionBase, resolution: int) -> tuple[FullMethod, dict[str, Any]]:
            return FullMethod(options, base, resolution), {"ema_decay": options.ema_decay}

        return run(options, world, open_base(options, world), make)
    finally:
        stop_world()


if __name__ == "__main__":
    main()
