"""Shards -> training batches, in an order that is a pure function of (seed, epoch).

The global sample counter c stands for epoch c // n, position c % n; the global batch that starts at c is cut into
equal runs, one a process. So a run goes on exactly where it was killed, also on another number of processes. What is
random about one sample (augmentation, which caption, which view) is drawn from (seed, epoch, sample).

Remote shards are shuffled by windows of shards, and fetched a window ahead. A machine fetches each shard once, however
many processes it runs; which machine needs which shard is not fixed, since the order must not hang on their number.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from common.distributed import World
from common.image import from_levels, to_levels
from common.log import say
from common.square import resize_square
from data_tools.images.decode import BadImage
from data_tools.images.decode import decode as decode_image
from data_tools.images.line_drawings import LINE_MEMBER, decode_lines
from data_tools.shards.captions import ANY_LINE, CaptionChoice
from data_tools.shards.index import ShardIndex
from data_tools.shards.remote import ShardUnavailable
from data_tools.shards.views import read_views

IMAGE_SUFFIXES = ("webp", "jpg", "jpeg", "png")
Batch = dict[str, Any]
Augment = Callable[[Image.Image, np.random.Generator], Image.Image]


@dataclass(frozen=True)
class Order:
    """Which sample stands at each value of the global counter."""

    num_samples: int
    seed: int
    sizes: tuple[int, ...] = ()
    """Samples of each shard, where shards are shuffled and then their samples by windows; empty: all together."""
    window: int = 0
    """Shards of a window."""

    def permutation(self, epoch: int) -> np.ndarray:
        """(num_samples,) the samples of an epoch in their order."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        if not self.sizes:
            return rng.permutation(self.num_samples)
        starts = np.cumsum([0, *self.sizes])
        windows = []
        for shards in self._windows(rng):
            samples = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in shards])
            windows.append(rng.permutation(samples))
        return np.concatenate(windows)

    def _windows(self, rng: np.random.Generator) -> list[np.ndarray]:
        shards = rng.permutation(len(self.sizes))
        return [shards[i : i + self.window] for i in range(0, len(shards), self.window)]

    def windows(self, epoch: int) -> list[np.ndarray]:
        """The shards of each window of an epoch, in their order."""
        return self._windows(np.random.Generator(np.random.Philox(key=[self.seed, epoch])))

    def walk(self, start: int) -> Iterator[tuple[int, int]]:
        """(epoch, sample) from counter `start` on, for ever."""
        epoch, position = divmod(start, self.num_samples)
        while True:
            for sample in self.permutation(epoch)[position:]:
                yield epoch, int(sample)
            epoch, position = epoch + 1, 0


def order_of(index: ShardIndex, seed: int) -> Order:
    """The training order of an index: by windows where shards have to be fetched."""
    if index.remote is None:
        return Order(len(index), seed)
    return Order(len(index), seed, index.remote.sizes, index.window_shards)


class Prefetch:
    """Brings the shards of the present and the next window here, in the background; use as a context manager.

    Several at a time: the first batches need nearly all shards of their window, and one connection alone would make
    them wait for each latency, retry and slow answer in turn.
    """

    def __init__(self, index: ShardIndex, order: Order, start: int) -> None:
        self.index, self.order, self.position = index, order, start
        self._moved, self._stopped = threading.Event(), False
        self._due, self._turn = self._shards(), threading.Lock()

    def __enter__(self) -> "Prefetch":
        for _ in range(self.index.remote.cache.options.connections):
            threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stopped = True
        self._moved.set()

    def reach(self, position: int) -> None:
        """The global counter is there now."""
        self.position = position
        self._moved.set()

    def _run(self) -> None:
        while (shard := self._next()) is not None:
            with contextlib.suppress(ShardUnavailable):  # counted where its samples are missed
                self.index.remote.fetch(shard)

    def _next(self) -> int | None:
        """The shard to fetch now, once it is due; None at the end."""
        with self._turn:
            return next(self._due, None)

    def _shards(self) -> Iterator[int]:
        for begin, shards in self._plan(self.position):
            while begin > self.position and not self._stopped:  # one window ahead, not more
                self._moved.wait()
                self._moved.clear()
            for shard in shards:
                if self._stopped:
                    return
                yield int(shard)

    def _plan(self, start: int) -> Iterator[tuple[int, np.ndarray]]:
        """(counter at which its fetching may begin, shards) of each window from that of `start` on."""
        epoch = start // self.order.num_samples
        begin = previous = epoch * self.order.num_samples
        while True:
            for shards in self.order.windows(epoch):
                end = begin + sum(self.order.sizes[s] for s in shards)
                if end > start:
                    yield previous, shards
                begin, previous = end, begin
            epoch += 1


