"""Tiny checkpoints with random weights, written once; the helpers that write them live with their own parts' tests."""

import sys
from pathlib import Path

import pytest
from reference_shards import write_shards
from tiny_goods import write_ranker

for part in ("dalle", "rankers"):
    sys.path.append(str(Path(__file__).parent.parent / part))


@pytest.fixture(scope="session")
def generator_dir(tmp_path_factory) -> Path:
    """Read only."""
    from small_checkpoint import write_generator

    return write_generator(tmp_path_factory.mktemp("generator") / "step_00000007")


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    write_shards(folder, "train", 96, 1)
    write_shards(folder, "val", 24, 2)
    return folder


@pytest.fixture(scope="session")
def judge_dir(shards, tmp_path_factory) -> Path:
    """A judge that names the tiny goods right; skips where the weights that it stands on are not installed."""
    from test_train_judge import arguments

    from evaluation.train_judge import main
    from vq.losses.imagenet_features import JUDGE_NETWORK, imagenet_weights

    try:
        imagenet_weights(JUDGE_NETWORK)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("judge")
    main(arguments(shards, folder / "run", folder / "cache"))
    return (folder / "run" / "latest").resolve()


@pytest.fixture(scope="session")
def ranker_dir(tmp_path_factory) -> Path:
    return write_ranker(tmp_path_factory.mktemp("ranker"), ["一个红色的马克杯", "蓝色鞋子"])
