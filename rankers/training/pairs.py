"""Images with their captions as training pairs: which caption is true of which image, and wrong ones on purpose.

In a shop most captions repeat: the other images of a batch whose caption is equal are not negatives, nor are those of
which the caption is true by the attributes in the shards' JSON (`fact_fields`: "a T-shirt" is true of a red T-shirt).
A caption that names a colour gets a twin that names another one.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.files import split_lines
from common.image import to_tensor
from common.square import resize_square
from common.text.bert_text import CaptionTokenizer, pad_rows
from data_tools.rules.colors import find_color, with_color
from data_tools.shards.captions import pick_caption
from data_tools.shards.index import ShardIndex
from data_tools.shards.loader import IMAGE_SUFFIXES, CorruptSample, open_image
from rankers.training.feature_views import FeatureViews

Facts = tuple[int, ...]  # a number for each field's value, 0 where there is none


@dataclass(frozen=True)
class AttributeConfig:
    """Which fields of the shards' JSON help; a field that a shard lacks is passed over."""

    label_field: str = "label_zh"
    """The category's name, an extra caption and the measure of `kind_accuracy`; empty: none."""
    color_field: str = "color_zh"
    """The colour's name as it stands in the caption; empty: no captions with a wrong colour."""
    fact_fields: tuple[str, ...] = ()
    """Fields that together say all that a caption says; empty: only equal captions count as equally true."""


@dataclass(frozen=True)
class Vocabulary:
    """Names that occur in a data set, in sorted order."""

    captions: tuple[str, ...]
    labels: tuple[str, ...]
    categories: tuple[str, ...]
    colors: tuple[str, ...]


MAX_SCANNED = 100_000
MAX_LABELS = 2000


def scan_names(index: ShardIndex, config: AttributeConfig) -> Vocabulary:
    """Captions, labels and colours of the first MAX_SCANNED samples.

    `categories` are the labels and the values of `item_zh`. Raises ValueError for more than MAX_LABELS labels.
    """
    captions, labels, categories, colors = set(), set(), set(), set()
    for i in range(min(len(index), MAX_SCANNED)):
        members = index.read(i, ("txt", "json"))
        captions |= set(_lines(members.get("txt", b"")))
        meta = read_meta(members.get("json", b""))
        labels.add(value_of(meta, config.label_field))
        categories |= {
            value_of(meta, config.label_field),
            value_of(meta, "item_zh" if config.label_field else ""),
        }
        colors.add(value_of(meta, config.color_field))
    labels -= {""}
    if len(labels) > MAX_LABELS:
        raise ValueError(
            f"the field {config.label_field} has more than {MAX_LABELS} values, so it is no category of goods: set "
            "--attributes.label-field to another field, or to an empty string"
        )
    return Vocabulary(*(tuple(sorted(names - {""})) for names in (captions, labels, categories, colors)))


def _lines(data: bytes) -> list[str]:
    return [line.strip() for line in split_lines(data.decode("utf-8", errors="replace")) if line.strip()]


def read_meta(data: bytes) -> dict[str, Any]:
    """The sample's JSON; {} where there is none. Raises CorruptSample when it is no object."""
    if not data:
        return {}
    try:
        meta = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptSample(f"json is damaged: {error}") from error
    if not isinstance(meta, dict):
        raise CorruptSample("json holds no object")
    return meta


def value_of(meta: dict[str, Any], name: str) -> str:
    value = meta.get(name) if name else None
    return str(value) if value not in (None, False, "") else ""


