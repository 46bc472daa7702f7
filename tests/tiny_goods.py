"""Images of three kinds in four colours, and a ranker with random weights, for the tests of several parts."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.text.bert_text import TextTowerConfig, write_text_tower
from rankers.model import ModelConfig, RankerModel, save_ranker

COLORS = {"红色": (210, 40, 40), "蓝色": (40, 80, 200), "绿色": (40, 150, 70), "黄色": (240, 210, 50)}
KINDS = ("杯子", "鞋子", "帽子")


def draw(kind: str, color: str, seed: int, size: int = 40) -> Image.Image:
    """A disc, a bar or a block of the colour on grey, placed by the seed."""
    rng = np.random.default_rng(seed)
    pixels = np.full((size, size, 3), 200, np.uint8)
    y, x = np.mgrid[:size, :size] / size
    cx, cy = rng.uniform(0.4, 0.6, 2)
    mask = {
        "杯子": (x - cx) ** 2 + (y - cy) ** 2 < 0.09,
        "鞋子": (abs(y - cy) < 0.12) & (abs(x - cx) < 0.38),
        "帽子": (abs(x - cx) < 0.12) & (abs(y - cy) < 0.38),
    }[kind]
    pixels[mask] = np.clip(np.array(COLORS[color]) + rng.integers(-10, 10, 3), 0, 255)
    return Image.fromarray(pixels)


def write_ranker(folder: Path, texts: list[str]) -> Path:
    """A checkpoint of kind ranker; its statistics are random too, so that a lost one shows."""
    write_text_tower(folder / "t", texts, TextTowerConfig(32, 1, 2, 16), None)
    torch.manual_seed(0)
    config = ModelConfig(image_tower="resnet-xs", embed_dim=16, image_size=32, max_text_len=16)
    model = RankerModel(config, folder / "t")
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
    directory = folder / "checkpoint"
    directory.mkdir()
    save_ranker(directory, config, model.state_dict(), folder / "t", 7)
    return directory