class _RankBatches:
    """Lists of (epoch, sample, ...): this process's run of every global batch."""

    def __init__(self, order: Order, start: int, global_batch_size: int, world: World) -> None:
        self.order, self.start, self.batch_size, self.world = order, start, global_batch_size, world

    def __iter__(self) -> Iterator[list[tuple[Any, ...]]]:
        share = self.batch_size // self.world.size
        first = self.world.rank * share
        walk = self.order.walk(self.start)
        while True:
            batch = [next(walk) for _ in range(self.batch_size)]
            yield batch[first : first + share]


class CorruptSample(Exception):
    """One sample that cannot be read; the loader replaces and counts it."""


class Replacement(NamedTuple):
    """A sample that was replaced."""

    text: str
    shard: str = ""
    """The address of its shard, if that is unavailable; else it is the sample that is corrupt."""


class _Samples(Dataset):
    """Decodes (epoch, sample, ...); one that cannot be had is replaced by the next readable sample, and named.

    What an order gives behind the sample, such as the shape of the batch, is handed to `decode`.
    """

    def __init__(self, index: ShardIndex, decode: Callable[..., Batch], seed: int) -> None:
        self.index, self.decode, self.seed = index, decode, seed

    def __getitem__(self, index: tuple[Any, ...]) -> tuple[Batch, list[Replacement]]:
        epoch, i, *more = index
        lost: list[Replacement] = []
        for _ in range(min(len(self.index), 64)):
            rng = np.random.Generator(np.random.Philox(key=[self.seed * 1_000_003 + epoch, i]))
            try:
                return self.decode(self.index, i, rng, *more), lost
            except CorruptSample as error:
                lost.append(Replacement(f"{self.index.samples[i].key}: {error}"))
                i = (i + 1) % len(self.index)
            except ShardUnavailable as error:
                lost.append(Replacement(str(error), error.url))
                i = self.index.after_shard(i)
        raise ValueError(f"64 samples in a row cannot be read, the last one is {lost[-1].text}")


@dataclass(frozen=True)
class DecodeImage:
    """Sample -> image (3, S, S) uint8, text, key; `train_batches` and `eval_batches` make [-1, 1] of it."""

    image_size: int
    augment: Augment | None = None
    first_caption: bool = False
    captions: CaptionChoice = ANY_LINE

    def __call__(self, index: ShardIndex, i: int, rng: np.random.Generator) -> Batch:
        members = index.read(i, (*IMAGE_SUFFIXES, *self.captions.members))
        image = open_image(next((members[s] for s in IMAGE_SUFFIXES if s in members), b""))
        if self.augment is not None:
            image = self.augment(image, rng)
        image = resize_square(image, self.image_size)
        text = self.captions.pick(members, None if self.first_caption else rng)
        return {"image": to_levels(image), "text": text, "key": index.samples[i].key}