def number(text: str) -> int:
    """A stable number above 0 for a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") % (2**62) + 1


def facts_of(meta: dict[str, Any], fields: Sequence[str]) -> Facts:
    values = [value_of(meta, name) for name in fields]
    return tuple(number(f"{n}={v}") if v else 0 for n, v in zip(fields, values, strict=True))


def describes(caption: Tensor, caption_facts: Tensor, image: Tensor, image_facts: Tensor) -> Tensor:
    """Whether caption j is true of image i, (B, M) bool.

    caption (M,), image (B,): numbers of the captions and of the images' own captions; facts (M, F) and (B, F).
    True where the captions are equal, or where the caption's facts, at least one, are all among the image's.
    """
    equal = image[:, None] == caption[None, :]  # (B, M)
    stated = caption_facts[None] != 0  # (1, M, F)
    held = (caption_facts[None] == image_facts[:, None]) | ~stated  # (B, M, F)
    return equal | (held.all(-1) & stated.any(-1))


def swap_color(
    caption: str, color: str, colors: Sequence[str], rng: np.random.Generator
) -> tuple[str, str] | None:
    """The caption with another colour, and that colour; None where the caption does not name its own."""
    others = [c for c in colors if c != color]
    if not others or not find_color(caption, [color])[0]:
        return None
    other = others[int(rng.integers(len(others)))]
    return with_color(caption, color, other), other


@dataclass(frozen=True)
class CropAugment:
    """Random crop, mirror, a little light, an erased patch. Hue and saturation stay: colour is a label."""

    min_area: float = 0.3
    """Smallest crop as a share of the image's area, in (0, 1]."""
    max_aspect: float = 1.33
    """Largest stretch of a crop's sides."""
    flip: bool = True
    """Mirror half of the images."""
    light: float = 0.1
    """Largest relative change of brightness and of contrast."""
    erase: float = 0.25
    """Share of images with a grey patch of 5 to 20 % of the area."""

    def __post_init__(self) -> None:
        if not 0 < self.min_area <= 1 or self.max_aspect < 1 or not 0 <= self.light < 1:
            raise ValueError("min_area must lie in (0, 1], max_aspect be at least 1 and light lie in [0, 1)")
        if not 0 <= self.erase <= 1:
            raise ValueError(f"erase must lie in [0, 1], not {self.erase}")

    def __call__(self, image: Image.Image, size: int, rng: np.random.Generator) -> Tensor:
        """RGB image -> float (3, size, size) in [-1, 1]."""
        crop = image.resize((size, size), Image.Resampling.BILINEAR, box=self._box(image.size, rng))
        pixels = to_tensor(crop)
        if self.flip and rng.random() < 0.5:
            pixels = pixels.flip(2)
        if self.light:
            gain, contrast = 1 + self.light * rng.uniform(-1, 1, 2)
            mean = pixels.mean()
            pixels = (((pixels - mean) * contrast + mean + 1) * gain - 1).clamp(-1, 1)
        if rng.random() < self.erase:
            height, width = (int(size * s) for s in rng.uniform(0.23, 0.45, 2))
            top, left = int(rng.integers(size - height + 1)), int(rng.integers(size - width + 1))
            pixels[:, top : top + height, left : left + width] = 0
        return pixels.contiguous()

    def _box(self, size: tuple[int, int], rng: np.random.Generator) -> tuple[float, float, float, float]:
        width, height = size
        side = (min(width, height) ** 2 * rng.uniform(self.min_area, 1.0)) ** 0.5
        stretch = np.exp(rng.uniform(-1, 1) * np.log(self.max_aspect) / 2)
        w, h = min(width, side * stretch), min(height, side / stretch)
        left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
        return left, top, left + w, top + h


@dataclass(frozen=True)
class DecodePair:
    """Sample -> image, ids of the caption and of its wrong twin, and what they state.

    Gives image (3, S, S) in [-1, 1], or its features (F,) from `views`; text_ids (2, T), caption (2,) and facts (2, F),
    long, of the caption and of its twin, which is the caption again where has_twin () is false; label (), -1 for none;
    text; color; key.
    """

    image_size: int
    tokenizer: CaptionTokenizer
    config: AttributeConfig
    names: Vocabulary
    augment: CropAugment | None = None
    unk_insert: float = 0.0
    """Chance of an unknown token at a random position of a caption."""
    label_number: dict[str, int] = field(default_factory=dict)
    views: FeatureViews | None = None
    """Image features that take the place of the images."""

    def __call__(self, index: ShardIndex, i: int, rng: np.random.Generator) -> dict[str, Any]:
        members = index.read(i, (*(IMAGE_SUFFIXES if self.views is None else ()), "txt", "json"))
        image = None
        if self.views is None:
            image = open_image(next((members[s] for s in IMAGE_SUFFIXES if s in members), b""))
        meta = read_meta(members.get("json", b""))
        caption = pick_caption(members.get("txt", b""), None if self.augment is None else rng)
        if not caption:
            raise CorruptSample("no caption")
        color = value_of(meta, self.config.color_field)
        twin = swap_color(caption, color, self.names.colors, rng)
        twin_meta = meta if twin is None else {**meta, self.config.color_field: twin[1]}
        texts = [caption, twin[0] if twin else caption]
        rows = [self._ids(text, rng) for text in texts]
        fields = self.config.fact_fields
        return {
            "image": self._pixels(image, rng) if self.views is None else self.views.row(i, rng),
            "text_ids": pad_rows(rows, self.tokenizer.pad_id, self.tokenizer.max_text_len),
            "has_twin": torch.tensor(twin is not None),
            "caption": torch.tensor([number(text) for text in texts]),
            "facts": torch.tensor([facts_of(meta, fields), facts_of(twin_meta, fields)], dtype=torch.long),
            "label": torch.tensor(self.label_number.get(value_of(meta, self.config.label_field), -1)),
            "text": caption,
            "color": color,
            "key": index.samples[i].key,
        }

    def _pixels(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        if self.augment is None:
            return to_tensor(resize_square(image, self.image_size))
        return self.augment(image, self.image_size, rng)

    def _ids(self, text: str, rng: np.random.Generator) -> list[int]:
        ids = self.tokenizer.ids(text)
        if self.unk_insert and rng.random() < self.unk_insert and len(ids) < self.tokenizer.max_text_len:
            position = int(rng.integers(1, len(ids)))
            ids = [*ids[:position], self.tokenizer.unk_id, *ids[position:]]
        return ids


def pair_decoder(
    image_size: int,
    tokenizer: CaptionTokenizer,
    config: AttributeConfig,
    names: Vocabulary,
    augment: CropAugment | None = None,
    unk_insert: float = 0.0,
    views: FeatureViews | None = None,
) -> DecodePair:
    """The decoder with labels numbered as in `names.labels`."""
    numbers = {label: i for i, label in enumerate(names.labels)}
    return DecodePair(image_size, tokenizer, config, names, augment, unk_insert, numbers, views)
