"""A tiny data set, and a tiny ranker with random weights."""

from pathlib import Path

import pytest
from ranker_samples import write_shards
from tiny_goods import write_ranker


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, "train", 96, 1)
    write_shards(folder, "val", 24, 2)
    return folder


@pytest.fixture(scope="session")
def ranker_dir(tmp_path_factory) -> Path:
    return write_ranker(tmp_path_factory.mktemp("ranker"), ["一个红色的杯子", "蓝色鞋子"])


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
