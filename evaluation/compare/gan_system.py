"""A GAN as a system of the arena: `gan=RUN?psi=0.8`."""

from collections.abc import Iterator, Sequence
from typing import Any

from common.config import from_mapping, to_mapping
from common.outputs.out_directory import Request
from gan.pipeline import SamplingOptions, TextToGan


class GanSystem:
    """What the arena asks of a pipeline, around a GAN."""

    def __init__(self, what: str, sampling: dict[str, str], name: str, seed: int, device: str) -> None:
        """Raises FileNotFoundError or ValueError in one sentence."""
        self.sampling = from_mapping(SamplingOptions, sampling, where=f"system {name}")
        self.pipeline, self.seed = TextToGan.from_pretrained(what, device), seed
        self.label = self.pipeline.label_number(self.sampling.category)
        self.origin: dict[str, Any] = {
            "seed": seed,
            "sampling": to_mapping(self.sampling),
            "checkpoint": self.pipeline.sha256,
        }

    def complaint(self, text: str) -> str:
        try:
            self.pipeline.complain(text, self.label)
        except ValueError as error:
            return str(error)
        return ""

    def generate(self, requests: Sequence[Request]) -> Iterator[Any]:
        return self.pipeline.generate(requests, self.seed, self.sampling)
