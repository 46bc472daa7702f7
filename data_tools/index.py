"""Random access into WebDataset tars: where every member of every sample lies, read once from the tar headers.

webdataset's own pipeline streams, so it cannot resume exactly in mid-epoch or on another number of processes; an
index makes the sample order a plain permutation. Tars stay ordinary WebDataset tars.
"""

import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

Member = tuple[int, int]  # offset and size in bytes


@dataclass(frozen=True)
class Sample:
    """One sample's place: its key, its shard's number, and its members by suffix (`webp`, `txt`, `ids.npy`)."""

    key: str
    shard: int
    members: dict[str, Member]


class ShardIndex:
    """A sequence of samples over tars. `read(i)` gives the bytes of sample i's members."""

    def __init__(self, paths: Sequence[Path], samples: Sequence[Sample], problems: Sequence[str]) -> None:
        self.paths, self.samples, self.problems = list(paths), list(samples), list(problems)
        self._files: dict[tuple[int, int], int] = {}

    @classmethod
    def open(cls, source: str | Path, split: str = "train") -> "ShardIndex":
        """Index the tars of a folder (`{split}-*.tar`, or every tar when `split` is empty), of one tar, or of a
        brace pattern such as `shards/train-{00000..00009}.tar`.

        A truncated tar gives its whole samples and a line in `problems`. Raises FileNotFoundError or ValueError in
        one sentence when there is nothing to read.
        """
        paths = find_shards(source, split)
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

    def require(self, *suffixes: str) -> "ShardIndex":
        """Only samples that have one of `suffixes`; the others are counted in `problems`. ValueError if none has."""
        kept = [s for s in self.samples if any(name in s.members for name in suffixes)]
        if not kept:
            seen = sorted({name for s in self.samples[:100] for name in s.members})
            raise ValueError(
                f"no sample of {self.paths[0].parent} has a {' or '.join(suffixes)} (found: {seen})"
            )
        lost = len(self.samples) - len(kept)
        note = [f"{lost} samples without {' or '.join(suffixes)} left out"] if lost else []
        return ShardIndex(self.paths, kept, self.problems + note)

    def read(self, i: int, suffixes: Sequence[str] | None = None) -> dict[str, bytes]:
        """Member bytes by suffix, all or those of `suffixes` that are there. Safe across threads and forks."""
        sample = self.samples[i]
        file = self._descriptor(sample.shard)
        return {
            name: os.pread(file, size, offset)
            for name, (offset, size) in sample.members.items()
            if suffixes is None or name in suffixes
        }

    def _descriptor(self, shard: int) -> int:
        key = (os.getpid(), shard)
        if key not in self._files:
            self._files[key] = os.open(self.paths[shard], os.O_RDONLY)
        return self._files[key]

    def __getstate__(self) -> dict:
        return {"paths": self.paths, "samples": self.samples, "problems": self.problems, "_files": {}}


def find_shards(source: str | Path, split: str = "train") -> list[Path]:
    """The tars that `source` names, sorted. Raises FileNotFoundError saying what was looked for."""
    text = str(source)
    if "{" in text:
        import braceexpand

        paths = [Path(p) for p in braceexpand.braceexpand(text)]
        missing = [p for p in paths if not p.is_file()]
        if missing:
            raise FileNotFoundError(f"no shard {missing[0]} (named by {text})")
        return paths
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no data folder {path}")
    pattern = f"{split}-*.tar" if split else "*.tar"
    paths = sorted(path.glob(pattern))
    if not paths:
        raise FileNotFoundError(
            f"no {pattern} in {path}: make shards with `python -m data_tools.shard SRC {path}`"
        )
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
    except (tarfile.TarError, EOFError) as error:
        problem = f"{path} is damaged ({error}); the {len(samples)} samples before the damage are used"
    return [Sample(key, shard, members) for key, members in samples.items()], problem


def _sample_key(name: str) -> tuple[str, str]:
    """`a/b.ids.npy` -> (`a/b`, `ids.npy`): WebDataset splits at the first dot of the file name."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), suffix.lower()
