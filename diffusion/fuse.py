"""Merge LoRA adapters into a base for good: the result is an ordinary StableDiffusionPipeline folder.

    python -m diffusion.fuse BASE OUT --lora runs/emoji_lora
    python -m diffusion.fuse BASE OUT --lora style.safetensors:0.8 poster.safetensors:0.5

BASE is a folder in diffusers' layout, a run or a hub id; an adapter is a file, or a folder or run that holds one, with
its weight behind a colon. W + weight * alpha / r * B A is computed in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from common.config import command, parse_options
from common.files import atomic_directory
from common.log import say
from diffusion.base import load_base, save_base
from diffusion.lora.adapters import LoraSpec, fuse_


@dataclass(frozen=True)
class Options:
    """A base and adapters -> a base."""

    base: Annotated[str, tyro.conf.Positional]
    """Folder in diffusers' layout, a run of diffusion.train_base or diffusion.finetune, or a hub id."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write; must not exist."""
    lora: tuple[str, ...] = ()
    """Adapters, each FILE or FILE:WEIGHT."""

    def __post_init__(self) -> None:
        if not self.lora:
            raise ValueError("name at least one adapter with --lora")


@command
def main(argv: Sequence[str] | None = None) -> Path:
    """Returns the folder."""
    options = parse_options(Options, argv, description=__doc__)
    if options.out.exists():
        raise ValueError(f"{options.out} is there already: name a new folder")
    specs = [LoraSpec.parse(text) for text in options.lora]
    base = load_base(options.base)
    for line in fuse_(base, specs):
        say(line)
    with atomic_directory(options.out) as temporary:
        save_base(base, temporary)
    say(f"wrote {options.out}: it loads wherever the base does, without adapters")
    return options.out


if __name__ == "__main__":
    main()
