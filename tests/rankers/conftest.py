"""A tiny data set, and a tiny ranker with random weights."""

from pathlib import Path

import pytest
from ranker_samples import write_shards

from common.config import to_mapping
from rankers.model import TOWERS, ModelConfig, RankerModel, save_ranker
from rankers.text import TextTowerConfig, write_text_tower


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, "train", 96, 1)
    write_shards(folder, "val", 24, 2)
    return folder


@pytest.fixture(scope="session")
def ranker_dir(tmp_path_factory) -> Path:
    """A checkpoint of kind ranker with random weights."""
    import torch

    folder = tmp_path_factory.mktemp("ranker")
    write_text_tower(folder / "t", ["一个红色的杯子", "蓝色鞋子"], TextTowerConfig(32, 1, 2, 16), None)
    torch.manual_seed(0)
    config = ModelConfig(image_tower="resnet-xs", embed_dim=16, image_size=32, max_text_len=16)
    model = RankerModel(config, folder / "t")
    with torch.no_grad():  # random statistics, so that a lost buffer shows
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
    directory = folder / "checkpoint"
    directory.mkdir()
    save_ranker(directory, config, model.state_dict(), folder / "t", 7)
    assert to_mapping(config)["image_size"] == 32 and (directory / TOWERS).is_dir()
    return directory
