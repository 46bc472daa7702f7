"""A LoRA file in another layout: for ComfyUI and WebUI, or for diffusers.

    python -m diffusion.convert_lora runs/emoji_lora emoji_comfy.safetensors
    python -m diffusion.convert_lora civitai.safetensors out.safetensors --layout diffusers --base BASE

ComfyUI and WebUI answer files of diffusers' layout with "lora key not loaded". A file of kohya's layout has underscores
for dots, so its names are found again with the help of a base.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from common.config import command, parse_options
from common.log import say
from diffusion.base import load_base
from diffusion.lora.formats import Layout, find_file, named_for, read_lora, write_lora


@dataclass(frozen=True)
class Options:
    """A LoRA file -> a LoRA file."""

    source: Annotated[Path, tyro.conf.Positional]
    """A .safetensors file, or a folder or run that holds one."""
    target: Annotated[Path, tyro.conf.Positional]
    """File to write, .safetensors."""
    layout: Layout = "kohya"
    """kohya: ComfyUI and WebUI; diffusers: `load_lora_weights`."""
    base: str = ""
    """Base that the adapter is for; needed where the source has kohya's layout, else it is only checked."""

    def __post_init__(self) -> None:
        if self.target.suffix != ".safetensors":
            raise ValueError(f"the target must end in .safetensors, not {self.target}")


@command
def main(argv: Sequence[str] | None = None) -> Path:
    """Returns the file."""
    options = parse_options(Options, argv, description=__doc__)
    source = find_file(options.source)
    file = read_lora(source)
    parts = file.parts
    if options.base:
        base = load_base(options.base)
        parts = {p: named_for(getattr(base, p), layers, p, str(source)) for p, layers in parts.items()}
    elif file.layout == "kohya" and options.layout != "kohya":
        raise ValueError(f"{source} has kohya's layout: name the base that it is for with --base")
    if not file.has_alpha:
        say(f"note: {source} does not say its alpha: alpha = rank is written, as diffusers would take it")
    write_lora(options.target, parts, options.layout)
    count = sum(len(layers) for layers in parts.values())
    say(f"{source} ({file.layout}) -> {options.target} ({options.layout}): {count} layers")
    return options.target


if __name__ == "__main__":
    main()
