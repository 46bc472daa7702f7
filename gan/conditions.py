"""What an image is generated and judged for: a text and a category."""

from typing import NamedTuple

from torch import Tensor


class Condition(NamedTuple):
    """What images are made for."""

    text_ids: Tensor  # (B, T) long
    labels: Tensor  # (B,) long, 0 without category
    has_text: Tensor  # (B,) bool
