"""Several rankers as one: the mean of the ranks that each gives within a prompt. Their scales never meet."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor


class EnsembleRanker:
    """Mean rank over rankers, from 0 (last by all) to 1 (first by all)."""

    calibration = None

    def __init__(self, rankers: Sequence[Any]) -> None:
        if len(rankers) < 2:
            raise ValueError("an ensemble needs at least two rankers")
        self.rankers = list(rankers)

    @property
    def name(self) -> str:
        return ",".join(ranker.name for ranker in self.rankers)

    def score(self, text: str, images: Sequence[Image.Image]) -> Tensor:
        """(N,) in [0, 1]."""
        return torch.stack([ranks(ranker.score(text, images)) for ranker in self.rankers]).mean(0)


def ranks(scores: Tensor) -> Tensor:
    """(N,) -> place from 0 (lowest) to 1 (highest), equal scores share theirs; 0.5 for a single one."""
    if len(scores) == 1:
        return torch.full((1,), 0.5)
    below = (scores[None, :] < scores[:, None]).sum(1)
    equal = (scores[None, :] == scores[:, None]).sum(1) - 1
    return (below + equal / 2).float() / (len(scores) - 1)
