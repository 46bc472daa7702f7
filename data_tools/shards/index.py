"""Random access into WebDataset tars: where every member of every sample lies, read once from the tar headers.

webdataset's own pipeline streams, so it cannot resume exactly in mid-epoch or on another number of processes; an
index makes the sample order a plain permutation. Tars stay ordinary WebDataset tars. Remote ones
(data_tools/shards/remote.py) are fetched and looked into when their first sample is asked for.
"""

import bisect
import functools
import hashlib
import itertools
import os
import re
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.console.progress import progress
from data_tools.shards.remote import (
    NoSuchSplit,
    RemoteOptions,
    RemoteShard,
    ShardCache,
    ShardUnavailable,
    is_remote,
    list_shards,
    of_split,
    touch,
)

Member = tuple[int, int]  # offset and size in bytes
MOST_SCANNED = (
    64  # remote shards whose headers stay in memory: 45 MB for 1,000 samples each, at least two windows
)
MOST_OPEN = 128  # files that a process holds open: limits of 1,024 are common


@dataclass(frozen=True)
class Sample:
    """One sample's location: its key, its shard's number, and its members by suffix (`webp`, `txt`, `ids.npy`)."""

    key: str
    shard: int
    members: dict[str, Member]


class RemoteSamples(Sequence):
    """Samples of shards of known sizes; a remote shard is fetched when one of its samples is asked for."""

    def __init__(self, shards: Sequence[RemoteShard | Sequence[Sample]], cache: ShardCache) -> None:
        """A local shard is given by its samples."""
        self.shards, self.cache = list(shards), cache
        self._scanned: OrderedDict[int, Sequence[Sample]] = OrderedDict()
        self.sizes = tuple(s.num_samples if isinstance(s, RemoteShard) else len(s) for s in self.shards)
        self.starts = list(itertools.accumulate(self.sizes, initial=0))

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, i: int) -> Sample:
        """Raises ShardUnavailable. A shard with fewer samples than announced gives samples without members."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        shard = self.shard_of(i)
        samples, row = self._of_shard(shard), i - self.starts[shard]
        return samples[row] if row < len(samples) else Sample(f"row {row} of shard {shard}", shard, {})

    def shard_of(self, i: int) -> int:
        """Number of the shard that sample i is in."""
        return bisect.bisect_right(self.starts, i) - 1

    def fetch(self, shard: int) -> Path | None:
        """Bring a shard here; its path, None for a local one. Raises ShardUnavailable."""
        location = self.shards[shard]
        return self.cache.fetch(location) if isinstance(location, RemoteShard) else None

    def _of_shard(self, shard: int) -> Sequence[Sample]:
        if not isinstance(self.shards[shard], RemoteShard):
            return self.shards[shard]
        if shard not in self._scanned:
            self._scanned[shard] = scan_tar(self.fetch(shard), shard)[0]
            while len(self._scanned) > max(MOST_SCANNED, 2 * self.cache.options.window_shards):
                self._scanned.popitem(last=False)
        return self._scanned[shard]


class ShardIndex:
    """A sequence of samples over tars. `read(i)` gives the bytes of sample i's members."""

    def __init__(
        self,
        paths: Sequence[Path],
        samples: Sequence[Sample],
        problems: Sequence[str],
        window_shards: int = 0,
    ) -> None:
        """`window_shards` > 0: shuffle so many shards at a time, as shards that are fetched one by one need."""
        self.paths, self.problems, self.window_shards = list(paths), list(problems), window_shards
        self.samples = samples if isinstance(samples, RemoteSamples) else list(samples)
        self._forget_files()

    @classmethod
    def open(
        cls, source: str | Path, split: str = "train", remote: RemoteOptions | None = None
    ) -> "ShardIndex":
        """Index the tars of a folder (`{split}-*.tar`, or every tar when `split` is empty), of one tar, of a brace
        pattern such as `shards/train-{00000..00009}.tar`, or of several of these joined by `::`. Each may be remote:
        `http://host/shards`, `s3://bucket/shards`, `pipe:aws s3 cp s3://bucket/train-{00000..00009}.tar -`.

        A truncated tar gives its whole samples and a line in `problems`. Raises FileNotFoundError or ValueError in
        one sentence when there is nothing to read.
        """
        parts = [str(source)] if os.path.exists(source) else str(source).split("::")
        if any(map(is_remote, parts)):
            return _open_remote(parts, split, remote or RemoteOptions())
        paths = _every_part(parts, lambda part: find_shards(part, split))
        samples, problems = [], []
        for number, path in enumerate(paths):
            found, problem = scan_tar(path, number)
            samples += found
            problems += [problem] if problem else []
        if not samples:
            raise ValueError(f"no samples in {source}: " + ("; ".join(problems) or "its tars are empty"))
        return cls(paths, samples, problems)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def remote(self) -> RemoteSamples | None:
        """The samples, if some of them are in remote shards."""
        return self.samples if isinstance(self.samples, RemoteSamples) else None

    def require(self, *suffixes: str) -> "ShardIndex":
        """Only samples that have one of `suffixes`; the others are counted in `problems`. ValueError if none has.

        Of remote shards one sample is looked at; others that lack it are counted as corrupt when they are read.
        """
        if self.remote:
            self._require_remote(suffixes)
            return self
        kept = [s for s in self.samples if any(name in s.members for name in suffixes)]
        if not kept:
            seen = sorted({name for s in self.samples[:100] for name in s.members})
            raise ValueError(
                f"no sample of {self.paths[0].parent} has a {' or '.join(suffixes)} (found: {seen})"
            )
        lost = len(self.samples) - len(kept)
        note = [f"{lost} samples without {' or '.join(suffixes)} left out"] if lost else []
        return ShardIndex(self.paths, kept, self.problems + note)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The same where an epoch visits the same samples: keys by shard, of remote shards their sizes."""
        digest = hashlib.sha256("\n".join(path.name for path in self.paths).encode())
        names = map(str, self.remote.sizes) if self.remote else (sample.key for sample in self.samples)
        for name in names:
            digest.update(name.encode() + b"\n")
        return digest.hexdigest()[:16]

    def has(self, suffix: str) -> bool:
        """Whether some sample has such a member; of remote shards the first sample is looked at."""
        looked_at = [self.samples[0]] if self.remote else self.samples
        return any(suffix in sample.members for sample in looked_at)

    def spread(self, count: int) -> range:
        """Up to `count` sample numbers, evenly spread; of remote shards within the first, to fetch no other."""
        total = self.remote.sizes[0] if self.remote else len(self)
        return range(0, total, max(1, total // count))

    def _require_remote(self, suffixes: Sequence[str]) -> None:
        try:
            sample = self.samples[0]
        except ShardUnavailable as error:
            raise ValueError(f"the first shard cannot be had: {error}") from error
        if not any(name in sample.members for name in suffixes):
            raise ValueError(
                f"sample {sample.key!r} has no {' or '.join(suffixes)} (found: {sorted(sample.members)})"
            )

    def read(self, i: int, suffixes: Sequence[str] | None = None) -> dict[str, bytes]:
        """Member bytes by suffix, all or those of `suffixes` that are there. Safe across threads and forks.

        Raises ShardUnavailable for a sample of a remote shard that cannot be had.
        """
        sample = self.samples[i]
        wanted = {n: m for n, m in sample.members.items() if suffixes is None or n in suffixes}
        if os.getpid() != self._owner:
            self._forget_files()
        with self._lock:
            file = self._descriptor(sample.shard) if wanted else -1
            return {name: os.pread(file, size, offset) for name, (offset, size) in wanted.items()}

    def after_shard(self, i: int) -> int:
        """The first sample of the shard after that of sample i; round about at the end."""
        remote = self.remote
        return remote.starts[remote.shard_of(i) + 1] % len(self) if remote else (i + 1) % len(self)

    def _descriptor(self, shard: int) -> int:
        """An open file; the longest unused ones are closed."""
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        file = self._files[shard] = self._open(shard)
        if len(self._files) > MOST_OPEN:
            os.close(self._files.popitem(last=False)[1])
        return file

    def _open(self, shard: int) -> int:
        if not self.remote:
            try:
                return os.open(self.paths[shard], os.O_RDONLY)
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"the shard {self.paths[shard]} has vanished: put it back and run the same command again"
                ) from error
        while True:
            path = self.remote.fetch(shard) or self.paths[shard]
            try:
                file = os.open(path, os.O_RDONLY)
            except FileNotFoundError:  # another process made room in the cache just now
                continue
            touch(path)
            return file

    def _forget_files(self) -> None:
        """After a fork too: the parent's descriptors and lock are its own."""
        self._owner, self._lock = os.getpid(), threading.Lock()
        self._files: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict:
        return {name: self.__dict__[name] for name in ("paths", "samples", "problems", "window_shards")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._forget_files()


def _every_part(parts: Sequence[str], find: Callable[[str], list[Any]]) -> list[Any]:
    """What is found in all parts; one of several may be without the split."""
    found, missing = [], []
    for part in parts:
        try:
            found += find(part)
        except NoSuchSplit as error:
            missing.append(error)
    if not found:
        raise missing[0]
    return found


def _open_remote(parts: Sequence[str], split: str, options: RemoteOptions) -> ShardIndex:
    """Local and remote shards side by side; those of unknown size are fetched first."""
    cache = ShardCache(options)
    locations: list[Path | RemoteShard] = _every_part(
        parts, lambda part: list_shards(part, split, options) if is_remote(part) else find_shards(part, split)
    )
    paths = [location.path if isinstance(location, RemoteShard) else location for location in locations]
    unknown = [p for p in locations if isinstance(p, RemoteShard) and p.num_samples is None]
    _fetch_all(cache, unknown, options)
    shards: list[RemoteShard | Sequence[Sample]] = []
    problems = []
    for number, (location, path) in enumerate(zip(locations, paths, strict=True)):
        known = isinstance(location, RemoteShard) and location.num_samples is not None
        if known or not path.is_file():
            shards.append(location if known else [])
            continue
        samples, problem = scan_tar(path, number)
        problems += [problem] if problem else []
        remote = isinstance(location, RemoteShard)
        shards.append(RemoteShard(location.url, path, len(samples)) if remote else samples)
    samples = RemoteSamples(shards, cache)
    if not len(samples):
        raise ValueError(
            f"no samples in {'::'.join(parts)}: " + ("; ".join(problems) or "its tars are empty")
        )
    return ShardIndex(paths, samples, problems, options.window_shards)


def _fetch_all(cache: ShardCache, shards: Sequence[RemoteShard], options: RemoteOptions) -> None:
    """Raises ValueError when more of them fail than the budget allows."""

    def fetch(shard: RemoteShard) -> ShardUnavailable | None:
        try:
            cache.fetch(shard)
        except ShardUnavailable as error:
            return error
        return None

    if not shards:
        return
    with ThreadPoolExecutor(4) as pool:
        bar = progress(pool.map(fetch, shards), total=len(shards), desc="fetching", unit=" shards")
        failed = [error for error in bar if error]
    if len(failed) > options.max_failed_share * len(shards):
        raise ValueError(f"{len(failed)} of {len(shards)} shards cannot be had, such as {failed[0]}")


class ShardSource:
    """The shards of a local or remote source one by one, for work that goes shard by shard."""

    def __init__(self, source: str, options: RemoteOptions) -> None:
        self.source, self.options = source, options
        self._cache = ShardCache(options) if is_remote(source) else None

    def find(self, split: str) -> list[Path] | list[RemoteShard]:
        """Empty where the source has no such split. Raises FileNotFoundError or ValueError for no source at all."""
        try:
            if self._cache:
                return list_shards(self.source, split, self.options)
            return find_shards(self.source, split)
        except NoSuchSplit:
            return []

    def name(self, location: Path | RemoteShard) -> str:
        """Of the tar."""
        return location.path.name if isinstance(location, RemoteShard) else location.name

    def fetch(self, location: Path | RemoteShard) -> Path:
        """Where it lies on this disk. Raises ShardUnavailable after all retries."""
        return self._cache.fetch(location) if isinstance(location, RemoteShard) else location


def find_shards(source: str | Path, split: str = "train") -> list[Path]:
    """The local tars that `source` names, sorted; of a pattern those named like the split, if any are named like one.

    Raises FileNotFoundError saying what was looked for.
    """
    text = str(source).removeprefix("file://")
    if "{" in text and not os.path.exists(text):
        import braceexpand

        paths = [Path(p) for p in braceexpand.braceexpand(text)]
        missing = [p for p in paths if not p.is_file()]
        if missing:
            raise FileNotFoundError(f"no shard {missing[0]} (named by {text})")
        return of_split(paths, split, text)
    path = Path(text)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no data folder {path}")
    pattern = f"{split}-*.tar" if split else "*.tar"
    paths = sorted(path.glob(pattern))
    if not paths:
        raise NoSuchSplit(f"no {pattern} in {path}: make shards with `python -m data_tools.shard SRC {path}`")
    return paths


_SAFE_NAME = re.compile(r"^[^/\0][^\0]*$")


def scan_tar(path: Path, shard: int) -> tuple[list[Sample], str]:
    """Samples of one tar in order, and a sentence about what is wrong with it, or "".

    A sample is a run of members whose names agree up to the first dot of the file name.
    """
    samples: dict[str, dict[str, Member]] = {}
    problem = ""
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # tarfile keeps every header otherwise
                name = info.name.removeprefix("./")
                if not info.isfile() or not _SAFE_NAME.match(name):
                    continue
                if info.offset_data + info.size > size:
                    problem = f"{path} is truncated: it ends inside {name}, the samples before it are used"
                    samples.pop(_sample_key(name)[0], None)
                    break
                key, suffix = _sample_key(name)
                samples.setdefault(key, {})[suffix] = (info.offset_data, info.size)
            problem = problem or _problem_at_end(path, tar.offset, len(samples))
    except (tarfile.TarError, EOFError) as error:
        problem = f"{path} is damaged ({error}); the {len(samples)} samples before the damage are used"
    return [Sample(key, shard, members) for key, members in samples.items()], problem


def _problem_at_end(path: Path, offset: int, count: int) -> str:
    """tarfile takes a damaged header for the end of a tar, whose mark is a block of zeros."""
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    if any(block):
        return f"{path} is damaged at byte {offset}; the {count} samples before the damage are used"
    if not block:
        return f"{path} is truncated: it has no end mark, the {count} samples in it are used"
    return ""


def _sample_key(name: str) -> tuple[str, str]:
    """`a/b.ids.npy` -> (`a/b`, `ids.npy`): WebDataset splits at the first dot of the file name."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), suffix.lower()
