"""Small shards with captions and categories, a ranker of random weights, and a GAN trained for four steps."""

from pathlib import Path

import pytest
from tiny_gan import COMMON, SIZES, TEXTS, sample, write_shards
from tiny_goods import write_ranker

from gan import train as gan_train


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """24 training and 6 validation images of three kinds in four colours; every fifth has no category."""
    train = [sample(i, None if i % 5 == 0 else "") for i in range(24)]
    return write_shards(tmp_path_factory.mktemp("shards"), train, [sample(i + 100) for i in range(6)])


@pytest.fixture(scope="session")
def ranker_dir(tmp_path_factory) -> Path:
    return write_ranker(tmp_path_factory.mktemp("ranker"), TEXTS)


@pytest.fixture
def train(tmp_path, shards):
    """train(name, *flags, steps=4, data=shards) -> the run directory of a run that ended well."""

    def run(name: str, *flags: str, steps: int = 4, data: Path = shards) -> Path:
        argv = ["--data", str(data), "--loop.run-dir", str(tmp_path / name), "--loop.num-steps", str(steps)]
        gan_train.main([*argv, *SIZES, *COMMON, *flags])
        return tmp_path / name

    return run


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory, shards) -> Path:
    """A run of four steps with captions and categories."""
    directory = tmp_path_factory.mktemp("run") / "gan"
    argv = ["--data", str(shards), "--loop.run-dir", str(directory), "--loop.num-steps", "4"]
    gan_train.main([*argv, *SIZES, *COMMON])
    return directory
