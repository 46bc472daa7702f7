"""Diffusion bases as systems of the arena: `sd=RUN` and `lora=RUN?lora=FILE:0.8`, by what the folder holds."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import from_mapping, to_mapping
from common.out_directory import Request
from diffusion.base import INDEX
from diffusion.pipeline import DiffusionToImage, Prompting
from diffusion.sampling import SamplingOptions

if TYPE_CHECKING:
    from evaluation.arms import ArmSpec


def is_diffusion(what: str) -> bool:
    """Whether a folder or a run is in diffusers' layout."""
    return any((Path(what) / name).is_file() for name in (INDEX, f"latest/{INDEX}"))


class DiffusionSystem:
    """What the arena asks of a pipeline, around a diffusion base."""

    def __init__(self, spec: "ArmSpec", seed: int, batch_size: int, device: str) -> None:
        """Raises FileNotFoundError or ValueError in one sentence that names the system."""
        values = dict(spec.sampling)
        loras = tuple(filter(None, values.pop("lora", "").split(",")))
        names = Prompting.__dataclass_fields__
        prompting = {n: values.pop(n) for n in list(values) if n in names}
        where = f"arm {spec.name}"
        self.sampling = from_mapping(SamplingOptions, values, where=where)
        self.prompting = from_mapping(Prompting, prompting, where=where)
        self.pipeline = DiffusionToImage.from_pretrained(spec.what, device, loras)
        self.seed, self.batch_size = seed, batch_size
        self.origin: dict[str, Any] = {
            "seed": seed,
            "sampling": to_mapping(self.sampling),
            "prompting": to_mapping(self.prompting),
            "checkpoint": self.pipeline.identity.sha256,
            "loras": self.pipeline.identity.loras,
        }

    def complaint(self, text: str) -> str:
        try:
            self.pipeline.note(text, self.prompting)
        except ValueError as error:
            return str(error)
        return ""

    def draw(self, requests: Sequence[Request]) -> Iterator[Any]:
        return self.pipeline.generate(requests, self.seed, self.sampling, self.prompting, self.batch_size)
