"""The generator's own recorded scores as a ranker: log p(image | text), over what the text adds where that is known.

log p(image | text) alone prefers plain images, whatever the text; minus log p(image | no text) it says how much the
text explains (the idea of CogView's inverse prompting, arXiv 2105.13290, for models that read text first).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from rankers.base import content_hash
from rankers.outdir import read_out_directory


class LikelihoodRanker:
    """Looks scores up by text and content of the image; it can score no image that was not recorded."""

    calibration = None

    def __init__(self, name: str, scores: dict[tuple[str, bytes], float]) -> None:
        self.name, self.scores = name, scores

    @classmethod
    def from_directory(cls, directory: Path) -> "LikelihoodRanker":
        """From what generate.py wrote. Raises FileNotFoundError or ValueError when there are no scores."""
        scores = {}
        for row in read_out_directory(directory):
            if row.log_likelihood is None:
                raise ValueError(f"{directory}/images.jsonl records no log_likelihood for {row.file}")
            score = row.log_likelihood - (row.null_log_likelihood or 0.0)
            with Image.open(directory / row.file) as image:
                scores[row.text, content_hash(image)] = score
        return cls(f"likelihood:{directory}", scores)

    def score(self, text: str, images: Sequence[Image.Image]) -> Tensor:
        """Nats (N,). Raises ValueError for an image without a recorded score for that text."""
        if not len(images):
            raise ValueError("no images to score")
        keys = [(text, content_hash(image)) for image in images]
        unknown = [i for i, key in enumerate(keys) if key not in self.scores]
        if unknown:
            raise ValueError(f"{self.name} records no score for image {unknown[0]} with the text {text!r}")
        return torch.tensor([self.scores[key] for key in keys], dtype=torch.float32)
