"""Nothing validates on what it trains on."""

import shutil
from pathlib import Path

import pytest
from make_sources import write_folder

from data_tools.shard import ShardConfig, shard
from data_tools.shards.holdout import open_splits
from data_tools.shards.index import ShardIndex


@pytest.fixture
def one_tar(tmp_path) -> Path:
    shard(ShardConfig(write_folder(tmp_path / "in", 40), str(tmp_path / "sh"), workers=0))
    return Path(shutil.move(tmp_path / "sh/train-00000.tar", tmp_path / "00000.tar"))


def keys(index: ShardIndex) -> set[str]:
    return {sample.key for sample in index.samples}


@pytest.mark.parametrize(
    "name", ["00000.tar", "{00000..00000}.tar", "train-00000.tar", "[x]{y}.tar", "a::b.tar"]
)
def test_a_source_without_splits_is_held_out_by_hash(one_tar, name):
    path = one_tar.parent / name
    if "{0" not in name and name != one_tar.name:
        one_tar.rename(path)
    train, val = open_splits(str(path))
    assert not keys(train) & keys(val) and len(train) + len(val) == 40 and len(val) >= 1
    assert any("are held out for validation by the hash" in text for text in train.problems)
    again = open_splits(str(path))
    assert keys(again[1]) == keys(val)


def test_named_splits_stay_as_they_are(one_tar):
    folder = one_tar.parent / "both"
    folder.mkdir()
    shutil.copy(one_tar, folder / "train-00000.tar")
    shard(ShardConfig(write_folder(one_tar.parent / "other" / "x", 3), str(one_tar.parent / "v"), workers=0))
    shutil.copy(one_tar.parent / "v" / "train-00000.tar", folder / "val-00000.tar")
    train, val = open_splits(folder)
    assert (
        len(val) == 3
        and len(train) == 37
        and "3 training samples are validation samples too" in train.problems[0]
    )


def test_a_copy_is_no_validation(one_tar):
    shutil.copy(one_tar, one_tar.parent / "train-00000.tar")
    shutil.copy(one_tar, one_tar.parent / "val-00000.tar")
    with pytest.raises(ValueError, match=r"all 40 training samples .* are validation samples too"):
        open_splits(one_tar.parent)
