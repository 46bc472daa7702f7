"""Line drawings for prompts: of the reference image whose caption the prompt is."""

from dataclasses import dataclass, field
from typing import get_args

import numpy as np

from common.square import resize_square
from data_tools.images import LineMethod
from data_tools.images.line_drawings import extract
from data_tools.shards.captions import pick_caption
from data_tools.shards.index import ShardIndex
from data_tools.shards.loader import IMAGE_SUFFIXES, open_image


@dataclass(frozen=True)
class ReferenceDrawings:
    """Drawings of the first reference image of each caption."""

    index: ShardIndex
    method: LineMethod
    index_of: dict[str, int] = field(repr=False)
    """Place of the first image with a caption."""

    @classmethod
    def open(cls, source: str, split: str, method: str) -> "ReferenceDrawings":
        """Raises FileNotFoundError or ValueError for unknown methods, and where there are no shards."""
        if method not in get_args(LineMethod):
            raise ValueError(f"lines must be one of {', '.join(get_args(LineMethod))}, not {method!r}")
        index = ShardIndex.open(source, split).require(*IMAGE_SUFFIXES)
        index_of: dict[str, int] = {}
        for i in range(len(index)):
            text = pick_caption(index.read(i, ("txt",)).get("txt", b""), None)
            index_of.setdefault(text, i)
        return cls(index, method, index_of)

    @property
    def identity(self) -> str:
        """What tells the images from others."""
        return self.index.fingerprint

    def complaint(self, text: str) -> str:
        """Why there is no drawing for a prompt, or ""."""
        if text in self.index_of:
            return ""
        return f"no reference image has the caption {text!r}, so there is no drawing for it"

    def lines(self, text: str, size: int) -> np.ndarray:
        """(size, size) uint8, white on black. Raises CorruptSample where the image cannot be read."""
        members = self.index.read(self.index_of[text], IMAGE_SUFFIXES)
        data = next((members[s] for s in IMAGE_SUFFIXES if s in members), b"")
        return extract(resize_square(open_image(data), size), self.method)
