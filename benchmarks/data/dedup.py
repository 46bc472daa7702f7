"""Near duplicates among millions of hashes: seconds, memory, and recall against brute force and on planted copies.

    python -m benchmarks.data.dedup
    python -m benchmarks.data.dedup --count 10000000
    python -m benchmarks.data.dedup --count 100000 --distance 8

Limits (exit code 1 when missed): a million hashes in under 120 s and 2 GiB, ten million in under 600 s and 4 GiB;
recall on 20,000 of them, and of the copies planted among all, at least 0.999.
The hashes are random with near copies planted at every distance up to one beyond the set one. Everything runs in one
thread, so the limit is on `cpu_seconds`: what an idle machine takes, whatever else runs beside.
"""

import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.config import command, parse_options
from data_tools.dedup import close_pairs, first_twins
from data_tools.images.phash import distances, near_pairs

LIMITS = {1_000_000: (120.0, 2.0), 10_000_000: (600.0, 4.0)}  # hashes at most: seconds, GiB
LIMIT_RECALL = 0.999


@dataclass(frozen=True)
class Options:
    """What is measured."""

    count: int = 1_000_000
    """Hashes."""
    distance: int = 4
    """Bits that may differ."""
    group_distance: int = 8
    """Bits that may differ inside a group."""
    subset: int = 20_000
    """Hashes that brute force compares."""
    seed: int = 0
    """Of the hashes."""


def planted_hashes(count: int, distance: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes (N,) uint64, a fifth of them near copies of others, colours (N, 48) uint8, those of copies alike, and
    pairs (P, 2) of a copy and its original that are within `distance`."""
    generator = np.random.default_rng(seed)
    hashes = generator.integers(0, 2**64, count, dtype=np.uint64)
    colours = generator.integers(0, 256, (count, 48), dtype=np.uint8)
    copies = generator.permutation(count)[: count // 5]
    originals = generator.integers(0, count, len(copies))
    flips = np.zeros(len(copies), np.uint64)
    wanted = generator.integers(0, distance + 2, len(copies))
    for step in range(distance + 1):
        bit = np.uint64(1) << generator.integers(0, 64, len(copies)).astype(np.uint64)
        flips |= np.where(step < wanted, bit, np.uint64(0))
    hashes[copies] = hashes[originals] ^ flips
    colours[copies] = colours[originals]
    pairs = np.stack([copies, originals], 1)  # an original may itself have become a copy
    alike = (colours[copies] == colours[originals]).all(axis=1) & (copies != originals)
    near = distances(hashes[copies], hashes[originals]) <= distance
    return hashes, colours, pairs[alike & near]


def recall(hashes: np.ndarray, distance: int) -> tuple[float, int, float, float]:
    """Recall, true pairs, and seconds of the index and of brute force, on different hashes (N,)."""
    start = time.perf_counter()
    found = {p for i, j in near_pairs(hashes, distance) for p in zip(i.tolist(), j.tolist(), strict=True)}
    indexed = time.perf_counter() - start
    start = time.perf_counter()
    true = set()
    for i in range(len(hashes) - 1):
        near = np.flatnonzero(distances(hashes[i], hashes[i + 1 :]) <= distance)
        true |= {(i, int(j) + i + 1) for j in near}
    assert found <= true, "a pair was found that is not near"
    return len(found) / max(len(true), 1), len(true), indexed, time.perf_counter() - start


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print one JSON object."""
    options = parse_options(Options, argv, description=__doc__)
    hashes, colours, planted = planted_hashes(options.count, options.distance, options.seed)
    start, cpu = time.perf_counter(), time.process_time()
    twins = first_twins(hashes, colours, np.arange(options.count), options.distance, 32)
    dropping = time.process_time() - cpu
    kept = np.flatnonzero(twins < 0)
    pairs = close_pairs(hashes[kept], colours[kept], options.group_distance, 32)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    subset = np.unique(hashes)[: options.subset]
    copies = np.random.default_rng(1).integers(0, len(subset), len(subset) // 4)
    near = subset[copies] ^ (np.uint64(1) << np.arange(len(copies), dtype=np.uint64) % np.uint64(64))
    subset = np.unique(np.concatenate([subset[: -len(near)], near]))
    share, true, indexed, brute = recall(subset, options.distance)
    # of two images that are near one is dropped
    found = float((twins[planted] >= 0).any(axis=1).mean())
    result = {
        "hashes": options.count,
        "distance": options.distance,
        "group_distance": options.group_distance,
        "dropped": int((twins >= 0).sum()),
        "group_pairs": len(pairs),
        "cpu_seconds_dropping": round(dropping, 1),
        "cpu_seconds": round(cpu, 1),
        "seconds": round(seconds, 1),
        "peak_gib": round(peak, 2),
        "recall": share,
        "recall_true_pairs": true,
        "recall_planted": round(found, 6),
        "planted_pairs": len(planted),
        "recall_hashes": len(subset),
        "brute_force_to_index": round(brute / indexed, 1),
    }
    print(json.dumps(result))
    seconds, gib = LIMITS[min((n for n in LIMITS if n >= options.count), default=max(LIMITS))]
    if cpu > seconds or peak > gib or min(share, found) < LIMIT_RECALL:
        print(f"missed: {seconds:g} s, {gib:g} GiB, recall {LIMIT_RECALL}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
