"""Perceptual hashes and the index that finds near ones among millions without comparing all pairs.

The hash is the 64-bit DCT hash (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010,
section 3.2.1; the same bits as `imagehash.phash`). It sees luminance only, so a 4 x 4 colour grid goes with it: one
shirt in red and in blue are two products, not a duplicate. The index is multi-index hashing (Norouzi, Punjani, Fleet,
"Fast Search in Hamming Space with Multi-Index Hashing", CVPR 2012, section 3).
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data_tools.parallel import Workers, ordered_map

HASH_BITS = 64
MAX_DISTANCE = 16  # beyond it unrelated images match: 2 random hashes differ in 32 +- 4 bits
_SIDE = 32
_BLOCK = 1 << 17  # candidate pairs compared at a time: their arrays stay in a processor's cache
_PROBES = 64  # masks of a part of the search: sorting the band again costs a few of them


def _dct_rows() -> np.ndarray:
    """The first 8 rows of the unnormalised DCT-II of length 32, as float64 (8, 32)."""
    k, n = np.arange(8)[:, None], np.arange(_SIDE)[None, :]
    return 2 * np.cos(np.pi * k * (2 * n + 1) / (2 * _SIDE))


@dataclass(frozen=True)
class Signature:
    """What dedup keeps of an image: 56 bytes."""

    phash: int
    """64-bit DCT hash."""
    colours: bytes
    """Mean RGB of the 4 x 4 cells, row by row, 48 bytes."""


def image_signature(image: Image.Image) -> Signature:
    """Hash and colour grid of an image of any size; converted to RGB first."""
    rgb = image.convert("RGB")
    grid = np.asarray(rgb.resize((4, 4), Image.Resampling.BOX), np.uint8)
    return Signature(dct_hash(rgb), grid.tobytes())


def dct_hash(image: Image.Image) -> int:
    """The 8 x 8 lowest DCT coefficients of the 32 x 32 grey image, each compared with their median."""
    grey = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), np.float64)
    rows = _dct_rows()
    low = rows @ grey @ rows.T  # (8, 8)
    bits = (low > np.median(low)).reshape(-1)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Hamming distances of two uint64 arrays, elementwise, as uint8."""
    return np.bitwise_count(a ^ b)


