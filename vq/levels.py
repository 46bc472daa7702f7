"""A tokenizer of several codes a position -> the same one with its first codes alone, for generators of fewer codes.

    python -m vq.levels runs/goods_128_vqgan runs/goods_128_vqgan_1 --code-depth 1

Encoder and decoder stay. It is of use where the decoder was trained for that (--model.level-dropout).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from common.config import command, parse_options
from common.log import say
from common.outputs.record import new_directory, require_new
from vq.model import ImageTokenizer


@dataclass(frozen=True)
class Options:
    """Keep the first codes of each position."""

    source: Annotated[str, tyro.conf.Positional]
    """Image tokenizer: a checkpoint, a run directory or a hub id."""
    target: Annotated[Path, tyro.conf.Positional]
    """Directory to write."""
    code_depth: int = 1
    """Codes a position to keep."""


def first_levels(tokenizer: ImageTokenizer, code_depth: int) -> ImageTokenizer:
    """A copy with the codebooks of the first levels. Raises ValueError where there are no more than those."""
    config = tokenizer.config
    if not 1 <= code_depth < config.code_depth:
        raise ValueError(
            f"code_depth must lie below the {config.code_depth} of the tokenizer and be at least 1, not {code_depth}"
        )
    level_dropout = config.level_dropout if code_depth > 1 else 0.0
    result = ImageTokenizer(replace(config, code_depth=code_depth, level_dropout=level_dropout))
    weights = tokenizer.state_dict()
    name = "quantizer.codebook.weight"
    weights[name] = weights[name][: code_depth * config.codebook_size]
    result.load_state_dict(weights)
    return result.eval()


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, argv, description=__doc__)
    require_new(options.target)
    result = first_levels(ImageTokenizer.from_pretrained(options.source), options.code_depth)
    with new_directory(options.target) as directory:
        result.write(directory, 0)
    say(f"{options.target}: {result.config.code_depth} codes a position, {result.codes_sha256[:12]}")


if __name__ == "__main__":
    main()
