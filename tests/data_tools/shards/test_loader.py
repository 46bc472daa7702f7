"""Order, elasticity, corrupt samples and truncated tars."""

import io
import itertools
import multiprocessing
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from common.distributed import World
from data_tools.images.crops import CropFlip
from data_tools.ingest.records import Record
from data_tools.shards.captions import CaptionChoice, FactCaptions, pick_caption
from data_tools.shards.image_shards import ShardWriter
from data_tools.shards.index import ShardIndex
from data_tools.shards.loader import (
    DecodeImage,
    DecodeTokens,
    Order,
    eval_batches,
    train_batches,
)
from data_tools.shards.views import read_views


def world(rank=0, size=1):
    return World(rank, size, rank, torch.device("cpu"), "none")


def some_image(i: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path):
    with ShardWriter(tmp_path, "train", samples_per_shard=7) as writer:
        for i in range(17):
            writer.write(Record(f"k{i:03d}", some_image(i), "png", (f"caption {i}", f"other {i}")))
    return tmp_path


def keys(index, start, count, batch, ranks=1, workers=0):
    """Keys of `count` global batches from global counter `start`, the ranks' shares put together again."""
    streams = [
        train_batches(index, DecodeImage(16), batch, world(r, ranks), 5, start, workers) for r in range(ranks)
    ]
    return [[k for stream in streams for k in next(stream)["key"]] for _ in range(count)]


def test_an_epoch_holds_every_sample_once(shards):
    index = ShardIndex.open(shards)
    seen = list(itertools.chain(*keys(index, 0, 17, 2)))
    assert sorted(seen[:17]) == sorted(seen[17:34]) == [f"k{i:03d}" for i in range(17)]
    assert seen[:17] != seen[17:34]


def test_resume_and_rank_count_do_not_change_the_order(shards):
    index = ShardIndex.open(shards)
    whole = keys(index, 0, 9, 4)
    assert keys(index, 5 * 4, 4, 4) == whole[5:]
    assert keys(index, 0, 9, 4, ranks=2) == whole
    assert keys(index, 8, 3, 4, ranks=4) == whole[2:5]
    assert keys(index, 0, 6, 4, workers=2) == whole[:6]


def test_augmentation_hangs_on_the_sample_alone(shards):
    index = ShardIndex.open(shards)
    decode = DecodeImage(16, CropFlip(min_scale=0.5))
    one = [next(train_batches(index, decode, 6, world(), 5, 0))]
    two = [next(train_batches(index, decode, 6, world(r, 2), 5, 0)) for r in range(2)]
    assert torch.equal(one[0]["image"], torch.cat([b["image"] for b in two]))
    assert one[0]["text"] == two[0]["text"] + two[1]["text"]


def test_seeds_differ():
    first, second = Order(100, 0).permutation(0), Order(100, 1).permutation(0)
    assert not np.array_equal(first, second)
    assert sorted(first) == list(range(100))


def test_images_are_whole_and_in_range(shards):
    batch = next(eval_batches(ShardIndex.open(shards), DecodeImage(24, first_caption=True), 3))
    expected = np.asarray(Image.open(io.BytesIO(some_image(0))).convert("RGB"), np.float32) / 127.5 - 1
    np.testing.assert_allclose(batch["image"][0].permute(1, 2, 0), expected, atol=1e-6)
    assert batch["text"] == ["caption 0", "caption 1", "caption 2"]


def test_a_corrupt_image_is_replaced_and_counted(tmp_path, capsys):
    with ShardWriter(tmp_path, "train") as writer:
        for i in range(6):
            writer.write(Record(f"k{i}", b"no image" if i == 2 else some_image(i), "png", ("text",)))
    index = ShardIndex.open(tmp_path)
    seen = list(itertools.chain(*keys(index, 0, 3, 2)))
    assert len(seen) == 6 and "k2" not in seen
    assert "skipped a corrupt sample (1 so far): k2" in capsys.readouterr().out
    assert sum(len(b["key"]) for b in eval_batches(index, DecodeImage(16), 4)) == 5
    assert "left out 1 corrupt" in capsys.readouterr().out


def test_nothing_but_corrupt_images_is_an_error(tmp_path):
    with ShardWriter(tmp_path, "train") as writer:
        for i in range(3):
            writer.write(Record(f"k{i}", b"no image", "png", ("text",)))
    with pytest.raises(ValueError, match="cannot be read"):
        next(train_batches(ShardIndex.open(tmp_path), DecodeImage(16), 2, world()))


