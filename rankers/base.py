"""What every ranker shares: the contract, batches, and image features cached by content.

A two-tower ranker is `TwoTowerRanker` around an object of the `Towers` protocol, which knows one family of weights.
"""

import functools
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F


class Ranker(Protocol):
    """The contract of rerank.py and of evaluation."""

    name: str
    calibration: Any  # rankers.calibration.Calibration, or None where there is none

    def score(self, text: str, images: Sequence[Image.Image]) -> Tensor:
        """Float tensor (N,), higher is better."""
        ...


class Towers(Protocol):
    """One family of image and text encoders into a common space."""

    name: str

    def preprocess(self, images: Sequence[Image.Image]) -> Any:
        """RGB images -> what `encode_images` takes."""
        ...

    def encode_images(self, pixels: Any) -> Tensor:
        """(N, D), of any length."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """(T, D), of any length."""
        ...


class FeatureCache:
    """The features of the `capacity` images used last, by content."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.rows: OrderedDict[bytes, Tensor] = OrderedDict()
        self.hits = self.misses = 0

    def get(self, key: bytes) -> Tensor | None:
        row = self.rows.get(key)
        if row is None:
            self.misses += 1
            return None
        self.hits += 1
        self.rows.move_to_end(key)
        return row

    def put(self, key: bytes, row: Tensor) -> None:
        self.rows[key] = row
        if len(self.rows) > self.capacity:
            self.rows.popitem(last=False)


class TwoTowerRanker:
    """Cosine of a text and images, from the towers' features."""

    def __init__(
        self,
        towers: Towers,
        calibration: Any = None,
        batch_size: int = 64,
        cache_size: int = 65536,
        released_from: str = "",
    ) -> None:
        """`batch_size`: images (or texts) of one forward pass; `cache_size`: image features kept in memory;
        `released_from`: the identity of the weights that these were rounded from, which stays theirs.
        """
        self.towers, self.calibration, self.batch_size = towers, calibration, batch_size
        self.cache, self.released_from = FeatureCache(cache_size), released_from

    @property
    def name(self) -> str:
        return self.towers.name

    @functools.cached_property
    def identity(self) -> str:
        """Equal for equal weights, whatever directory they were kept in, and for a release of them."""
        return self.released_from or weights_identity(self.towers.model)

    def score(self, text: str, images: Sequence[Image.Image]) -> Tensor:
        """Cosines (N,) in [-1, 1], float32 on the CPU. Raises ValueError without images or without text."""
        return self.score_matrix([text], images)[0]

    def score_matrix(self, texts: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        """Cosines (T, N) of every text with every image."""
        return self.text_features(texts) @ self.image_features(images).T

    @torch.inference_mode()
    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (N, D), float32 on the CPU; an image seen before is not computed again."""
        if not len(images):
            raise ValueError("no images to score")
        keys = [content_hash(image) for image in images]
        rows = {key: self.cache.get(key) for key in dict.fromkeys(keys)}
        todo = [key for key, row in rows.items() if row is None]
        index_of = {key: i for i, key in enumerate(keys)}
        for start in range(0, len(todo), self.batch_size):
            part = todo[start : start + self.batch_size]
            pixels = self.towers.preprocess([as_rgb(images[index_of[key]]) for key in part])
            features = unit(self.towers.encode_images(pixels))
            for key, row in zip(part, features, strict=True):
                rows[key] = row
                self.cache.put(key, row)
        return torch.stack([rows[key] for key in keys])

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (T, D), float32 on the CPU."""
        empty = [i for i, text in enumerate(texts) if not text.strip()]
        if empty or not len(texts):
            raise ValueError("the text to score is empty")
        parts = range(0, len(texts), self.batch_size)
        return torch.cat([unit(self.towers.encode_texts(texts[i : i + self.batch_size])) for i in parts])


def weights_identity(model: nn.Module) -> str:
    """Hex sha256 of all names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def identities(ranker: Any) -> list[str]:
    """Of every encoder that the ranker asks: several for an ensemble, none for recorded scores."""
    if hasattr(ranker, "rankers"):
        return [identity for part in ranker.rankers for identity in identities(part)]
    return [ranker.identity] if hasattr(ranker, "identity") else []


def unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1).cpu()


def content_hash(image: Image.Image) -> bytes:
    """Equal for images of equal mode, size, pixels and palette, whatever file they came from."""
    digest = hashlib.sha256(f"{image.mode} {image.size} ".encode())
    digest.update(image.tobytes())
    if image.mode in ("P", "PA"):
        digest.update(bytes(image.getpalette("RGB")) + repr(image.info.get("transparency")).encode())
    return digest.digest()


def as_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB; what is transparent becomes white, as in a shop."""
    if image.mode == "RGB":
        return image
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        background = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(background, layer).convert("RGB")
    if image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion clips at 255
        return image.point(lambda level: level / 256).convert("L").convert("RGB")
    return image.convert("RGB")
