"""Aspect buckets: images of like shape are trained together, each at a size that shows it whole.

An image goes to the bucket whose aspect ratio is nearest to its own in log space, so that 2:1 is as far from square as
1:2. No image is enlarged: one that is smaller than its bucket goes to a smaller one. With several resolutions each
epoch picks one for each image, among those it is large enough for. So in every epoch each image is in exactly one
bucket; those smaller than one step of the grid are left out and counted.

A global batch is of one bucket. What does not fill a batch waits for the next epoch: no image is dropped or repeated.
The order is a pure function of (seed, number of the batch), so a run goes on exactly where it was killed.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LEFT_OUT = -1


@dataclass(frozen=True)
class BucketConfig:
    """Shapes of training images."""

    resolutions: tuple[int, ...] = (512,)
    """Sides in pixels of a square image; a bucket of another aspect has at most as many pixels. Several: images are
    seen at each in different epochs (multi-scale training)."""
    max_aspect: float = 2.0
    """Largest ratio of longer to shorter side of a bucket; 1: squares alone, from the centre of the image."""
    step: int = 64
    """Sides are multiples of this; 64 suits every UNet of Stable Diffusion 1.x."""

    def __post_init__(self) -> None:
        if not self.resolutions or min(self.resolutions) < self.step:
            raise ValueError(
                f"resolutions must be at least the step {self.step}, not {list(self.resolutions)}"
            )
        if len(set(self.resolutions)) != len(self.resolutions):
            raise ValueError(f"resolutions must differ, not {list(self.resolutions)}")
        wrong = [r for r in self.resolutions if r % self.step]
        if self.step < 1 or wrong:
            raise ValueError(f"resolutions must be multiples of the step {self.step}, not {wrong}")
        if self.max_aspect < 1:
            raise ValueError(f"max_aspect must be at least 1, not {self.max_aspect}")

    def shapes(self, resolution: int) -> list[tuple[int, int]]:
        """(width, height) of the buckets of a resolution, from the tallest to the widest."""
        found = set()
        for short in range(self.step, resolution + 1, self.step):
            long = resolution * resolution // short // self.step * self.step
            if long <= self.max_aspect * short:
                found |= {(short, long), (long, short)}
        return sorted(found, key=lambda shape: (shape[0] / shape[1], shape))

    @property
    def all_shapes(self) -> tuple[tuple[int, int], ...]:
        """Every bucket; those below the smallest resolution are for images that are smaller than it."""
        smaller = range(self.step, min(self.resolutions), self.step)
        shapes = [shape for r in (*smaller, *sorted(self.resolutions)) for shape in self.shapes(r)]
        return tuple(dict.fromkeys(shapes))


class Buckets:
    """Which bucket each image is in. `sizes`: (N, 2) widths and heights in pixels, 0 where it cannot be read."""

    def __init__(self, sizes: NDArray[np.integer], config: BucketConfig) -> None:
        self.sizes, self.config = np.asarray(sizes, dtype=np.int64), config
        self.shapes = config.all_shapes
        index_of = {shape: i for i, shape in enumerate(self.shapes)}
        by_resolution = [
            _nearest(self.sizes, [index_of[s] for s in config.shapes(r)], self.shapes)
            for r in sorted(config.resolutions)
        ]
        self.choices = np.stack(by_resolution, axis=1)  # (N, R), LEFT_OUT where it would be enlarged
        self.fitting = (self.choices != LEFT_OUT).sum(
            1
        )  # (N,) resolutions that the image is large enough for
        self._place_small(index_of)

    def _place_small(self, index_of: dict[tuple[int, int], int]) -> None:
        """Images too small for every resolution: the largest smaller one that fits."""
        small = np.flatnonzero(self.fitting == 0)
        self.num_small = int((self.sizes[small].min(1) > 0).sum()) if len(small) else 0
        step = self.config.step
        for resolution in range(min(self.config.resolutions) - step, 0, -step):
            left = small[self.choices[small, 0] == LEFT_OUT]
            found = _nearest(
                self.sizes[left], [index_of[s] for s in self.config.shapes(resolution)], self.shapes
            )
            self.choices[left] = found[:, None]

    @property
    def left_out(self) -> NDArray[np.int64]:
        """Images that cannot be read or are smaller than one step."""
        return np.flatnonzero((self.choices == LEFT_OUT).all(1))

    def assign(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """(N,) numbers into `shapes`, LEFT_OUT for those without one."""
        if self.choices.shape[1] == 1:
            return self.choices[:, 0]
        rng = np.random.Generator(np.random.Philox(key=[seed, (epoch << 8) + 1]))
        pick = (rng.random(len(self.sizes)) * np.maximum(1, self.fitting)).astype(np.int64)
        # resolutions ascend, so those that fit come first
        return self.choices[np.arange(len(pick)), pick]

    @property
    def identity(self) -> str:
        """The same where every image has the same sizes to be seen at: part of the identity of cached latents."""
        digest = hashlib.sha256(json.dumps(self.shapes).encode())
        digest.update(np.ascontiguousarray(self.choices).tobytes())
        return digest.hexdigest()[:16]

    def describe(self) -> str:
        """One line: how many images have which size at their largest resolution."""
        last = self.choices[np.arange(len(self.choices)), np.maximum(0, self.fitting - 1)]
        numbers, counts = np.unique(last[last != LEFT_OUT], return_counts=True)
        ordered = sorted(zip(counts.tolist(), numbers.tolist(), strict=True), reverse=True)
        said = ", ".join(f"{w}x{h} {count}" for count, n in ordered[:8] for w, h in [self.shapes[n]])
        more = f" and {len(ordered) - 8} more sizes" if len(ordered) > 8 else ""
        left = f"; {len(self.left_out)} left out as unreadable or too small" if len(self.left_out) else ""
        low = min(self.config.resolutions)
        small = f"; {self.num_small} smaller than {low} are not enlarged" if self.num_small else ""
        return f"buckets: {said}{more}{small}{left}"


def _nearest(
    sizes: NDArray[np.int64], numbers: Sequence[int], shapes: Sequence[tuple[int, int]]
) -> NDArray[np.int64]:
    """(M, 2) -> (M,): of the buckets `numbers` the nearest in log aspect, LEFT_OUT where it would enlarge the image."""
    known = sizes.min(1, initial=1) > 0
    safe = np.where(known[:, None], sizes, 1)
    aspect = np.log(safe[:, 0] / safe[:, 1])
    own = np.array([shapes[n] for n in numbers])  # (K, 2)
    distance = np.abs(aspect[:, None] - np.log(own[:, 0] / own[:, 1]))  # (M, K)
    nearest = distance.argmin(1)
    fits = known & (own[nearest] <= sizes).all(1)
    return np.where(fits, np.asarray(numbers)[nearest], LEFT_OUT)


@dataclass(frozen=True)
class BucketOrder:
    """In the place of `data_tools.shards.loader.Order`: runs of `batch_size` samples of one bucket."""

    buckets: Buckets
    seed: int
    batch_size: int

    def batches(self) -> Iterator[tuple[list[int], NDArray[np.int64], int]]:
        """(epochs, samples, bucket) of each global batch from the first on, for ever.

        epochs: of each sample; one that has waited is of an earlier epoch than the batch.
        """
        if len(self.buckets.left_out) == len(self.buckets.sizes):
            raise ValueError("no image is large enough for any bucket: lower --buckets.step")
        waiting: dict[int, NDArray[np.int64]] = {}
        epoch = 0
        while True:
            for bucket, rows in self._epoch(epoch, waiting):
                yield rows[:, 0].tolist(), rows[:, 1], bucket
            epoch += 1

    def _epoch(
        self, epoch: int, waiting: dict[int, NDArray[np.int64]]
    ) -> list[tuple[int, NDArray[np.int64]]]:
        """Batches (B, 2) of (epoch, sample) in the order in which they fill; `waiting` is brought up to date."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch << 8]))
        order = rng.permutation(len(self.buckets.sizes))
        assigned = self.buckets.assign(self.seed, epoch)[order]
        filled = []
        for bucket in np.unique(assigned[assigned != LEFT_OUT]).tolist():
            at = np.flatnonzero(assigned == bucket)  # indices in the order of the epoch
            rows = np.stack([np.full(len(at), epoch), order[at]], axis=1)
            before = waiting.get(bucket, np.empty((0, 2), dtype=np.int64))
            rows = np.concatenate([before, rows])
            whole = len(rows) // self.batch_size
            for i in range(whole):
                end = (i + 1) * self.batch_size
                filled.append((int(at[end - len(before) - 1]), bucket, rows[end - self.batch_size : end]))
            waiting[bucket] = rows[whole * self.batch_size :]
        return [(bucket, rows) for _, bucket, rows in sorted(filled, key=lambda entry: entry[0])]

    def walk(self, start: int) -> Iterator[tuple[int, int, tuple[int, int]]]:
        """(epoch, sample, (width, height)) from counter `start` on, for ever: what the loader asks for.

        Epochs before `start` are replayed, without reading anything. Raises ValueError for a start within a batch.
        """
        if start % self.batch_size:
            raise ValueError(
                f"the run has seen {start} samples, which is within a batch of {self.batch_size}: go on with the "
                "global_batch_size that it was started with"
            )
        for number, (epochs, samples, bucket) in enumerate(self.batches()):
            if number * self.batch_size >= start:
                shape = self.buckets.shapes[bucket]
                yield from ((e, int(s), shape) for e, s in zip(epochs, samples, strict=True))


def crop_to(image: Image.Image, shape: tuple[int, int]) -> Image.Image:
    """The centre of an RGB image at (width, height) pixels: cut to the aspect, then resized (Lanczos)."""
    width, height = shape
    scale = min(image.width / width, image.height / height)
    cut = (width * scale, height * scale)
    left, top = (image.width - cut[0]) / 2, (image.height - cut[1]) / 2
    box = (left, top, left + cut[0], top + cut[1])
    if image.size == shape:
        return image
    return image.resize(shape, Image.Resampling.LANCZOS, box=box)


def image_sizes(index: Any, suffixes: Sequence[str]) -> NDArray[np.int64]:
    """(N, 2) widths and heights of an index's images, upright, from their headers alone; 0 for unreadable ones."""
    from data_tools.images.decode import DECODE_ERRORS, PLUGINS

    sizes = np.zeros((len(index), 2), dtype=np.int64)
    for i in range(len(index)):
        data = next(iter(index.read(i, suffixes).values()), b"")
        try:
            with Image.open(io.BytesIO(data), formats=tuple(PLUGINS.values())) as image:
                turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
                sizes[i] = image.size[::-1] if turned else image.size
        except DECODE_ERRORS:
            continue
    return sizes
