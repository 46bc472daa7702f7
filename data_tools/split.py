"""Splits that stay as they are when data is added: by hash of the key, stratified by label, groups kept together.

    python -m data_tools.split SRC splits.tsv --shares train=9 val=1 --stratify-by label --group-by item

writes `key<TAB>split`, which `python -m data_tools.shard SRC DST --split-file splits.tsv` follows. Without labels a
sample's split depends on nothing but its key (or group), so no list is needed: `--val-share 0.1` does the same.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from common.config import command, parse_options
from common.files import read_lines
from common.outputs.record import require_replaceable, writing_file
from data_tools.ingest.records import Record
from data_tools.readers.base import ReaderOptions

Shares = Mapping[str, float]


@dataclass(frozen=True)
class SplitConfig:
    """Assign each sample of a source to a split."""

    src: tyro.conf.Positional[Path]
    """Any recognised source."""
    out: tyro.conf.Positional[Path]
    """File to write: key<TAB>split, one line a sample."""
    shares: tuple[str, ...] = ("train=9", "val=1")
    """Splits and their shares, in any unit: train=9 val=1, or train=0.8 val=0.1 test=0.1."""
    stratify_by: str = ""
    """Field of the meta whose values shall have the same shares in every split, such as label."""
    group_by: str = ""
    """Field of the meta whose samples stay together, such as the item that several images show."""
    group_file: Path | None = None
    """File of key<TAB>group, such as near duplicates; samples of a group stay together."""
    previous: Path | None = None
    """File written before: its keys keep their split, new ones fill up the shares."""
    seed: int = 0
    """Another seed gives another split."""
    reader: tyro.conf.OmitArgPrefixes[ReaderOptions] = field(default_factory=ReaderOptions)

    def __post_init__(self):
        parse_shares(self.shares)
        if self.group_by and self.group_file:
            raise ValueError("--group-by and --group-file exclude each other: choose one")
        if self.seed < 0:
            raise ValueError(f"--seed must be 0 or more, not {self.seed}")


def parse_shares(shares: Sequence[str]) -> dict[str, float]:
    """`("train=9", "val=1")` to `{"train": 0.9, "val": 0.1}`. Raises ValueError naming the bad one."""
    parsed: dict[str, float] = {}
    for text in shares:
        name, _, number = text.partition("=")
        try:
            share = float(number)
        except ValueError:
            share = -1.0
        if not name or not 0 < share < float("inf") or name in parsed:
            raise ValueError(
                f"share {text!r}: write each split once as name=number above 0, such as train=9 val=1"
            )
        parsed[name] = share
    if not parsed:
        raise ValueError("--shares needs at least one name=number, such as train=9 val=1")
    total = sum(parsed.values())
    return {name: share / total for name, share in parsed.items()}


def fraction(name: str, seed: int = 0) -> float:
    """A number in [0, 1) that depends on the name and the seed alone, the same on every machine."""
    digest = hashlib.blake2b(name.encode(), digest_size=8, salt=seed.to_bytes(8, "little")).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def split_unit(key: str, group: object = None) -> str:
    """What the split is decided by: the group where there is one, else the key. The two cannot be confused."""
    return key if group is None or group == "" else f"group\t{group}"


def hash_split(name: str, shares: Shares, seed: int = 0) -> str:
    """The split of a key or group. Stable: it does not depend on what else there is.

    The first split takes the upper end, so raising `val` in train/val moves samples from train to val alone.
    """
    position = fraction(name, seed)
    names = list(shares)
    for split in reversed(names[1:]):
        position -= shares[split]
        if position < 0:
            return split
    return names[0]


def stratified_split(
    keys: Sequence[str],
    labels: Sequence[str],
    shares: Shares,
    groups: Sequence[str] | None = None,
    previous: Mapping[str, str] | None = None,
    seed: int = 0,
) -> dict[str, str]:
    """Key to split, each label with the given shares to within one group, the whole likewise.

    Groups (default: each key its own) are taken in the order of their hashes, each to the split that lacks most;
    what a label lacks is carried on to the next one, so many small labels do not add up to an empty split. Keys in
    `previous`, and the groups they are in, keep their split.
    """
    previous = previous or {}
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups or keys):
        members.setdefault(group, []).append(i)
    strata: dict[str, list[str]] = {}
    for group, rows in members.items():
        label = Counter(labels[i] for i in rows).most_common(1)[0][0]
        strata.setdefault(label, []).append(group)
    result: dict[str, str] = {}
    lack = dict.fromkeys(shares, 0.0)
    for label in sorted(strata):
        total = sum(len(members[group]) for group in strata[label])
        for name in shares:
            lack[name] += shares[name] * total
        fixed = {group: _kept_split([keys[i] for i in members[group]], previous) for group in strata[label]}
        for group in sorted(strata[label], key=lambda g: (not fixed[g], fraction(g, seed), g)):
            split = fixed[group] or max(shares, key=lambda name: lack[name])
            lack[split] = lack.get(split, 0.0) - len(members[group])
            result |= {keys[i]: split for i in members[group]}
    return {key: result[key] for key in keys}


def _kept_split(keys: Iterable[str], previous: Mapping[str, str]) -> str:
    found = Counter(previous[key] for key in keys if key in previous)
    return min(found, key=lambda split: (-found[split], split)) if found else ""


def read_pairs(path: Path) -> dict[str, str]:
    """A file of key<TAB>value. Raises ValueError with the line of a row that is none."""
    pairs: dict[str, str] = {}
    for number, line in enumerate(read_lines(path), 1):
        key, tab, value = line.partition("\t")
        if not (key and tab and value):
            raise ValueError(f"{path}:{number}: expected key<TAB>value, found {line[:60]!r}")
        pairs[key] = value
    return pairs


def split_source(config: SplitConfig) -> dict[str, str]:
    """Key to split of every readable record of the source."""
    from data_tools.readers.detect import open_source

    shares = parse_shares(config.shares)
    keys, labels, units = [], [], []
    groups = read_pairs(config.group_file) if config.group_file else {}
    source = open_source(config.src, config.reader, exclude=[config.out])
    for line in source.describe():
        print(line, file=sys.stderr)
    for item in source:
        if isinstance(item, Record):
            keys.append(item.key)
            labels.append(_field(item, config.stratify_by))
            units.append(split_unit(item.key, _field(item, config.group_by) or groups.get(item.key)))
    if not keys:
        raise ValueError(
            f"{config.src} has no readable sample: look with python -m data_tools.inspect {config.src}"
        )
    if config.stratify_by and not any(labels):
        raise ValueError(f"no sample has a field {config.stratify_by!r} to stratify by")
    previous = read_pairs(config.previous) if config.previous else {}
    if config.stratify_by or previous:
        return stratified_split(keys, labels, shares, units, previous, config.seed)
    return {key: hash_split(unit, shares, config.seed) for key, unit in zip(keys, units, strict=True)}


def _field(record: Record, name: str) -> str:
    value = record.meta.get(name) if name else None
    return "" if value is None else str(value)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command of this module."""
    config = parse_options(SplitConfig, argv, description=__doc__.splitlines()[0])
    require_replaceable(config.out)
    splits = split_source(config)
    with writing_file(config.out) as temporary:
        temporary.write_text("".join(f"{key}\t{split}\n" for key, split in splits.items()), "utf-8")
    counts = Counter(splits.values())
    text = ", ".join(f"{name} {counts[name]} ({counts[name] / len(splits):.1%})" for name in sorted(counts))
    print(f"{len(splits)} samples: {text} | {config.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
