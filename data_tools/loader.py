"""Shards -> training batches, in an order that is a pure function of (seed, epoch).

The global sample counter c stands for epoch c // n, position c % n; the global batch that starts at c is cut into
equal runs, one a process. So a run goes on exactly where it was killed, also on another number of processes. What is
random about one sample (augmentation, which caption, which view) is drawn from (seed, epoch, sample).
"""

import io
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from common.distributed import World
from common.image import resize_square, to_tensor
from common.log import say
from data_tools.images import BadImage
from data_tools.images import decode as decode_picture
from data_tools.index import ShardIndex

IMAGE_SUFFIXES = ("webp", "jpg", "jpeg", "png")
Batch = dict[str, Any]
Augment = Callable[[Image.Image, np.random.Generator], Image.Image]


@dataclass(frozen=True)
class Order:
    """Which sample stands at each value of the global counter."""

    num_samples: int
    seed: int

    def permutation(self, epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.num_samples)

    def walk(self, start: int) -> Iterator[tuple[int, int]]:
        """(epoch, sample) from counter `start` on, for ever."""
        epoch, position = divmod(start, self.num_samples)
        while True:
            for sample in self.permutation(epoch)[position:]:
                yield epoch, int(sample)
            epoch, position = epoch + 1, 0


class _RankBatches:
    """Lists of (epoch, sample): this process's run of every global batch."""

    def __init__(self, order: Order, start: int, global_batch_size: int, world: World) -> None:
        self.order, self.start, self.batch_size, self.world = order, start, global_batch_size, world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch_size // self.world.size
        first = self.world.rank * share
        walk = self.order.walk(self.start)
        while True:
            batch = [next(walk) for _ in range(self.batch_size)]
            yield batch[first : first + share]


class CorruptSample(Exception):
    """One sample that cannot be read; the loader replaces and counts it."""


class _Samples(Dataset):
    """Decodes (epoch, sample); a corrupt one is replaced by the next readable sample, and named."""

    def __init__(self, index: ShardIndex, decode: Callable[..., Batch], seed: int) -> None:
        self.index, self.decode, self.seed = index, decode, seed

    def __getitem__(self, place: tuple[int, int]) -> tuple[Batch, list[str]]:
        epoch, sample = place
        bad = []
        for shift in range(min(len(self.index), 64)):
            i = (sample + shift) % len(self.index)
            rng = np.random.Generator(np.random.Philox(key=[self.seed * 1_000_003 + epoch, i]))
            try:
                return self.decode(self.index, i, rng), bad
            except CorruptSample as error:
                bad.append(f"{self.index.samples[i].key}: {error}")
        raise ValueError(f"64 samples in a row cannot be read, the last one is {bad[-1]}")


@dataclass(frozen=True)
class DecodeImage:
    """Sample -> image (3, S, S) in [-1, 1], text, key."""

    image_size: int
    augment: Augment | None = None
    first_caption: bool = False
    short_share: float = 0.0  # as in `pick_caption`

    def __call__(self, index: ShardIndex, i: int, rng: np.random.Generator) -> Batch:
        members = index.read(i, (*IMAGE_SUFFIXES, "txt"))
        image = open_image(next((members[s] for s in IMAGE_SUFFIXES if s in members), b""))
        if self.augment is not None:
            image = self.augment(image, rng)
        image = resize_square(image, self.image_size)
        text = pick_caption(members.get("txt", b""), None if self.first_caption else rng, self.short_share)
        return {"image": to_tensor(image), "text": text, "key": index.samples[i].key}


