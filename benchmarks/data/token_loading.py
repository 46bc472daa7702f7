"""How fast do token shards become training batches on one core? The goal is 20,000 samples a second.

    python -m benchmarks.data.token_loading
    python -m benchmarks.data.token_loading --data data/goods_128_tokens

Reads in the main process (num_workers 0) in the order of training, so that all the work is on one core, and counts
processor time, which holds on a busy machine; wall time is printed beside it. Without --data the shards are made up:
4 views of 256 codes and a caption, as `python -m vq.encode_shards` writes them.
"""

import io
import json
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.config import command, parse_options
from common.distributed import World
from common.log import say
from data_tools.shards.index import ShardIndex
from data_tools.shards.loader import DecodeTokens, train_batches
from data_tools.shards.views import read_views

GOAL = 20_000
CAPTION = "一件红色的连衣裙 夏季新款"


@dataclass(frozen=True)
class Options:
    """Time the loader of token shards."""

    data: str = ""
    """Folder of token shards; empty: made up."""
    samples: int = 50_000
    """Samples of the made-up shards."""
    batch_size: int = 64
    """Samples of a batch."""
    batches: int = 200
    """Batches of a round."""
    rounds: int = 5
    """Timed rounds; the fastest counts."""


def write_shards(folder: Path, samples: int, per_shard: int = 10_000) -> None:
    rng = np.random.default_rng(0)
    for first in range(0, samples, per_shard):
        with tarfile.open(folder / f"train-{first // per_shard:05d}.tar", "w") as tar:
            for i in range(first, min(samples, first + per_shard)):
                ids = io.BytesIO()
                np.save(ids, rng.integers(0, 1024, (4, 256), dtype=np.uint16))
                for suffix, data in (("ids.npy", ids.getvalue()), ("txt", CAPTION.encode())):
                    member = tarfile.TarInfo(f"{i:08d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def measure(options: Options, data: str) -> dict[str, float]:
    """Samples a second of processor and of wall time."""
    index = ShardIndex.open(data, "train").require("ids.npy")
    world = World(0, 1, 0, torch.device("cpu"), "none")
    shape = read_views(index.read(0, ("ids.npy",))["ids.npy"]).shape
    decode = DecodeTokens(num_tokens=shape[1], codebook_size=2**16)  # looked at as in a training
    batches = iter(train_batches(index, decode, options.batch_size, world))
    cpu, wall = [], []
    for _ in range(options.rounds + 1):
        processor, started = time.process_time(), time.perf_counter()
        for _ in range(options.batches):
            next(batches)
        cpu.append(time.process_time() - processor)
        wall.append(time.perf_counter() - started)
    count = options.batches * options.batch_size
    return {"per_cpu_second": count / min(cpu[1:]), "per_wall_second": count / min(wall[1:])}


@command
def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Print and return the metrics."""
    options = parse_options(Options, argv, description=__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if not options.data:
            write_shards(Path(folder), options.samples)
        metrics = measure(options, options.data or folder)
    rate = metrics["per_cpu_second"]
    say(
        f"{rate:,.0f} samples a second of processor time, {metrics['per_wall_second']:,.0f} of wall time: the goal of "
        f"{GOAL:,} is {'reached' if rate >= GOAL else 'MISSED'}"
    )
    say(json.dumps(metrics))
    return metrics


if __name__ == "__main__":
    main()
