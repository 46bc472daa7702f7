"""Image shards -> shards of what a network made of the images (codes, latents): each is encoded once, not once an
epoch.

Each input shard becomes one output shard of the same name with the array of every image, its caption and its
metadata. View 0 is the plain centre crop; the others are augmented, and depend on the key alone. Whole shards are
kept when the command runs again.
"""

import io
import json
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common.console.progress import progress
from common.distributed import World
from common.files import atomic_path, split_lines
from common.image import to_image, to_tensor
from common.log import say
from common.square import resize_square
from data_tools.engine import RayCluster
from data_tools.images.line_drawings import LINE_MEMBER, decode_lines, encode_lines
from data_tools.ingest.records import Record
from data_tools.shards.image_shards import ShardWriter, add_to_dataset
from data_tools.shards.index import ShardIndex, ShardSource
from data_tools.shards.line_views import LineSource, extract_views, move_lines
from data_tools.shards.loader import IMAGE_SUFFIXES, Augment, CorruptSample, open_image

Encode = Callable[[Tensor], np.ndarray]


@dataclass(frozen=True)
class Views:
    """How images are seen before they are encoded."""

    image_size: int
    count: int
    """Views of a training image: the plain one and count - 1 augmented ones. Validation images have one."""
    augment: Augment
    batch_size: int
    """Images of one call of the encoder."""
    lines: LineSource = "none"
    """Line drawings of the views, `{key}.line.png`."""


def encode_shards(
    source: ShardSource,
    target: Path,
    views: Views,
    member: str,
    encode: Encode,
    world: World,
    cluster: RayCluster | None = None,
) -> dict[str, int]:
    """Every shard of `source` that is not done yet; shards are dealt over processes, or over the nodes of a cluster.

    encode: (n, 3, S, S) in [-1, 1] -> (n, ...), of which each image's rows (A, ...) become `{key}.{member}`, an .npy;
    picklable where there is a cluster, whose nodes read the source and send whole shards back to this process.
    Returns {"images", "skipped", "shards_kept"} of this process. Raises FileNotFoundError without training shards.
    """
    jobs = [(split, location) for split in ("train", "val") for location in source.find(split)]
    if not any(split == "train" for split, _ in jobs):
        raise FileNotFoundError(
            f"no train-*.tar in {source.source}: make shards with `python -m data_tools.shard`"
        )
    if len({source.name(location) for _, location in jobs}) < len(jobs):
        raise ValueError(
            f"{source.source} names no splits, so it would validate on what it trains on: make shards of it with "
            "`python -m data_tools.shard SRC DST --val-share 0.1`"
        )
    if cluster and world.size > 1:
        raise ValueError(
            "--engine ray spreads the shards itself: start one process, without torchrun or deepspeed"
        )
    counts = {"images": 0, "skipped": 0, "shards_kept": 0}
    todo = []
    for split, location in jobs[world.rank :: world.size]:
        name = source.name(location)
        if (target / name).is_file():
            ShardIndex.open(target / name, "").require(member)
            counts["shards_kept"] += 1
        else:
            todo.append((split, location))
    one = EncodeShard(source, views, member, encode)
    if cluster:
        _encode_on(cluster, one, todo, target, counts)
    else:
        for split, location in todo:
            name = source.name(location)
            bar = progress(desc=name, unit="images", disable=not world.is_main)
            one.write(split, location, target / name, counts, bar)
            bar.close()
    world.barrier()
    if world.is_main:
        for split in ("train", "val"):
            paths = sorted(target.glob(f"{split}-*.tar"))
            add_to_dataset(target, split, {p.name: len(ShardIndex.open(p, "").samples) for p in paths})
    return counts


@dataclass(frozen=True)
class EncodeShard:
    """The work on one shard; picklable where `encode` is."""

    source: ShardSource
    views: Views
    member: str
    encode: Encode

    def __call__(self, jobs: Sequence[tuple[str, Any]]) -> list[tuple[bytes, dict[str, int]]]:
        """(split, location) of shards to the bytes of the encoded ones and their counts."""
        done = []
        for split, location in jobs:
            counts = {"images": 0, "skipped": 0}
            with tempfile.TemporaryDirectory() as folder, tqdm(disable=True) as bar:
                path = Path(folder) / self.source.name(location)
                self.write(split, location, path, counts, bar)
                done.append((path.read_bytes(), counts))
        return done

    def write(self, split: str, location: Any, target: Path, counts: dict[str, int], bar: tqdm) -> None:
        """One input shard -> one output shard, by way of a folder that is renamed from."""
        index = ShardIndex.open(self.source.fetch(location), "").require(*IMAGE_SUFFIXES)
        count = self.views.count if split == "train" else 1
        work = target.parent / f".work-{target.stem}"
        for stale in work.glob("*"):
            stale.unlink()
        bar.reset(total=len(index))
        with ShardWriter(work, split, samples_per_shard=len(index)) as writer:
            for samples, images, drawings in _image_batches(index, self.views, count, counts):
                arrays = self.encode(images.flatten(0, 1))
                arrays = arrays.reshape(len(samples), count, *arrays.shape[1:])
                for i, rows, lines in zip(samples, arrays, drawings, strict=True):
                    extra = {self.member: npy_bytes(rows)} | ({LINE_MEMBER: lines} if lines else {})
                    writer.write(_record(index, i, extra))
                counts["images"] += len(samples)
                bar.update(len(samples))
        (work / f"{split}-00000.tar").rename(target)
        for leftover in work.glob("*"):
            leftover.unlink()
        work.rmdir()


