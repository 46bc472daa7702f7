"""Pictures of three kinds in four colours with captions, as shards."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.records import Record
from data_tools.shards import ShardWriter

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


def write_shards(folder: Path, split: str, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with ShardWriter(folder, split, 50) as writer:
        for i in range(count):
            kind, color = KINDS[int(rng.integers(3))], list(COLORS)[int(rng.integers(4))]
            buffer = io.BytesIO()
            draw(kind, color, seed * 1000 + i).save(buffer, "PNG")
            caption = (f"一个{color}{kind}", f"{color}的{kind}", f"{kind}")[int(rng.integers(3))]
            stated = color if color in caption else None
            meta = {"label_zh": kind, "color_zh": stated}
            writer.write(Record(f"{split}{i:04d}", buffer.getvalue(), "png", (caption,), meta))
