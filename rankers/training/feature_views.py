"""Image features of a frozen tower, computed once: so many augmented views of each training image, kept on disk.

Nothing of a frozen network changes while the rest learns, so each pass over the images after the first few would cost
the same and teach little. A file of the run directory holds (A, N, D) numbers in 16 bits, view by view; a run that
was killed goes on behind the last whole block.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.config import to_mapping
from common.files import read_json, write_json
from common.lock import alone_in
from data_tools.shards.index import ShardIndex
from data_tools.shards.loader import IMAGE_SUFFIXES, CorruptSample, open_image
from data_tools.shards.remote import ShardUnavailable
from rankers.base import weights_identity

FILE, IDENTITY = "features.f16", "features.json"
BLOCK = 64  # images of one forward pass


class FeatureViews:
    """Rows of the file, read as they are asked for."""

    def __init__(self, directory: Path, num_samples: int, num_views: int, dim: int) -> None:
        self.rows = np.memmap(directory / FILE, np.float16, "r", shape=(num_views, num_samples, dim))

    def row(self, i: int, rng: np.random.Generator) -> Tensor:
        """Float32 (D,) of one view of sample `i`. Raises CorruptSample where the image could not be read."""
        row = torch.from_numpy(self.rows[int(rng.integers(len(self.rows))), i].astype(np.float32))
        if not row.isfinite().all():
            raise CorruptSample("its image could not be read when the features were computed")
        return row


def open_views(task: Any) -> FeatureViews:
    """The views of the training images of `rankers.train.RankerTask`; the main process computes what is not there."""
    options, index, trunk = task.options, task.data.train, task.model.clip.visual.trunk
    directory, seed = options.loop.run_dir, options.loop.seed
    facts = {
        "shards": index.fingerprint,
        "augment": to_mapping(options.augment),
        "sizes": [task.augmented_size, *options.train_sizes],
        "reconstructions": task.reconstructions.identity if task.reconstructions else "",
        "tower": weights_identity(trunk.network),
        "views": options.views,
        "seed": seed,
    }
    augment = functools.partial(options.augment, size=task.augmented_size)
    with alone_in(directory, task.world):
        if task.world.is_main:
            start_file(directory, facts)
            shape = (options.views, trunk.num_features, seed)
            compute_views(directory, index, augment, task.frozen_features, *shape)
        task.world.barrier()
    return FeatureViews(directory, len(index), options.views, trunk.num_features)


def start_file(directory: Path, facts: dict[str, Any]) -> None:
    """Removes a file of features that depend on other facts."""
    identity = {"sha256": hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()}
    told = directory / IDENTITY
    if not (told.is_file() and read_json(told) == identity):
        (directory / FILE).unlink(missing_ok=True)
        write_json(told, identity)


def compute_views(
    directory: Path,
    index: ShardIndex,
    augment: Callable[..., Tensor],
    features: Callable[[Tensor, int], Tensor],
    num_views: int,
    dim: int,
    seed: int,
) -> None:
    """Write what the file lacks. `augment`: image and rng -> (3, S, S); `features`: (B, 3, S, S), seed -> (B, dim)."""
    total, row_bytes = num_views * len(index), 2 * dim
    with (
        (directory / FILE).open("ab") as file,
        tqdm(total=total, desc="image features", unit=" images", disable=None) as bar,
    ):
        done = min(total, file.tell() // row_bytes)
        done -= done % BLOCK if done < total else 0
        file.truncate(done * row_bytes)
        bar.update(done)
        for start in range(done, total, BLOCK):
            positions = [divmod(n, len(index)) for n in range(start, min(total, start + BLOCK))]
            images = [_image(index, i, augment, seed, view) for view, i in positions]
            kept = [n for n, image in enumerate(images) if image is not None]
            rows = np.full((len(images), dim), np.nan, np.float16)
            if kept:
                found = features(torch.stack([images[n] for n in kept]), seed * 1_000_003 + start)
                rows[kept] = found.float().cpu().numpy()
            file.write(rows.tobytes())
            file.flush()
            bar.update(len(images))


def _image(index: ShardIndex, i: int, augment: Callable[..., Tensor], seed: int, view: int) -> Tensor | None:
    """None where it cannot be read."""
    try:
        members = index.read(i, IMAGE_SUFFIXES)
        image = open_image(next((members[s] for s in IMAGE_SUFFIXES if s in members), b""))
    except (CorruptSample, ShardUnavailable):
        return None
    return augment(image, rng=np.random.Generator(np.random.Philox(key=[seed * 1_000_003 + view, i])))
