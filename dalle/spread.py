"""Images of many texts on the nodes of a cluster: each loads the generator once and makes whole batches."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from common.outputs.out_directory import Request
from dalle.engines import FastOptions
from dalle.inpaint import Source
from dalle.lines import LineControl
from dalle.pipeline import GeneratedImage, TextToImage
from dalle.sampling import SamplingOptions
from data_tools.engine import RayCluster


@dataclass
class GenerateBatches:
    """Batches of requests to their images, those of `TextToImage.draw`; picklable."""

    checkpoint: str
    """Directory that every node has under this path, or hub id."""
    device: str
    fast: FastOptions
    """As the first process has resolved it, so that all compute alike."""
    seed: int
    sampling: SamplingOptions
    negative: str
    source: Source | None
    line: LineControl | None
    _pipeline: TextToImage | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pipeline": None}

    def __call__(self, batches: Sequence[list[Request]]) -> list[list[GeneratedImage]]:
        if self._pipeline is None:  # once a process
            self._pipeline = TextToImage.from_pretrained(self.checkpoint, self.device, self.fast)
        return [[replace(made, ids=made.ids.cpu()) for made in self._generate(batch)] for batch in batches]

    def _generate(self, batch: list[Request]) -> Iterator[GeneratedImage]:
        options = (self.seed, self.sampling, self.negative, len(batch), self.source, self.line)
        return self._pipeline.generate_requests(batch, *options)


def generate_on(
    cluster: RayCluster, draw: GenerateBatches, requests: Iterable[Request], batch_size: int
) -> Iterator[GeneratedImage]:
    """The images of `requests`, in order. Raises what a node could not do, once for all."""
    stream = iter(requests)
    batches = iter(lambda: list(itertools.islice(stream, batch_size)), [])
    with cluster.connected():
        cluster = cluster.with_gpus(draw.device)
        for _, made in cluster.ordered_map(draw, ((None, [batch]) for batch in batches), _crashed):
            yield from made[0]


def _crashed(batch: list[Request]) -> list[GeneratedImage]:
    raise OSError(f"the images of {batch[0].text!r} ended their process each time they were tried")