def _encode_on(
    cluster: RayCluster,
    one: EncodeShard,
    todo: Sequence[tuple[str, Any]],
    target: Path,
    counts: dict[str, int],
) -> None:
    """The shards of `todo` as tasks of a cluster; each is written here, whole, when it has come."""

    def crashed(job: tuple[str, Any]) -> None:
        raise OSError(f"encoding {one.source.name(job[1])} ended its process each time it was tried")

    with progress(desc="encoding", unit="images") as bar:
        jobs = [(split, p.resolve() if isinstance(p, Path) else p) for split, p in todo]  # of any directory
        for (_, location), results in cluster.ordered_map(one, ((job, [job]) for job in jobs), crashed):
            data, found = results[0]
            with atomic_path(target / one.source.name(location)) as temporary:
                temporary.write_bytes(data)
            for name, count in found.items():
                counts[name] += count
            bar.update(found["images"])


def _image_batches(
    index: ShardIndex, views: Views, count: int, counts: dict[str, int]
) -> Iterator[tuple[list[int], Tensor, list[bytes]]]:
    """Sample numbers (b,), their views (b, A, 3, S, S) and line.png of each; corrupt images are counted and left out.

    The images of the next batch are opened while one is encoded.
    """
    each = max(1, views.batch_size // count)

    def load(i: int) -> tuple[Tensor, bytes]:
        members, key = index.read(i, IMAGE_SUFFIXES), index.samples[i].key
        image = open_image(next(iter(members.values())))
        seen = torch.stack(list(_views(image, key, views, count)))
        if views.lines == "none":
            return seen, b""
        if views.lines == "given":
            given = _given_lines(index.read(i, (LINE_MEMBER,)))
            rngs = _generators(key, count)
            lines = move_lines(given, image.size, views.augment, rngs, views.image_size)
        else:
            lines = extract_views(views.lines, [to_image(view) for view in seen])
        return seen, encode_lines(lines)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        ahead = deque((i, pool.submit(load, i)) for i in range(min(2 * each, len(index))))
        samples, rows, drawings = [], [], []
        while ahead:
            i, loaded = ahead.popleft()
            if i + 2 * each < len(index):
                ahead.append((i + 2 * each, pool.submit(load, i + 2 * each)))
            try:
                seen, lines = loaded.result()
                rows.append(seen)
                drawings.append(lines)
                samples.append(i)
            except CorruptSample as error:
                counts["skipped"] += 1
                say(f"skipped a corrupt sample ({counts['skipped']} so far): {index.samples[i].key}: {error}")
            if rows and (len(rows) == each or not ahead):
                yield samples, torch.stack(rows), drawings
                samples, rows, drawings = [], [], []


def _given_lines(members: dict[str, bytes]) -> np.ndarray:
    """(H, W) uint8. Raises CorruptSample."""
    try:
        return decode_lines(members.get(LINE_MEMBER, b""))
    except ValueError as error:
        raise CorruptSample(str(error)) from error


def _views(image: Image.Image, key: str, views: Views, count: int) -> Iterator[Tensor]:
    """The centre crop, then crops that depend on (key, view): the same whenever the image is encoded."""
    yield to_tensor(resize_square(image, views.image_size))
    for generator in _generators(key, count):
        yield to_tensor(resize_square(views.augment(image, generator), views.image_size))


def _generators(key: str, count: int) -> Iterator[np.random.Generator]:
    """Of the views after the plain one."""
    return (np.random.default_rng([view, *key.encode()]) for view in range(1, count))


def npy_bytes(rows: np.ndarray) -> bytes:
    """The file of an array."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(rows), allow_pickle=False)
    return buffer.getvalue()


def _record(index: ShardIndex, i: int, extra: dict[str, bytes]) -> Record:
    members = index.read(i, ("txt", "json"))
    captions = tuple(split_lines(members.get("txt", b"").decode("utf-8", errors="replace")))
    meta = json.loads(members["json"]) if "json" in members else {}
    return Record(index.samples[i].key, b"", "", captions, meta, extra=extra)
