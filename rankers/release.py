"""A ranker to give away: weights in 16 or 8 bits, without the state that only training needs.

python -m rankers.release runs/goods_128_ranker pretrained/goods-128/ranker
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from common import checkpoint
from common.compact import Precision, compact
from common.config import command, parse_options
from common.files import atomic_directory, size_of
from common.lock import locked
from common.log import say
from rankers.calibration import FILE as CALIBRATION
from rankers.clip import own_ranker
from rankers.model import KIND, TOWERS


@dataclass(frozen=True)
class Options:
    """Write a ranker's checkpoint directory without its training state."""

    source: tyro.conf.Positional[str]
    """Checkpoint or run directory."""
    destination: tyro.conf.Positional[Path]
    """Directory to write; what is there is replaced when it is a ranker."""
    precision: Precision = "float16"
    """Numbers that weights are kept in."""


@command
def main(argv: Sequence[str] | None = None) -> Path:
    options = parse_options(Options, argv, description=__doc__)
    source, destination = checkpoint.resolve(options.source), options.destination
    config = checkpoint.read_config(source, KIND)
    if destination.exists() and any(destination.iterdir()):
        checkpoint.read_config(destination, KIND)  # never replaces anything else
        _require_only_a_release(destination)
    try:
        short = compact(checkpoint.read_weights(source), options.precision)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    origin = {"released_from": own_ranker(source, device="cpu").identity}
    alone = locked(destination.parent, f".{destination.name}.lock")
    with alone, atomic_directory(destination) as directory:
        checkpoint.write_model(directory, KIND, {**config["model"], **origin}, short, config["step"])
        shutil.copytree(source / TOWERS, directory / TOWERS)
        if (source / CALIBRATION).is_file():
            shutil.copyfile(source / CALIBRATION, directory / CALIBRATION)
    say(f"wrote {destination}, {size_of(destination) / 2**20:.1f} MiB")
    return destination


def _require_only_a_release(destination: Path) -> None:
    """Raises ValueError where the directory holds more than a release, which replacing it would lose."""
    ours = {"config.json", "model.safetensors", TOWERS, CALIBRATION}
    others = sorted(path.name for path in destination.iterdir() if path.name not in ours)
    if others:
        raise ValueError(f"{destination} also holds {others[0]}: move it away or name a new directory")


if __name__ == "__main__":
    main()