@dataclass(frozen=True)
class DecodeTokens:
    """Token-shard sample -> image_ids (N,), text, key; one of the A views at random, or the first.

    A sample whose codes are not `num_tokens` many, all below `codebook_size`, counts as corrupt; 0: anything goes.
    """

    first_view: bool = False
    captions: CaptionChoice = ANY_LINE
    num_tokens: int = 0
    codebook_size: int = 0
    lines: bool = False
    """Also `line` (1, S, S) uint8, the drawing of the view, white on black."""

    def __call__(self, index: ShardIndex, i: int, rng: np.random.Generator) -> Batch:
        members = index.read(i, ("ids.npy", *(LINE_MEMBER,) * self.lines, *self.captions.members))
        try:
            views = read_views(members["ids.npy"])
        except ValueError as error:
            raise CorruptSample(str(error)) from error
        view = 0 if self.first_view else int(rng.integers(len(views)))
        codes = views[view]
        if self.num_tokens and len(codes) != self.num_tokens:
            raise CorruptSample(f"it holds {len(codes)} codes, not {self.num_tokens}")
        if self.codebook_size and codes.max() >= self.codebook_size:
            raise CorruptSample(f"it holds the code {codes.max()}, the tokenizer has {self.codebook_size}")
        text = self.captions.pick(members, None if self.first_view else rng)
        batch = {
            "image_ids": torch.from_numpy(codes.astype(np.int64)),
            "text": text,
            "key": index.samples[i].key,
        }
        return batch | ({"line": view_lines(members, view, len(views))} if self.lines else {})


def view_lines(members: dict[str, bytes], view: int, num_views: int) -> torch.Tensor:
    """The drawing of one view, (1, S, S) uint8: those of all views stand below each other. Raises CorruptSample."""
    try:
        lines = decode_lines(members.get(LINE_MEMBER, b""))  # (A S, S)
    except ValueError as error:
        raise CorruptSample(str(error)) from error
    side = lines.shape[1]
    if lines.shape[0] != num_views * side:
        raise CorruptSample(f"line.png is {side} x {lines.shape[0]}, not {num_views} squares")
    return torch.from_numpy(lines[view * side : (view + 1) * side].copy())[None]


def open_image(data: bytes) -> Image.Image:
    """Decode to RGB, upright, transparency on white. Raises CorruptSample, also for a decompression bomb."""
    try:
        return decode_image(data)
    except BadImage as error:
        raise CorruptSample(f"{error.reason}: {error.what}" if error.what else error.reason) from error


def collate(samples: list[tuple[Batch, list[Replacement]]]) -> tuple[Batch, list[Replacement]]:
    """Stack tensors, list the rest; what was lost rides along."""
    first = samples[0][0]
    batch = {}
    for name, value in first.items():
        values = [s[0][name] for s in samples]
        batch[name] = torch.stack(values) if isinstance(value, torch.Tensor) else values
    return batch, [loss for s in samples for loss in s[1]]


def in_range(batch: Batch) -> Batch:
    """Images that travelled as uint8 to float32 in [-1, 1]."""
    image = batch.get("image")
    return batch if image is None or image.dtype != torch.uint8 else {**batch, "image": from_levels(image)}