def near_pairs(
    hashes: np.ndarray, max_distance: int, workers: Workers = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of index pairs (i, j) with i < j and Hamming distance at most `max_distance`, each pair once.

    `hashes` (N,) uint64, all different (collapse equal ones with `np.unique` first: a million equal hashes have 5e11
    pairs). Exact by the pigeonhole principle: see `_radii`. `workers`: as of `ordered_map`, 0 searches in this process;
    the blocks are the same. Raises ValueError for a distance outside 0..16.
    """
    if not 0 <= max_distance <= MAX_DISTANCE:
        raise ValueError(f"distance must be between 0 and {MAX_DISTANCE}, not {max_distance}")
    hashes = np.ascontiguousarray(hashes, np.uint64)
    if len(hashes) < 2:
        return
    search = BandSearch(hashes, max_distance, _cheapest_bands(len(hashes), max_distance))
    for _, found in ordered_map(search, ((None, [part]) for part in search.parts()), workers, _crashed):
        yield from found[0]


def _crashed(part: "Probes") -> list[tuple[np.ndarray, np.ndarray]]:
    raise MemoryError(
        f"a process that looked for near hashes ended (band {part.band}): is there memory for it?"
    )


class Probes(NamedTuple):
    """Look-ups in one band: the masks that are put over its values; 0 finds equal ones."""

    band: int
    masks: list[int]


@dataclass
class BandSearch:
    """Probes to blocks of near pairs: hashes are grouped by a band of their bits, and near groups are compared.

    Picklable; a process keeps the last band that it sorted.
    """

    hashes: np.ndarray
    max_distance: int
    num_bands: int
    _sorted: "tuple[int, _Band] | None" = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_sorted": None}

    @property
    def radii(self) -> list[int]:
        return _radii(self.max_distance, self.num_bands)

    def parts(self) -> Iterator[Probes]:
        """What can be searched on its own, in order."""
        for band, radius in enumerate(self.radii):
            width = len(range(band, HASH_BITS, self.num_bands))
            masks = [
                sum(1 << bit for bit in bits)
                for weight in range(radius + 1)
                for bits in itertools.combinations(range(width), weight)
            ]
            for start in range(0, len(masks), _PROBES):
                yield Probes(band, masks[start : start + _PROBES])

    def __call__(self, parts: Sequence[Probes]) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        return [list(self._search(part)) for part in parts]

    def _search(self, part: Probes) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if self._sorted is None or self._sorted[0] != part.band:
            self._sorted = None  # before the next one is made: one at a time in memory
            self._sorted = part.band, _Band.of(self.hashes, part.band, self.num_bands)
        for mask in part.masks:
            for i, j in self._sorted[1].near(mask, self.max_distance):
                for earlier in range(part.band):  # found there already
                    a, b = (_band_values(self.hashes[k], earlier, self.num_bands) for k in (i, j))
                    fresh = np.bitwise_count(a ^ b) > self.radii[earlier]
                    i, j = i[fresh], j[fresh]
                if len(i):
                    yield np.minimum(i, j), np.maximum(i, j)


def _radii(max_distance: int, num_bands: int) -> list[int]:
    """How far to look in each band; a band that need not be looked at is left out.

    With d = b r + a, two hashes within d differ by at most r in one of the first a + 1 bands or by less than r in one
    of the others: if not, they differ by (a + 1)(r + 1) + (b - a - 1) r = d + 1 (Norouzi et al., section 3.1).
    """
    radius, rest = divmod(max_distance, num_bands)
    radii = [radius if band <= rest else radius - 1 for band in range(num_bands)]
    return [radius for radius in radii if radius >= 0]


def _cheapest_bands(count: int, max_distance: int) -> int:
    """The number of bands that costs least, for hashes spread evenly: look-ups plus candidates."""

    def cost(num_bands: int) -> float:
        width = HASH_BITS // num_bands
        probes = sum(
            _choose(width, k) for radius in _radii(max_distance, num_bands) for k in range(radius + 1)
        )
        return probes * (count + count * count / 2**width)

    return min(range(3, 17), key=cost)  # under 3 the bucket table itself would be 2^32 long


def _choose(n: int, k: int) -> int:
    return int(np.prod([(n - i) / (i + 1) for i in range(k)]).round())


def _band_values(hashes: np.ndarray, band: int, num_bands: int) -> np.ndarray:
    """Every `num_bands`-th bit of the hashes, packed (N,) uint32.

    Bands take bits in turns rather than in runs: the high frequencies of flat images are nearly constant, and a
    band made of these alone would put all images into one bucket.
    """
    octets = hashes.view(np.uint8).reshape(-1, 8)  # (N, 8)
    table = np.zeros((8, 256), np.uint32)
    numbers = np.arange(256, dtype=np.uint32)
    for position, bit in enumerate(range(band, HASH_BITS, num_bands)):
        table[bit // 8] |= ((numbers >> np.uint32(bit % 8)) & np.uint32(1)) << np.uint32(position)
    values = np.zeros(len(hashes), np.uint32)
    for octet in range(8):
        values |= table[octet][octets[:, octet]]
    return values


@dataclass(frozen=True)
class _Band:
    """All hashes in the order of the values of one band, so that what is compared lies together in memory."""

    hashes: np.ndarray
    """(N,) uint64 in this order."""
    order: np.ndarray
    """(N,) int32: the index of each."""
    values: np.ndarray
    """(N,) uint32, ascending."""
    starts: np.ndarray
    """(2^width + 1,) int32: value v stands at starts[v]:starts[v + 1]."""

    @classmethod
    def of(cls, hashes: np.ndarray, band: int, num_bands: int) -> "_Band":
        values = _band_values(hashes, band, num_bands)
        width = len(range(band, HASH_BITS, num_bands))
        order = np.argsort(values, kind="stable").astype(np.int32)
        starts = np.zeros((1 << width) + 1, np.int32)
        np.cumsum(np.bincount(values, minlength=1 << width), out=starts[1:])
        return cls(hashes[order], order, values[order], starts)

    def near(self, mask: int, max_distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Blocks of near pairs (i, j) whose band values differ by exactly `mask`, each pair once."""
        if mask == 0:
            left = np.arange(len(self.values), dtype=np.int32)
            first, last = left + np.int32(1), self.starts[self.values + 1]
        else:  # the other end of the pair has the highest bit set
            left = np.flatnonzero((self.values >> np.uint32(mask.bit_length() - 1)) & 1 == 0).astype(np.int32)
            bucket = self.values[left] ^ np.uint32(mask)
            first, last = self.starts[bucket], self.starts[bucket + 1]
        counts = last - first
        occupied = np.flatnonzero(counts > 0)
        left, first, counts = left[occupied], first[occupied], counts[occupied]
        for a, b in self._compared(left, first, counts, max_distance):
            yield self.order[a], self.order[b]

    def _compared(
        self, left: np.ndarray, first: np.ndarray, counts: np.ndarray, max_distance: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Positions of near pairs: the hash at `left[k]` against those at `first[k]:first[k] + counts[k]`."""
        ends = np.cumsum(counts, dtype=np.int64)
        begin = 0
        while begin < len(left):
            done = ends[begin - 1] if begin else 0
            end = max(int(np.searchsorted(ends, done + _BLOCK, "right")), begin + 1)
            size, upto = counts[begin:end], ends[begin:end] - done
            right = np.repeat((first[begin:end] - (upto - size)).astype(np.int32), size)
            right += np.arange(len(right), dtype=np.int32)
            apart = np.repeat(self.hashes[left[begin:end]], size)
            apart ^= self.hashes[right]
            near = np.flatnonzero(np.bitwise_count(apart) <= max_distance)
            if len(near):
                yield left[begin + np.searchsorted(upto, near, "right")], right[near]
            begin = end


def components(count: int, pairs: Iterator[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Labels (count,) of the connected components, each the smallest index in it; memory grows with `count` alone."""
    labels = np.arange(count, dtype=np.int64)
    for i, j in pairs:
        labels = _merge(labels, i, j)
    return labels


def _merge(labels: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(labels)
    rows = np.concatenate([np.arange(count), i])
    columns = np.concatenate([labels, j])
    graph = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    smallest = np.full(component.max() + 1, count, np.int64)
    np.minimum.at(smallest, component, np.arange(count))
    return smallest[component]
