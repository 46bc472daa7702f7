"""Images and captions for fine-tuning: from shards, from a plain folder, or packed from any format that is read.

A batch is of one size: {"image": (B, 3, H, W) in [-1, 1], or "moments" (B, 2C, h, w) from the cache, "text", "key",
"salt": a number of (seed, epoch, sample)}.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.distributed import World
from common.files import atomic_path
from common.image import to_levels
from common.log import say
from common.square import resize_square
from data_tools.augment import Chain
from data_tools.ingest.prepare import ImageOptions
from data_tools.readers.base import ReaderOptions
from data_tools.readers.detect import open_source
from data_tools.shard import ShardConfig, shard
from data_tools.shards.captions import CaptionChoice
from data_tools.shards.holdout import open_splits
from data_tools.shards.index import ShardIndex
from data_tools.shards.loader import IMAGE_SUFFIXES, Augment, Batch, eval_batches, open_image, train_batches
from data_tools.shards.remote import is_remote
from diffusion.tuning.buckets import BucketOrder, Buckets, crop_to, image_sizes
from diffusion.tuning.caption_folder import CaptionFolder
from diffusion.tuning.options import DataOptions

Index = ShardIndex | CaptionFolder


@dataclass(frozen=True)
class DecodeShape:
    """Sample -> image (3, H, W) uint8 of the shape that the order gives, text, key, salt."""

    size: int
    """Side in pixels where no order gives a shape."""
    augment: Augment | None
    captions: CaptionChoice
    first_caption: bool = False

    def __call__(
        self, index: Index, i: int, rng: np.random.Generator, shape: tuple[int, int] | None = None
    ) -> Batch:
        members = index.read(i, (*IMAGE_SUFFIXES, *self.captions.members))
        image = open_image(next((members[s] for s in IMAGE_SUFFIXES if s in members), b""))
        if self.augment is not None:
            image = self.augment(image, rng)
        image = crop_to(image, shape) if shape else resize_square(image, self.size)
        text = self.captions.pick(members, None if self.first_caption else rng)
        return {"image": to_levels(image), "text": text, "key": index.samples[i].key, "salt": salt_of(rng)}


def salt_of(rng: np.random.Generator) -> int:
    """Tells apart two visits of one image in a batch: noise and timestep depend on it."""
    return int(rng.integers(2**31))


class TuneData:
    """Training and validation images. `buckets` is None where every image becomes a square of one resolution."""

    def __init__(
        self, options: DataOptions, train: Index, val: Index, buckets: Buckets | None, num_enlarged: int
    ) -> None:
        self.options, self.train, self.val, self.buckets = options, train, val, buckets
        self.num_enlarged = num_enlarged

    @classmethod
    def open(cls, options: DataOptions, run_dir: Path, world: World) -> "TuneData":
        """Raises FileNotFoundError or ValueError in one sentence. All processes must call it."""
        train, val = open_indices(options, world)
        if train.remote and not options.enlarge:
            raise ValueError(
                "buckets look at every image before the first step, and these shards are remote: copy them here, or "
                "train on squares with --data.enlarge True"
            )
        if train.remote:
            return cls(options, train, val, None, 0)
        sizes = known_sizes(train, run_dir, world)
        if options.enlarge:
            low = options.buckets.resolutions[0]
            return cls(options, train, val, None, int(((sizes.min(1) < low) & (sizes.min(1) > 0)).sum()))
        return cls(options, train, val, Buckets(sizes, options.buckets), 0)

    @property
    def resolution(self) -> int:
        """Side of validation and sample images in pixels: the largest of training."""
        return max(self.options.buckets.resolutions)

    @property
    def num_images(self) -> int:
        """That are trained on."""
        return len(self.train) - (len(self.buckets.left_out) if self.buckets else 0)

    def notes(self) -> list[str]:
        """What a user should know of the data, a sentence each."""
        size = self.options.buckets.resolutions[0]
        said = list(dict.fromkeys([*self.train.problems, *self.val.problems]))
        if self.num_enlarged:
            said.append(
                f"{self.num_enlarged} of {len(self.train)} images are smaller than {size} pixels and are enlarged, "
                "which blurs them: leave them out, train smaller, or use buckets (--data.enlarge False)"
            )
        return [*said, self.buckets.describe()] if self.buckets else said

    @property
    def captions(self) -> CaptionChoice:
        """How training reads captions."""
        text, facts = self.options.text_augment, self.options.fact_captions
        rewrite = text.drawn if text.is_on else None
        return CaptionChoice(self.options.short_caption_share, rewrite, facts if facts.share else None)

    @property
    def augment(self) -> Augment | None:
        """Of training images; nothing here changes a colour."""
        options = self.options
        random_crops = options.enlarge and (options.crops.flip or options.crops.min_scale < 1)
        steps = [
            step for step, on in ((options.move, options.move.is_on), (options.crops, random_crops)) if on
        ]
        return Chain(tuple(steps)) if steps else None

    def order(self, seed: int, batch_size: int) -> BucketOrder | None:
        """None: the permutation of every epoch."""
        return BucketOrder(self.buckets, seed, batch_size) if self.buckets else None

    def train_batches(self, seed: int, batch_size: int, world: World, start_sample: int) -> Iterator[Batch]:
        """This process's share of every global batch."""
        decode = DecodeShape(self.resolution, self.augment, self.captions)
        order, workers = self.order(seed, batch_size), self.options.num_workers
        return train_batches(self.train, decode, batch_size, world, seed, start_sample, workers, order=order)

    def val_batches(self, batch_size: int, limit: int) -> Iterator[Batch]:
        """The first `limit` validation images in order: centre squares, first captions."""
        decode = DecodeShape(self.resolution, None, CaptionChoice(), first_caption=True)
        return eval_batches(self.val, decode, batch_size, limit)

    def first_texts(self, count: int) -> tuple[str, ...]:
        """The first different validation captions."""
        texts: dict[str, None] = {}
        for i in range(len(self.val)):
            texts |= {CaptionChoice().pick(self.val.read(i, ("txt",)), None): None}
            texts.pop("", None)
            if len(texts) == count:
                break
        if not texts:
            raise ValueError("no validation image has a caption: name texts with --sample-texts")
        return tuple(texts)


