"""Real images for the tests: three kinds in four colours, as shards with the facts of goods."""

import io
from pathlib import Path

import numpy as np
from tiny_goods import COLORS, KINDS, draw

from data_tools.ingest.records import Record
from data_tools.shards.image_shards import ShardWriter

WORDS = {"杯子": "马克杯"}  # the noun that captions use for a kind, where it is another one


def caption(kind: str, color: str) -> str:
    return f"一个{color}的{WORDS.get(kind, kind)}"


def record(kind: str, color: str, key: str, seed: int) -> Record:
    buffer = io.BytesIO()
    draw(kind, color, seed).save(buffer, "PNG")
    meta = {"label_zh": kind, "color_zh": color, "item_zh": WORDS.get(kind, kind)}
    return Record(key, buffer.getvalue(), "png", (caption(kind, color),), meta)


def write_shards(folder: Path, split: str, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with ShardWriter(folder, split, 50) as writer:
        for i in range(count):
            kind, color = KINDS[int(rng.integers(3))], list(COLORS)[int(rng.integers(4))]
            writer.write(record(kind, color, f"{split}{i:04d}", seed * 1000 + i))


def write_out_dir(folder: Path, per_text: int = 2, wrong: int = 0) -> Path:
    """An out directory of the twelve titles; the first `wrong` titles show another kind and colour."""
    import json

    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for place, (kind, color) in enumerate((k, c) for k in KINDS for c in COLORS):
        shown = (kind, color)
        if place < wrong:
            shown = (KINDS[(KINDS.index(kind) + 1) % 3], list(COLORS)[(list(COLORS).index(color) + 1) % 4])
        for index in range(per_text):
            name = f"{len(lines):04d}.png"
            draw(*shown, 900_000 + len(lines)).save(folder / name)
            line = {
                "file": name,
                "text": caption(kind, color),
                "seed": 3,
                "index": index,
                "log_likelihood": -float(index),
            }
            lines.append(line | {"sampling": {"cfg_scale": 3.0}, "seconds": 0.5})
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "images.jsonl").write_text(text, "utf-8")
    return folder
