"""Real images that generated ones are measured against: image shards, opened an image at a time."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from common.square import resize_square
from data_tools.rules.colors import find_color
from data_tools.shards.captions import pick_caption
from data_tools.shards.index import ShardIndex
from data_tools.shards.loader import IMAGE_SUFFIXES, CorruptSample, open_image
from rankers.training.pairs import AttributeConfig, read_meta, value_of


@dataclass(frozen=True)
class Facts:
    """What the shards say of an image, "" where they say nothing."""

    key: str
    caption: str
    category: str
    color: str
    """The colour's name where the caption names it."""
    word: str
    """The noun that the caption uses for the category."""
    known_color: str = ""
    """The colour's name, also where the caption does not name it."""


class ReferenceImages:
    """The images of one split, centre squares of `side` pixels: generated ones are compared at their own size."""

    def __init__(
        self,
        index: ShardIndex,
        side: int,
        attributes: AttributeConfig | None = None,
        word_field: str = "item_zh",
        limit: int = 0,
    ) -> None:
        """`limit`: the first images only; 0 takes all."""
        self.index, self.side, self.word_field = index, side, word_field
        self.attributes = attributes or AttributeConfig()
        self.count = min(limit, len(index)) if limit else len(index)

    @classmethod
    def of_split(cls, source: str, split: str, side: int, **options: Any) -> "ReferenceImages":
        """Raises FileNotFoundError or ValueError when the shards cannot be read."""
        return cls(ShardIndex.open(source, split).require(*IMAGE_SUFFIXES), side, **options)

    @property
    def name(self) -> str:
        return str(self.index.paths[0].parent)

    def __len__(self) -> int:
        return self.count

    def key(self, i: int) -> bytes:
        return hashlib.sha256(self._bytes(i) + f" square {self.side}".encode()).digest()

    def open(self, i: int) -> Image.Image:
        return resize_square(open_image(self._bytes(i)), self.side)

    def _bytes(self, i: int) -> bytes:
        members = self.index.read(i, IMAGE_SUFFIXES)
        return next((members[s] for s in IMAGE_SUFFIXES if s in members), b"")

    def facts(self, i: int) -> Facts:
        """Of one image; damaged JSON says nothing."""
        members = self.index.read(i, ("txt", "json"))
        caption = pick_caption(members.get("txt", b""), None)
        try:
            meta = read_meta(members.get("json", b""))
        except CorruptSample:
            meta = {}
        color = value_of(meta, self.attributes.color_field)
        return Facts(
            self.index.samples[i].key,
            caption,
            value_of(meta, self.attributes.label_field),
            find_color(caption, [color])[0],
            value_of(meta, self.word_field),
            color,
        )


def common_side(images: Sequence[Image.Image]) -> int:
    """The shorter side, in pixels, that most images have; the largest of equally frequent ones."""
    counts = Counter(min(image.size) for image in images)
    return max(counts, key=lambda side: (counts[side], side))
