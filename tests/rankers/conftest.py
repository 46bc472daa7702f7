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


@pytest.fixture(scope="session")
def chinese_clip(tmp_path_factory) -> Path:
    """A folder in the hub's layout with random weights."""
    from transformers import ChineseCLIPConfig, ChineseCLIPImageProcessor, ChineseCLIPModel

    folder = tmp_path_factory.mktemp("chinese-clip")
    text = {
        "vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 64,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    import torch

    torch.manual_seed(3)
    config = ChineseCLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    ChineseCLIPModel(config).save_pretrained(str(folder))
    ChineseCLIPImageProcessor(
        size={"height": 32, "width": 32}, do_center_crop=False, resample=3,
        image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711],
    ).save_pretrained(str(folder))  # fmt: skip
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"红色的杯子蓝鞋一双"]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    return folder
