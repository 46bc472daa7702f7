"""Training and validation samples of one source, which never share an image.

Where a source names no splits (one tar, a pattern of numbers) a share of its samples is held out by hash of key;
images that stand in both splits are trained on in neither silently: they are left to validation, and that is said.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from data_tools.shards.index import Sample, ShardIndex
from data_tools.shards.remote import RemoteOptions
from data_tools.split import fraction

VAL_SHARE = 0.05
DATA_SUFFIXES = ("webp", "jpg", "jpeg", "png", "ids.npy")


def open_splits(
    source: str | Path, remote: RemoteOptions | None = None, val_share: float = VAL_SHARE
) -> tuple[ShardIndex, ShardIndex]:
    """The (train, val) samples that `source` names, see `ShardIndex.open`. Held-out samples are counted in `problems`.

    Raises FileNotFoundError or ValueError in one sentence, also where nothing is left for one of the two.
    """
    train, val = (ShardIndex.open(source, split, remote) for split in ("train", "val"))
    same = {path.resolve() for path in train.paths} & {path.resolve() for path in val.paths}
    if same and train.remote:
        raise ValueError(
            f"{source} names no splits, so it would validate on what it trains on: name its shards train-*.tar and "
            "val-*.tar"
        )
    if same:
        return _hold_out(source, train, val, same, val_share)
    return (train, val) if train.remote or val.remote else (_without(train, val), val)


def _hold_out(
    source: str | Path, train: ShardIndex, val: ShardIndex, same: set[Path], share: float
) -> tuple[ShardIndex, ShardIndex]:
    """Split the samples of the tars that both splits name; at least one sample is held out."""
    pool = [s for s in train.samples if train.paths[s.shard].resolve() in same]
    ranked = sorted(pool, key=lambda sample: fraction(sample.key))
    held = {sample.key for sample in pool if fraction(sample.key) < share} or {s.key for s in ranked[:1]}
    kept = _only(train, lambda s: s.key not in held or train.paths[s.shard].resolve() not in same)
    left = _only(val, lambda s: s.key in held or val.paths[s.shard].resolve() not in same)
    if not kept.samples or not left.samples:
        raise ValueError(
            f"{source} names no splits and holds {len(pool)} samples: at least two are needed, one to validate with"
        )
    kept.problems.append(
        f"{source} names no splits: {len(held)} of its {len(pool)} samples are held out for validation by the hash of "
        "their key"
    )
    return kept, left


def _only(index: ShardIndex, wanted: Callable[[Sample], bool]) -> ShardIndex:
    samples = [sample for sample in index.samples if wanted(sample)]
    return ShardIndex(index.paths, samples, index.problems, index.window_shards)


def _without(train: ShardIndex, val: ShardIndex) -> ShardIndex:
    """`train` less the samples that stand in `val` with the same key and the same bytes."""
    index_of = {sample.key: i for i, sample in enumerate(val.samples)}
    twice = {
        i
        for i, sample in enumerate(train.samples)
        if sample.key in index_of and _are_equal(train, i, val, index_of[sample.key])
    }
    if not twice:
        return train
    if len(twice) == len(train):
        raise ValueError(
            f"all {len(twice)} training samples of {train.paths[0].parent} are validation samples too: split the data "
            "with python -m data_tools.shard SRC DST --val-share 0.1"
        )
    samples = [sample for i, sample in enumerate(train.samples) if i not in twice]
    note = f"{len(twice)} training samples are validation samples too and are left to validation"
    return ShardIndex(train.paths, samples, [*train.problems, note], train.window_shards)


def _are_equal(train: ShardIndex, i: int, val: ShardIndex, j: int) -> bool:
    """By the image or its codes: sizes first, which cost no reading."""
    one, other = train.samples[i].members, val.samples[j].members
    names = [name for name in DATA_SUFFIXES if name in one]
    if not names or any(name not in other or one[name][1] != other[name][1] for name in names):
        return False
    return _data(train, i, names) == _data(val, j, names)


def _data(index: ShardIndex, i: int, names: Sequence[str]) -> list[bytes]:
    members = index.read(i, names)
    return [members[name] for name in names]
