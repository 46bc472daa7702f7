"""Encoding and generating on a cluster give what one machine gives: by pickled work, and on Ray itself."""

import re
from pathlib import Path

import pytest
from pickling_cluster import PicklingCluster
from ray_nodes import losing_a_node, needs_ray, two_nodes
from small_checkpoint import CAPTIONS
from test_generate import lines, run, some_images
from tiny_data import write_image_shards, write_image_tokenizer

import generate
from data_tools import engine
from vq.encode_shards import main as encode


@pytest.fixture(scope="module")
def nodes():
    with two_nodes() as cluster:
        yield cluster


@pytest.fixture(params=["pickled", pytest.param("ray", marks=[pytest.mark.slow, needs_ray])])
def engine_flags(request, monkeypatch) -> list[str]:
    """Of the command, without the prefix of its options."""
    if request.param == "pickled":
        monkeypatch.setattr(engine, "RayCluster", PicklingCluster)
        return ["engine", "ray"]
    return ["engine", "ray", "ray-address", request.getfixturevalue("nodes").address]


def flags_of(words: list[str], prefix: str = "") -> list[str]:
    return [f"--{prefix}{word}" if i % 2 == 0 else word for i, word in enumerate(words)]


def tars(folder: Path) -> dict[str, bytes]:
    found = [*folder.glob("*.tar"), folder / "dataset.json", folder / "tokenizer.json"]
    return {path.name: path.read_bytes() for path in found}


def test_token_shards_have_the_bytes_of_one_machine(engine_flags, tmp_path):
    write_image_shards(tmp_path / "images")
    write_image_tokenizer(tmp_path / "tokenizer")
    flags = ["--views", "2", "--check", "0", "--device", "cpu", "--precision", "fp32"]
    sources = [str(tmp_path / "tokenizer"), str(tmp_path / "images")]
    whole = encode([*sources, str(tmp_path / "local"), *flags])
    spread = encode([*sources, str(tmp_path / "spread"), *flags, *flags_of(engine_flags, "work.")])
    assert spread == whole == {"images": 56, "skipped": 0, "shards_kept": 0}
    assert tars(tmp_path / "spread") == tars(tmp_path / "local") and len(tars(tmp_path / "local")) == 6
    (tmp_path / "spread" / "train-00001.tar").unlink()
    again = encode([*sources, str(tmp_path / "spread"), *flags, *flags_of(engine_flags, "work.")])
    assert again == {"images": 16, "skipped": 0, "shards_kept": 3}
    assert tars(tmp_path / "spread") == tars(tmp_path / "local")


def test_prompts_give_the_images_of_one_machine(engine_flags, generator_dir, tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("\n".join(CAPTIONS), "utf-8")
    flags = ("", "2", "--prompts-file", str(path), "--batch-size", "3")
    alone = run(generator_dir, tmp_path / "alone", *flags)
    spread = run(generator_dir, tmp_path / "spread", *flags, *flags_of(engine_flags))
    assert some_images(spread) == some_images(alone)

    assert timeless(spread) == timeless(alone)


def timeless(out: Path) -> list[str]:
    return [re.sub(r"'seconds': [\d.]+", "", str(line)) for line in lines(out)]


@needs_ray
@pytest.mark.slow
def test_a_node_dies_and_the_results_are_those_of_one_machine(nodes, generator_dir, tmp_path):
    address = nodes.address
    write_image_shards(tmp_path / "images", num_train=160)
    write_image_tokenizer(tmp_path / "tokenizer")
    flags = ["--views", "2", "--check", "0", "--device", "cpu", "--precision", "fp32"]
    sources = [str(tmp_path / "tokenizer"), str(tmp_path / "images")]
    encode([*sources, str(tmp_path / "local"), *flags])
    with losing_a_node(nodes, (tmp_path / "codes" / "train-00000.tar").exists):
        encode(
            [*sources, str(tmp_path / "codes"), *flags, "--work.engine", "ray", "--work.ray-address", address]
        )
    assert tars(tmp_path / "codes") == tars(tmp_path / "local") and len(tars(tmp_path / "local")) == 13

    (tmp_path / "p.txt").write_text("\n".join(CAPTIONS), "utf-8")
    flags = ("", "6", "--prompts-file", str(tmp_path / "p.txt"), "--batch-size", "2")
    alone, spread = run(generator_dir, tmp_path / "alone", *flags), tmp_path / "spread"
    with losing_a_node(nodes, lambda: any(spread.glob("0*.png"))):
        run(generator_dir, spread, *flags, "--engine", "ray", "--ray-address", address)
    assert some_images(spread) == some_images(alone) and timeless(spread) == timeless(alone)


def test_one_text_is_not_for_a_cluster(generator_dir, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        generate.main(
            [CAPTIONS[0], "1", str(tmp_path), "--checkpoint", str(generator_dir), "--engine", "ray"]
        )
    assert stop.value.code == 2 and "name them with --prompts-file" in capsys.readouterr().err
