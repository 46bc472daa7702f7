"""Latents of every image at every size it is trained at, encoded once and mapped from files.

A folder per identity: that of the autoencoder, of the images and of the buckets, so other buckets never meet old
latents. One array a shape, written whole or not at all: a killed encoding goes on at the next shape.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from common.console.progress import progress
from common.distributed import World
from common.files import atomic_path
from common.image import to_tensor
from common.precision import Precision
from common.square import resize_square
from data_tools.shards.captions import CaptionChoice
from data_tools.shards.loader import Batch, CorruptSample
from diffusion.scratch.latents import autoencoder_sha256, encode_moments
from diffusion.tuning.buckets import LEFT_OUT, crop_to
from diffusion.tuning.data import Index, TuneData, load_image, salt_of

Shape = tuple[int, int]


def identity_of(data: TuneData, vae: nn.Module) -> str:
    """Changes with the autoencoder, the images, their sizes, and the buckets."""
    buckets = data.buckets.identity if data.buckets else f"squares of {data.resolution}"
    parts = "\n".join([autoencoder_sha256(vae), data.train.fingerprint, buckets])
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def rows_by_shape(data: TuneData) -> dict[Shape, NDArray[np.int64]]:
    """The images that are seen at each shape, in ascending order."""
    if data.buckets is None:
        return {(data.resolution, data.resolution): np.arange(len(data.train))}
    choices = data.buckets.choices
    numbers = np.unique(choices[choices != LEFT_OUT]).tolist()
    return {data.buckets.shapes[n]: np.flatnonzero((choices == n).any(1)) for n in numbers}


class LatentCache:
    """Moments (2C, h, w) float16 by image and shape; an image that could not be decoded has NaN."""

    def __init__(self, folder: Path, rows: dict[Shape, NDArray[np.int64]], square: Shape | None) -> None:
        self.folder, self.rows, self.square = folder, rows, square
        self._arrays: dict[Shape, NDArray[np.float16]] = {}

    @classmethod
    def build(
        cls,
        data: TuneData,
        vae: nn.Module,
        run_dir: Path,
        world: World,
        precision: Precision = "auto",
        batch_size: int = 8,
    ) -> "LatentCache":
        """Encode what is missing; shapes are dealt over processes. All processes must call it."""
        folder = run_dir / "latents" / identity_of(data, vae)
        rows = rows_by_shape(data)
        for shape in list(rows)[world.rank :: world.size]:
            path = _path(folder, shape)
            if not path.is_file():
                bar = progress(
                    desc=f"latents {shape[0]}x{shape[1]}", total=len(rows[shape]), disable=not world.is_main
                )
                parts = []
                for part in _encoded(data, vae, rows[shape], shape, precision, batch_size):
                    parts.append(part)
                    bar.update(len(part))
                bar.close()
                with atomic_path(path) as temporary, temporary.open("wb") as file:
                    np.save(file, np.concatenate(parts), allow_pickle=False)
        world.barrier()
        return cls(folder, rows, None if data.buckets else next(iter(rows)))

    def moments(self, i: int, shape: Shape | None) -> torch.Tensor:
        """float32 (2C, h, w). Raises CorruptSample where the image could not be decoded."""
        shape = shape or self.square
        if shape not in self._arrays:
            self._arrays[shape] = np.load(_path(self.folder, shape), mmap_mode="r", allow_pickle=False)
        row = int(np.searchsorted(self.rows[shape], i))
        if row == len(self.rows[shape]) or self.rows[shape][row] != i:  # stands in for a corrupt neighbour
            raise CorruptSample(f"it is not seen at {shape[0]}x{shape[1]}")
        values = np.array(self._arrays[shape][row], dtype=np.float32)
        if not np.isfinite(values).all():
            raise CorruptSample("its image could not be encoded")
        return torch.from_numpy(values)


def _path(folder: Path, shape: Shape) -> Path:
    return folder / f"{shape[0]}x{shape[1]}.npy"


def _encoded(
    data: TuneData,
    vae: nn.Module,
    rows: NDArray[np.int64],
    shape: Shape,
    precision: Precision,
    batch_size: int,
) -> Iterator[NDArray[np.float16]]:
    """Moments of the images `rows`, a batch at a time."""
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size].tolist()
        images = torch.zeros(len(part), 3, shape[1], shape[0])
        broken = []
        for n, i in enumerate(part):
            try:
                image = load_image(data.train, i)
            except CorruptSample:
                broken.append(n)
                continue
            images[n] = to_tensor(crop_to(image, shape) if data.buckets else resize_square(image, shape[0]))
        moments = encode_moments(vae, images, precision).cpu().numpy().astype(np.float16)
        moments[broken] = np.nan
        yield moments


@dataclass(frozen=True)
class DecodeCached:
    """Sample -> moments (2C, h, w) float32 from the cache, text, key, salt."""

    cache: LatentCache
    captions: CaptionChoice

    def __call__(self, index: Index, i: int, rng: np.random.Generator, shape: Shape | None = None) -> Batch:
        moments = self.cache.moments(i, shape)
        text = self.captions.pick(index.read(i, self.captions.members), rng)
        return {"moments": moments, "text": text, "key": index.samples[i].key, "salt": salt_of(rng)}
