"""What a system took to train, how large it is, and what generating with it takes.

Checkpoints record hours and images (common/loop.py); those of runs that did not are read off the run's log. Parts that
a system stands on count: an image tokenizer, the base of a fine-tune or of an adapter, an autoencoder.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.files import read_json
from common.log import logged_hours
from common.run_dir import best_step, latest_step
from gan.model import KIND as GAN

COSTS = "costs.json"  # beside images that the arena generated
ADAPTER = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Costs:
    """None where it is not known."""

    parameters: int | None = None
    training_hours: float | None = None
    images_seen: int | None = None
    """In training, by the generator, the UNet or what else makes the images, repetitions counted."""
    memory_bytes: int | None = None
    """Peak while images were generated, beyond what the process held before the system was opened."""
    note: str = ""
    """Which parts are not counted in the hours."""

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_json(cls, values: Any) -> "Costs":
        """Of what `to_json` gave; unknown keys say nothing."""
        known = values if isinstance(values, dict) else {}
        return cls(**{name: known[name] for name in cls.__dataclass_fields__ if name in known})


def read_costs(what: str | Path, loras: Sequence[str] = ()) -> Costs:
    """Of a checkpoint or run directory, a folder in diffusers' layout, or images that the arena generated; nothing is
    known of anything else. `loras`: FILE or FILE:WEIGHT of adapters that are merged into it."""
    directory = _checkpoint_of(Path(what))
    if directory is None:
        return Costs()
    if (directory / COSTS).is_file():
        return Costs.from_json(read_json(directory / COSTS))
    found = _own_costs(directory)
    for lora in loras:
        found = _with_adapter(found, Path(lora) if Path(lora).exists() else Path(lora.rpartition(":")[0]))
    return found


def _checkpoint_of(path: Path) -> Path | None:
    """The checkpoint that a run means: its best for a GAN, which is what is sampled from, else its latest."""
    if not path.is_dir():
        return None
    best = best_step(path)
    if best and _mapping(best / "config.json").get("kind") == GAN:
        return best
    return latest_step(path) or path


def _own_costs(directory: Path) -> Costs:
    config = _mapping(directory / "config.json")
    if (
        config.get("_class_name") == "AutoencoderKL"
    ):  # as diffusion.train_base writes it, beside what trained it
        trained = latest_step(directory.parent / "autoencoder")
        found = _trained(trained) if trained else Costs()
        return replace(found, parameters=count_parameters(directory))
    found = replace(_trained(directory), parameters=count_parameters(directory))
    tokenizer = directory / "image_tokenizer"
    if (tokenizer / "config.json").is_file():
        found = _with_part(found, _trained(tokenizer), "the image tokenizer")
    base = config.get("base_costs")
    if isinstance(base, dict):
        found = _with_part(found, Costs.from_json(base), "the base", images=True)
    return found


def _trained(directory: Path) -> Costs:
    """Hours and images of one training, without the parts that it stands on."""
    config, training = (_mapping(directory / name) for name in ("config.json", "train_config.json"))
    step, batch = config.get("step"), _mapping(training.get("loop")).get("global_batch_size")
    seen, hours = config.get("images_seen"), config.get("training_hours")
    if isinstance(batch, int) and isinstance(step, int):
        seen = step * batch if seen is None else seen
        hours = logged_hours(directory.parent / "metrics.jsonl", step, batch) if hours is None else hours
    return Costs(training_hours=hours, images_seen=seen)


def _with_part(found: Costs, part: Costs, name: str, images: bool = False) -> Costs:
    """The same with a part's hours, or with a note that they are not known."""
    if images and found.images_seen is not None and part.images_seen is not None:
        found = replace(found, images_seen=found.images_seen + part.images_seen)
    if found.training_hours is None:
        return found
    if part.training_hours is None:
        return replace(found, note=f"without {name}, whose hours are not recorded")
    return replace(found, training_hours=found.training_hours + part.training_hours)


def _with_adapter(base: Costs, path: Path) -> Costs:
    """A base and an adapter: a file, a checkpoint or a run of diffusion.train_lora."""
    directory = path.parent if path.is_file() else _checkpoint_of(path)
    if directory is None:
        return base
    file = path if path.is_file() else directory / ADAPTER
    own = _trained(directory)
    count = numbers_in(file) if file.is_file() else None
    known = base.parameters is not None and count is not None
    return _with_part(
        replace(own, parameters=base.parameters + count if known else None), base, "the base", images=True
    )


def count_parameters(directory: Path) -> int | None:
    """Numbers in all safetensors files of a checkpoint, from their headers alone; None without any."""
    files = [f for pattern in ("*.safetensors", "*/*.safetensors") for f in directory.glob(pattern)]
    return sum(map(numbers_in, files)) if files else None


def numbers_in(path: Path) -> int:
    """Numbers in a safetensors file."""
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