def open_indices(options: DataOptions, world: World) -> tuple[Index, Index]:
    """Training and validation images. Raises FileNotFoundError or ValueError in one sentence."""
    if not options.source:
        raise ValueError("name the training images with --data.source: shards, a folder, or TSV files")
    source = _shards_of(options.source, options, world)
    if options.val_source:
        val = _open(_shards_of(options.val_source, options, world), "val", options)
        return _open(source, "train", options), val
    if isinstance(source, CaptionFolder):
        return _open(source, "train", options).split(options.val_share)
    train, val = open_splits(source, options.remote, options.val_share)
    return train.require(*IMAGE_SUFFIXES), val.require(*IMAGE_SUFFIXES)


def _open(source: "str | CaptionFolder", split: str, options: DataOptions) -> Index:
    if isinstance(source, CaptionFolder):
        return CaptionFolder.open(source.root, options.missing_captions)
    return ShardIndex.open(source, split, options.remote).require(*IMAGE_SUFFIXES)


def _shards_of(source: str, options: DataOptions, world: World) -> "str | CaptionFolder":
    """Where the shards of `source` are, packed first where it has another format; or a folder that is read as it is."""
    path = Path(source)
    if is_remote(source) or "::" in source or "{" in source or not path.exists():
        return source
    if path.suffix == ".tar" or any(path.glob("*.tar")):
        return source
    found = open_source(path, ReaderOptions())
    if found.format == "folder":
        return CaptionFolder(path, [], {}, [])
    target = Path("data") / f"{path.resolve().name.removesuffix(path.suffix)}_shards"
    if world.size > 1 and not any(target.glob("train-*.tar")):
        raise ValueError(
            f"{source} is {found.format}: pack it first, by one process, with `python -m data_tools.shard {source} "
            f"{target}` and name {target}"
        )
    if world.size == 1:
        has_val = any(part.split == "val" for part in found.parts)
        config = ShardConfig(
            path,
            str(target),
            val_share=0.0 if has_val else options.val_share,
            workers=options.num_workers,
            image=ImageOptions(resize="keep", image_format="same"),  # buckets need the sizes they have
        )
        report = shard(config)
        for reason, count in report["reasons"].items():
            say(f"note: {count} rows of {source} were left out: {reason} (see {target / 'dropped.jsonl'})")
    return str(target)


def known_sizes(index: Index, run_dir: Path, world: World) -> np.ndarray:
    """(N, 2) widths and heights, looked up once a run: the file in `run_dir` is for these very images."""
    path = run_dir / f"image_sizes_{index.fingerprint}.npy"
    if world.is_main and not path.is_file():
        run_dir.mkdir(parents=True, exist_ok=True)
        sizes = image_sizes(index, IMAGE_SUFFIXES)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, sizes, allow_pickle=False)
    world.barrier()
    return np.load(path, allow_pickle=False)


def load_image(index: Index, i: int) -> Image.Image:
    """Image i, upright RGB. Raises CorruptSample."""
    members: dict[str, Any] = index.read(i, IMAGE_SUFFIXES)
    return open_image(next(iter(members.values()), b""))
