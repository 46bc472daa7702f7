"""Images of three kinds in four colours with captions, as shards."""

import io
from pathlib import Path

import numpy as np
from tiny_goods import COLORS, KINDS, draw

from data_tools.ingest.records import Record
from data_tools.shards.image_shards import ShardWriter


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