def train_batches(
    index: ShardIndex,
    decode: Callable[..., Batch],
    global_batch_size: int,
    world: World,
    seed: int = 0,
    start_sample: int = 0,
    num_workers: int = 0,
    max_corrupt_share: float = 0.05,
    order: Any = None,
) -> Iterator[Batch]:
    """This process's share of every global batch, for ever, from the global counter `start_sample` on.

    `order`: another than the permutation of each epoch; its `walk(start)` yields (epoch, sample, ...).

    Corrupt samples are replaced by the next readable one, counted and reported; more than `max_corrupt_share` of
    what was read (and more than 20) raises ValueError. So does a larger share of remote shards that cannot be had than
    their options allow; until then samples of the next shard stand in for theirs.
    """
    order = order or order_of(index, seed)
    loader = DataLoader(
        _Samples(index, decode, seed),
        batch_sampler=_RankBatches(order, start_sample, global_batch_size, world),
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=_ignore_interrupt,
        pin_memory=world.device.type == "cuda",
        prefetch_factor=4 if num_workers else None,
    )
    losses = _Losses(index, max_corrupt_share)
    iterator = iter(loader)  # workers fork before a thread starts
    fetches = index.remote is not None and world.local_rank == 0
    try:
        with Prefetch(index, order, start_sample) if fetches else contextlib.nullcontext() as prefetch:
            for number, (batch, lost) in enumerate(_plainly(iterator), 1):
                losses.add(lost, global_batch_size // world.size)
                if prefetch:
                    prefetch.reach(start_sample + number * global_batch_size)
                yield in_range(batch)
    finally:
        if num_workers:  # they ignore SIGTERM: one that were left would keep the interpreter from ending
            iterator._shutdown_workers()


def _plainly(batches: Iterator[tuple[Batch, list[Replacement]]]) -> Iterator[tuple[Batch, list[Replacement]]]:
    """What a worker raises comes wrapped in its traceback: give its sentence alone."""
    try:
        yield from batches
    except (ValueError, OSError) as error:
        if not str(error).startswith("Caught "):
            raise
        raise ValueError(str(error).strip().splitlines()[-1].partition(": ")[2]) from error


class _Losses:
    """Counts what was replaced, says it, and ends the training when it is too much."""

    def __init__(self, index: ShardIndex, max_corrupt_share: float) -> None:
        self.index, self.max_corrupt_share = index, max_corrupt_share
        self.read = self.corrupt = 0
        self.shards: dict[str, int] = {}

    def add(self, lost: list[Replacement], read: int) -> None:
        """Of one batch. Raises ValueError over either budget."""
        self.read += read
        for loss in lost:
            if loss.shard:
                self._shard(loss)
            else:
                self._sample(loss)

    def _sample(self, loss: Replacement) -> None:
        self.corrupt += 1
        if self.corrupt <= 5 or self.corrupt % 100 == 0:
            say(f"skipped a corrupt sample ({self.corrupt} so far): {loss.text}")
        if self.corrupt > 20 and self.corrupt > self.max_corrupt_share * self.read:
            raise ValueError(
                f"{self.corrupt} of {self.read} samples are corrupt, the last one is {loss.text}: "
                f"check the shards with `python -m data_tools.inspect {self.index.paths[0].parent}`"
            )

    def _shard(self, loss: Replacement) -> None:
        self.shards[loss.shard] = self.shards.get(loss.shard, 0) + 1
        if self.shards[loss.shard] > 1:
            return
        total, options = len(self.index.paths), self.index.remote.cache.options
        say(f"skipped a shard that cannot be had ({len(self.shards)} of {total} so far): {loss.text}")
        if len(self.shards) > options.max_failed_share * total:
            raise ValueError(
                f"{len(self.shards)} of {total} shards cannot be had, more than remote.max_failed_share "
                f"{options.max_failed_share:g}; the last one is {loss.text}"
            )


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C and SIGTERM are the main process's affair; workers end with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def eval_batches(
    index: ShardIndex, decode: Callable[..., Batch], batch_size: int, limit: int | None = None
) -> Iterator[Batch]:
    """Every sample once, in order, the last batch short; those that cannot be read are left out and counted.

    Raises ValueError when none can be read.
    """
    rng = np.random.Generator(np.random.Philox(key=[0, 0]))
    rows: list[tuple[Batch, list[Replacement]]] = []
    count = min(len(index), limit) if limit else len(index)
    skipped, away, last = 0, 0, ""
    for i in range(count):
        try:
            rows.append((decode(index, i, rng), []))
        except CorruptSample as error:
            skipped, last = skipped + 1, f"{index.samples[i].key}: {error}"
        except ShardUnavailable as error:
            away, last = away + 1, str(error)
        if len(rows) == batch_size:
            yield in_range(collate(rows)[0])
            rows = []
    if rows:
        yield in_range(collate(rows)[0])
    if skipped + away == count:
        raise ValueError(f"no sample of {index.paths[0].parent} can be read, the last one is {last}")
    if skipped:
        say(f"left out {skipped} corrupt samples of {index.paths[0].parent}")
    if away:
        say(f"left out {away} samples of shards that cannot be had, such as {last}")
