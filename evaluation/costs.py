"""What a system took to train and how large it is, as its checkpoint records it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import read_json


@dataclass(frozen=True)
class Costs:
    """None where the checkpoint does not say."""

    parameters: int | None = None
    training_hours: float | None = None
    images_seen: int | None = None
    """By the generator or the UNet, repetitions counted."""


def read_costs(what: str) -> Costs:
    """Of a checkpoint or run directory; nothing is known of anything else."""
    directory = next((d for d in (Path(what), Path(what) / "latest") if (d / "config.json").is_file()), None)
    if directory is None:
        return Costs(count_parameters(Path(what)) if Path(what).is_dir() else None)
    config, training = (_mapping(directory / name) for name in ("config.json", "train_config.json"))
    seen, batch = config.get("images_seen"), _mapping(training.get("loop")).get("global_batch_size")
    if seen is None and isinstance(batch, int) and isinstance(config.get("step"), int):
        seen = config["step"] * batch
    return Costs(count_parameters(directory), config.get("training_hours"), seen)


def count_parameters(directory: Path) -> int | None:
    """Numbers in all safetensors files of a checkpoint, from their headers alone; None without any."""
    files = [f for pattern in ("*.safetensors", "*/*.safetensors") for f in directory.glob(pattern)]
    return sum(map(_numbers_in, files)) if files else None


def _numbers_in(path: Path) -> int:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    total = 0
    for name, entry in header.items():
        if name != "__metadata__":
            count = 1
            for side in entry["shape"]:
                count *= side
            total += count
    return total


def _mapping(source: Path | Any) -> dict[str, Any]:
    if isinstance(source, Path):
        source = read_json(source) if source.is_file() else {}
    return source if isinstance(source, dict) else {}