def test_a_truncated_tar_gives_its_whole_samples(shards):
    path = shards / "train-00000.tar"
    whole = path.read_bytes()
    index = ShardIndex.open(path, "")
    offset, size = index.samples[4].members["png"]
    path.write_bytes(whole[: offset + size // 2])
    cut = ShardIndex.open(shards)
    assert [s.key for s in cut.samples[:5]] == ["k000", "k001", "k002", "k003", "k007"]
    assert "truncated" in cut.problems[0]


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data folder"):
        ShardIndex.open(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no train-\*.tar"):
        ShardIndex.open(tmp_path)
    (tmp_path / "train-00000.tar").write_bytes(b"\0" * 10240)
    with pytest.raises(ValueError, match="no samples"):
        ShardIndex.open(tmp_path)
    with pytest.raises(FileNotFoundError, match="train-00001"):
        ShardIndex.open(f"{tmp_path}/train-{{00000..00001}}.tar")


def test_samples_of_another_kind_are_named(shards):
    with pytest.raises(ValueError, match=r"has a ids.npy"):
        ShardIndex.open(shards).require("ids.npy")


def test_token_shards(tmp_path):
    views = np.arange(12, dtype=np.uint16).reshape(3, 4)
    buffer = io.BytesIO()
    np.save(buffer, views)
    with ShardWriter(tmp_path, "train") as writer:
        writer.write(Record("a", b"", "", ("text",), extra={"ids.npy": buffer.getvalue()}))
        writer.write(Record("b", b"", "", ("text",), extra={"ids.npy": b"\x93NUMPY cut"}))
    index = ShardIndex.open(tmp_path).require("ids.npy")
    first = next(eval_batches(index, DecodeTokens(first_view=True), 2))
    assert first["image_ids"].tolist() == [[0, 1, 2, 3]] and first["image_ids"].dtype == torch.long
    stream = train_batches(index, DecodeTokens(), 2, world())
    drawn = {tuple(row.tolist()) for _ in range(20) for row in next(stream)["image_ids"]}
    assert drawn == {tuple(v.tolist()) for v in views}


def test_captions():
    lines = b"one\n\n two \n"
    assert pick_caption(lines, None) == "one"
    drawn = {pick_caption(lines, np.random.default_rng(i)) for i in range(20)}
    assert drawn == {"one", "two"}
    assert pick_caption(b" \n", None) == ""


def test_crop_keeps_its_floor():
    image = Image.new("RGB", (40, 60))
    for seed in range(30):
        side = CropFlip(0.5)(image, np.random.default_rng(seed)).size
        assert side[0] == side[1] and 20 <= side[0] <= 40
    with pytest.raises(ValueError, match="min_scale"):
        CropFlip(0)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_codes_are_read_as_numpy_reads_them(dtype):
    views = np.random.default_rng(0).integers(0, 60_000, (3, 64)).astype(dtype)
    for version in ((1, 0), (2, 0)):
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, views, version=version)
        found = read_views(buffer.getvalue())
        assert found.dtype == dtype and np.array_equal(found, views)
        with pytest.raises(ValueError, match="damaged"):
            read_views(buffer.getvalue()[:-1])


@pytest.mark.parametrize(
    "array", [np.zeros((0, 4), np.uint16), np.zeros(4, np.uint16), np.zeros((2, 4), np.float32)], ids=str
)
def test_what_is_no_table_of_codes_is_corrupt(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    with pytest.raises(ValueError, match=r"ids.npy is"):
        read_views(buffer.getvalue())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_vanishes_in_mid_run_is_named(shards, num_workers, tmp_path):
    copied = shutil.copytree(shards, tmp_path / "copy")
    index = ShardIndex.open(copied)
    gone = index.paths[-1]
    gone.unlink()
    before = set(multiprocessing.active_children())  # of other tests
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        list(itertools.islice(train_batches(index, DecodeImage(16), 4, world(), num_workers=num_workers), 50))
    assert str(raised.value) == f"the shard {gone} has vanished: put it back and run the same command again"
    # one that were left would keep the interpreter from ending
    assert not set(multiprocessing.active_children()) - before


def test_facts_stand_for_some_captions(tmp_path):
    meta = {"kind": "milk", "item": "Arla whole milk", "kids": None, "count": 3}
    with ShardWriter(tmp_path, "train", samples_per_shard=10) as writer:
        for i in range(10):
            record_meta = meta if i else {}
            writer.write(
                Record(f"{i}", some_image(i), "png", ("a carton of Arla whole milk",), record_meta, "test")
            )
    index = ShardIndex.open(tmp_path, "train")
    facts = FactCaptions(("{kind}", "{item}", "{kids} {kind}", "{count}", "a {nothing}"), 0.5)
    decode = DecodeImage(8, captions=CaptionChoice(facts=facts))
    drawn = [decode(index, 5, np.random.default_rng(i))["text"] for i in range(200)]
    assert set(drawn) == {"milk", "Arla whole milk", "a carton of Arla whole milk"}
    assert 60 < drawn.count("a carton of Arla whole milk") < 140
    assert decode(index, 0, np.random.default_rng(1))["text"] == "a carton of Arla whole milk", "no facts"
    assert (
        facts.draw(b"{broken", np.random.default_rng(0)) == facts.draw(b"[1]", np.random.default_rng(0)) == ""
    )
    assert (
        FactCaptions(("a box of {kind}",), 0.5).draw(b'{"kind": " milk"}', np.random.default_rng(0))
        == "a box of milk"
    )
    for bad in ({"templates": ("{kind}",)}, {"share": 0.5}, {"templates": ("{kind}",), "share": 1.5}):
        with pytest.raises(ValueError, match="fact captions"):
            FactCaptions(**bad)
    for template in ("milk", "{kind", "{kind.__class__}", "{0}", "{}"):
        with pytest.raises(ValueError, match="the fact caption"):
            FactCaptions((template,), 0.5)