@dataclass(frozen=True)
class DecodeTokens:
    """Token-shard sample -> image_ids (N,), text, key; one of the A views at random, or the first."""

    first_view: bool = False
    short_share: float = 0.0  # as in `pick_caption`

    def __call__(self, index: ShardIndex, i: int, rng: np.random.Generator) -> Batch:
        members = index.read(i, ("ids.npy", "txt"))
        try:
            views = np.load(io.BytesIO(members["ids.npy"]), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise CorruptSample(f"ids.npy is damaged: {error}") from error
        view = 0 if self.first_view else int(rng.integers(len(views)))
        text = pick_caption(members.get("txt", b""), None if self.first_view else rng, self.short_share)
        ids = torch.from_numpy(views[view].astype(np.int64))
        return {"image_ids": ids, "text": text, "key": index.samples[i].key}


def open_image(data: bytes) -> Image.Image:
    """Decode to RGB, upright, transparency on white. Raises CorruptSample, also for a decompression bomb."""
    try:
        return decode_picture(data)
    except BadImage as error:
        raise CorruptSample(f"{error.reason}: {error.what}" if error.what else error.reason) from error


def pick_caption(data: bytes, rng: np.random.Generator | None, short_share: float = 0.0) -> str:
    """One of the lines, drawn by `rng`, or the first; "" when there is none.

    With probability `short_share` it is the shortest: models that only read long descriptions draw short ones badly.
    """
    lines = [line.strip() for line in data.decode("utf-8", errors="replace").splitlines() if line.strip()]
    if not lines:
        return ""
    if rng is None or len(lines) == 1:
        return lines[0]
    if short_share and rng.random() < short_share:
        return min(lines, key=len)
    return lines[int(rng.integers(len(lines)))]


def collate(samples: list[tuple[Batch, list[str]]]) -> tuple[Batch, list[str]]:
    """Stack tensors, list the rest; the names of corrupt samples ride along."""
    first = samples[0][0]
    batch = {}
    for name, value in first.items():
        values = [s[0][name] for s in samples]
        batch[name] = torch.stack(values) if isinstance(value, torch.Tensor) else values
    return batch, [line for s in samples for line in s[1]]


def train_batches(
    index: ShardIndex,
    decode: Callable[..., Batch],
    global_batch_size: int,
    world: World,
    seed: int = 0,
    start_sample: int = 0,
    num_workers: int = 0,
    max_corrupt_share: float = 0.05,
) -> Iterator[Batch]:
    """This process's share of every global batch, for ever, from the global counter `start_sample` on.

    Corrupt samples are replaced by the next readable one, counted and reported; more than `max_corrupt_share` of
    what was read (and more than 20) raises ValueError.
    """
    places = _RankBatches(Order(len(index), seed), start_sample, global_batch_size, world)
    loader = DataLoader(
        _Samples(index, decode, seed),
        batch_sampler=places,
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=_ignore_interrupt,
        pin_memory=world.device.type == "cuda",
        prefetch_factor=4 if num_workers else None,
    )
    read = corrupt = 0
    for batch, bad in loader:
        read += global_batch_size // world.size
        for line in bad:
            corrupt += 1
            if corrupt <= 5 or corrupt % 100 == 0:
                say(f"skipped a corrupt sample ({corrupt} so far): {line}")
        if corrupt > 20 and corrupt > max_corrupt_share * read:
            raise ValueError(
                f"{corrupt} of {read} samples are corrupt, the last one is {bad[-1] if bad else '?'}: "
                f"check the shards with `python -m data_tools.inspect {index.paths[0].parent}`"
            )
        yield batch


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C and SIGTERM are the main process's affair; workers end with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def eval_batches(
    index: ShardIndex, decode: Callable[..., Batch], batch_size: int, limit: int | None = None
) -> Iterator[Batch]:
    """Every sample once, in order, the last batch short; corrupt samples are left out and counted."""
    rng = np.random.Generator(np.random.Philox(key=[0, 0]))
    rows: list[tuple[Batch, list[str]]] = []
    skipped = 0
    for i in range(min(len(index), limit) if limit else len(index)):
        try:
            rows.append((decode(index, i, rng), []))
        except CorruptSample:
            skipped += 1
        if len(rows) == batch_size:
            yield collate(rows)[0]
            rows = []
    if rows:
        yield collate(rows)[0]
    if skipped:
        say(f"left out {skipped} corrupt samples of {index.paths[0].parent}")
