"""From a folder of images to images of a text, with two commands."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tiny_data import COLORS, some_image

import generate
import train_dalle
from common.checkpoint import read_weights
from common.distributed import start_world
from common.files import write_json
from dalle.training.data import names_images
from dalle.training.from_images import names_of, prepare_images
from dalle.training.options import Options
from data_tools.shards.index import ShardIndex

VQGAN = """
model:
  image_size: 16
  codebook_size: 16
  codebook_dim: 4
  fast: {haar_levels: 1, channels: [32, 32], encoder_blocks: [0, 1], decoder_blocks: [0, 1], attention: false}
loop: {run_dir: runs/unused, num_steps: 4, global_batch_size: 4, save_every: 2, tensorboard: false}
num_workers: 0
"""


def write_folder(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        (folder / f"{i:03d}.png").write_bytes(some_image(i, 20))
        (folder / f"{i:03d}.txt").write_text(f"一个{list(COLORS)[i % len(COLORS)]}的圆盘", "utf-8")


def write_desk(path: Path) -> None:
    """120 images in goods/, one of them broken, and a small recipe."""
    write_folder(path / "goods", 120)
    (path / "goods" / "007.png").write_bytes(b"no image")
    (path / "vqgan.yaml").write_text(VQGAN, "utf-8")


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """A working directory in which nothing was trained."""
    monkeypatch.chdir(tmp_path)
    write_desk(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """What one training leaves, moved away from where it was made."""
    root = tmp_path_factory.mktemp("from_images")
    write_desk(root / "desk")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root / "desk")
        train_dalle.main(flags())
    return (root / "desk").rename(root / "kept")


@pytest.fixture
def trained_desk(kept, monkeypatch) -> Path:
    """A working directory after a training, at the same place for every test."""
    path = kept.with_name("desk")
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(kept, path, symlinks=True)
    monkeypatch.chdir(path)
    return path


def flags(*more: str, data: str = "goods") -> list[str]:
    return [
        *("--data", data, "--vqgan-config", "vqgan.yaml", "--loop.run-dir", "runs/mine", "--device", "cpu"),
        *("--loop.num-steps", "4", "--loop.global-batch-size", "8", "--loop.tensorboard", "False"),
        *("--model.dim", "16", "--model.num-layers", "2", "--model.num-heads", "2", "--num-workers", "0"),
        *("--sample-images", "0", *more),
    ]


def test_two_commands(desk, capsys):
    assert names_images("goods") and not names_images("") and not names_images("s3://bucket/shards")
    train_dalle.main(flags())
    out = capsys.readouterr()
    said = out.out + out.err
    for line in (
        "1/4 goods -> data/goods_shards",
        "2/4 image tokenizer -> runs/goods_vqgan",
        "4/4 generator",
    ):
        assert line in said
    assert "1 rows of goods were left out" in said
    assert not names_images("data/goods_shards")
    generate.main(["一个红色的圆盘", "2", "out", "--device", "cpu"])
    drawn = [p for p in (desk / "out").rglob("*.png") if Image.open(p).size == (16, 16)]
    assert len(drawn) == 2


def test_started_again_it_makes_only_what_is_missing(trained_desk, capsys):
    whole = read_weights(trained_desk / "runs/mine/latest")
    shutil.rmtree(trained_desk / "runs/mine")
    shutil.rmtree(trained_desk / "data/goods_tokens")
    capsys.readouterr()
    train_dalle.main(flags())
    out = capsys.readouterr()
    assert "data/goods_shards is complete already" in out.err
    assert "runs/goods_vqgan is complete already" in out.out
    again = read_weights(trained_desk / "runs/mine/latest")
    assert all((again[n] == whole[n]).all() for n in whole)


def test_a_tokenizer_that_is_named_is_taken(trained_desk):
    shutil.move(trained_desk / "runs/goods_vqgan", trained_desk / "other")
    shutil.rmtree(trained_desk / "runs/mine")
    train_dalle.main(flags("--image-tokenizer", "other"))
    assert not (trained_desk / "runs/goods_vqgan").exists()


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "cannot recognise few (an empty folder)"),
        (3, "holds 3 usable images with captions, too few to hold some back for validation"),
    ],
)
def test_too_few_images_are_refused(count, said, desk, capsys):
    write_folder(desk / "few", count)
    with pytest.raises(SystemExit) as stopped:
        train_dalle.main(flags(data="few"))
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_it_goes_on_after_images_were_added_changed_and_removed(trained_desk, capsys):
    (trained_desk / "goods" / "new.png").write_bytes(some_image(500, 20))
    (trained_desk / "goods" / "new.txt").write_text("一个红色的圆盘", "utf-8")
    (trained_desk / "goods" / "003.png").unlink()
    (trained_desk / "goods" / "003.txt").unlink()
    os.utime(trained_desk / "goods" / "004.png", ns=(1, 1))
    capsys.readouterr()
    train_dalle.main(flags("--loop.num-steps", "6"))
    out = capsys.readouterr()
    said = out.out + out.err
    assert "goods is not what it was (2 added and 2 removed and 1 changed files)" in said
    assert "the codes in data/goods_tokens are of other images" in said
    assert "runs/goods_vqgan is complete already" in said
    keys = {s.key for split in ("train", "val") for s in ShardIndex.open("data/goods_tokens", split).samples}
    assert "new" in keys and "003" not in keys and len(keys) == 119
    train_dalle.main(flags("--loop.num-steps", "6"))
    assert "not what it was" not in capsys.readouterr().out


@pytest.mark.slow
def test_two_folders_of_one_name_stay_apart(desk):
    """And the reader's options reach the reader: each hint can be followed."""
    write_folder(desk / "shop" / "goods", 120)
    write_json(names_of(Path("goods")).source, {"source": str((desk / "goods").resolve()), "files": {}})
    other = names_of(Path("shop/goods"))
    assert other.name.startswith("goods-") and names_of(Path("shop/goods")) == other
    (desk / "data" / "goods_source.json").unlink()
    for path in (desk / "goods").glob("*.txt"):
        path.write_bytes(path.read_text("utf-8").encode("gb18030"))
    train_dalle.main(flags("--encoding", "gb18030"))
    assert ShardIndex.open("data/goods_tokens", "train").read(0)["txt"].decode().startswith("一个")


def test_what_was_named_is_looked_at_first(desk, capsys):
    for more, said in (
        (flags(data="my_picturs"), "there is no file or folder my_picturs (--data)"),
        (flags("--text-tokenizer", "./no_such"), "no_such"),
        (flags("--image-tokenizer", "./no_such"), "no_such"),
        (flags("--vqgan-config", "no.yaml"), "no config file no.yaml"),
    ):
        with pytest.raises(SystemExit):
            train_dalle.main(more)
        assert said in capsys.readouterr().err and not (desk / "data").exists()


def test_what_cannot_be_recognised_is_refused(desk, capsys):
    (desk / "odd").mkdir()
    (desk / "odd" / "notes.xyz").write_text("nothing", "utf-8")
    with pytest.raises(SystemExit) as stopped:
        train_dalle.main(flags(data="odd"))
    assert stopped.value.code == 2
    assert "cannot recognise odd (notes.xyz: the first bytes are b'nothing')" in capsys.readouterr().err


def test_several_processes_are_refused(desk):
    world = replace(start_world("cpu"), size=2)
    with pytest.raises(ValueError, match="make token shards first, with one process"):
        prepare_images(Options(data="goods"), world)
