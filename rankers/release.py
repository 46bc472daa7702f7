"""A ranker to give away: weights in 16 bits, without the state that only training needs.

python -m rankers.release runs/goods_128_ranker pretrained/goods-128/ranker
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from common import checkpoint
from common.config import command, parse_options
from common.files import atomic_directory, size_of
from common.log import say
from rankers.calibration import FILE as CALIBRATION
from rankers.model import KIND, TOWERS

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Options:
    """Write a ranker's checkpoint directory without its training state."""

    source: tyro.conf.Positional[str]
    """Checkpoint or run directory."""
    destination: tyro.conf.Positional[Path]
    """Directory to write; what is there is replaced when it is a ranker."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Numbers of the weights; float16 is the finer of the two short ones."""


@command
def main(argv: Sequence[str] | None = None) -> Path:
    options = parse_options(Options, argv, description=__doc__)
    source, destination = checkpoint.resolve(options.source), options.destination
    config = checkpoint.read_config(source, KIND)
    if destination.exists() and any(destination.iterdir()):
        checkpoint.read_config(destination, KIND)  # never replaces anything else
    dtype = DTYPES[options.dtype]
    weights = checkpoint.read_weights(source)
    largest = torch.finfo(dtype).max
    wide = [n for n, t in weights.items() if t.is_floating_point() and t.abs().max() > largest]
    if wide:
        raise ValueError(f"{source}: {wide[0]} has values beyond {options.dtype}: use --dtype bfloat16")
    short = {n: t.to(dtype) if t.is_floating_point() else t for n, t in weights.items()}
    with atomic_directory(destination) as directory:
        checkpoint.write_model(directory, KIND, config["model"], short, config["step"])
        shutil.copytree(source / TOWERS, directory / TOWERS)
        for name in (CALIBRATION, "train_config.json"):
            if (source / name).is_file():
                shutil.copyfile(source / name, directory / name)
    say(f"wrote {destination}, {size_of(destination) / 2**20:.1f} MiB")
    return destination


if __name__ == "__main__":
    main()
