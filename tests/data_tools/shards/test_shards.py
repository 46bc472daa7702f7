"""Shards: contents, determinism, whole or absent."""

import gc
import io
import json
import tarfile

import pytest

from data_tools.download.spool import write_tar
from data_tools.ingest.records import Record
from data_tools.shards.image_shards import ShardWriter, sample_members
from data_tools.shards.index import ShardIndex


def records(count):
    return [
        Record(f"k{i}", b"image %d" % i, "jpg", ("一件T恤", "白色"), {"标签": i, "a": None})
        for i in range(count)
    ]


def write(folder, count=5, split="train", **options):
    with ShardWriter(folder, split, **options) as writer:
        for record in records(count):
            writer.write(record)
    return folder


def test_members_and_contents(tmp_path):
    write(tmp_path, 3, samples_per_shard=2)
    with tarfile.open(tmp_path / "train-00000.tar") as tar:
        assert tar.getnames() == ["k0.jpg", "k0.txt", "k0.json", "k1.jpg", "k1.txt", "k1.json"]
        assert tar.extractfile("k1.jpg").read() == b"image 1"
        assert tar.extractfile("k1.txt").read().decode() == "一件T恤\n白色"
        assert tar.extractfile("k1.json").read().decode() == '{"a": null, "标签": 1}'
        assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in tar} == {(0, 0, 0, 0o644, "")}
    dataset = json.loads((tmp_path / "dataset.json").read_text())
    assert dataset["shards"] == {"train-00000.tar": 2, "train-00001.tar": 1} and dataset["num_samples"] == 3


def test_same_bytes_each_time(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    assert (first / "train-00000.tar").read_bytes() == (second / "train-00000.tar").read_bytes()


def test_two_splits_share_one_dataset_file(tmp_path):
    write(tmp_path, 3)
    write(tmp_path, 2, split="val")
    dataset = json.loads((tmp_path / "dataset.json").read_text())
    assert dataset["splits"] == {"train": 3, "val": 2} and dataset["num_samples"] == 5


def test_extra_members_and_a_sample_without_image():
    record = Record("k", b"x", "png", (), {}, extra={"drawing.png": b"d", "boxes.json": b"[]"})
    assert [name for name, _ in sample_members(record)] == ["png", "boxes.json", "drawing.png", "txt", "json"]
    assert [name for name, _ in sample_members(Record("k", b"", "", ("字",)))] == ["txt", "json"]
    with pytest.raises(ValueError, match="no suffix"):
        sample_members(Record("k", b"x", "", ()))


def test_an_interrupted_writer_lists_nothing(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, samples_per_shard=2) as writer:
        for record in records(3):
            writer.write(record)
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["train-00000.tar"]


def test_old_shards_are_never_mixed_with_new_ones(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match="exists already"):
        ShardWriter(tmp_path)


def test_a_size_limit_closes_shards_early(tmp_path):
    write(tmp_path, 6, max_shard_bytes=6000)
    assert len(list(tmp_path.glob("*.tar"))) == 3


@pytest.mark.parametrize("key", ["a.b", "../a", "a/b", ""])
def test_bad_keys_are_refused(tmp_path, key):
    with pytest.raises(ValueError, match="key"), ShardWriter(tmp_path) as writer:
        writer.write(Record(key, b"x", "jpg", ()))


def test_a_key_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="twice"), ShardWriter(tmp_path) as writer:
        for _ in range(2):
            writer.write(records(1)[0])


def test_nan_is_refused(tmp_path):
    with pytest.raises(ValueError), ShardWriter(tmp_path) as writer:
        writer.write(Record("k", b"x", "jpg", (), {"x": float("nan")}))


def test_webdataset_and_our_index_read_what_was_written(tmp_path):
    import webdataset

    write(tmp_path, 5, samples_per_shard=2)
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [f"k{i}" for i in range(5)]
    assert read[3]["jpg"] == b"image 3" and json.loads(read[3]["json"]) == {"标签": 3, "a": None}
    index = ShardIndex.open(tmp_path)
    assert [sample.key for sample in index.samples] == [f"k{i}" for i in range(5)]


def test_shards_are_byte_for_byte_what_tarfile_writes(tmp_path):
    """Of tarfile itself, with headers that hold nothing of this moment; keys in Chinese and over 100 bytes too."""
    extra = {"line.png": b"line", "_x": b"x"}
    keys = ("a", "\u88d9\u5b50", "k" * 120)
    records = [
        Record(key, b"p" * (i + 511), "webp", ("\u7ea2",), {"i": i}, extra=extra)
        for i, key in enumerate(keys)
    ]
    with ShardWriter(tmp_path / "ours") as writer:
        for record in records:
            writer.write(record)
    with tarfile.open(tmp_path / "plain.tar", "w", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar:
        for i, key in enumerate(keys):
            members = [("webp", b"p" * (i + 511)), ("_x", b"x"), ("line.png", b"line")]
            members += [("txt", "\u7ea2".encode()), ("json", f'{{"i": {i}}}'.encode())]
            for suffix, data in members:
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size, info.mode = len(data), 0o644
                tar.addfile(info, io.BytesIO(data))
    assert (tmp_path / "ours" / "train-00000.tar").read_bytes() == (tmp_path / "plain.tar").read_bytes()
    assert write_tar(tmp_path / "spool.tar", records) == 3
    assert (tmp_path / "spool.tar").read_bytes() == (tmp_path / "plain.tar").read_bytes()


def test_a_full_disk_names_the_shard(tmp_path, monkeypatch):
    import errno
    import tarfile

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    writer = ShardWriter(tmp_path, "train", samples_per_shard=2)
    with pytest.raises(OSError, match=r"disk full while writing .*train-00000.tar: .* MiB are free"):
        writer.write(Record("a", b"", "", ("x",)))
    writer.abort()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_dropped_shard_writes_nothing_when_it_is_collected(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "train") as writer:
        writer.write(next(iter(records(1))))
        raise RuntimeError
    del writer
    gc.collect()
    assert not list(tmp_path.iterdir())
