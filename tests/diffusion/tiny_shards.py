"""Image shards of discs, bars and blocks with Chinese captions, and a vocabulary of their characters."""

import io
from pathlib import Path

from tiny_goods import COLORS, KINDS, draw

from data_tools.ingest.records import Record
from data_tools.shards.image_shards import ShardWriter

MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def write_image_shards(folder: Path, num_train: int = 32, num_val: int = 8, size: int = 16) -> Path:
    for split, count, first in (("train", num_train, 0), ("val", num_val, 1000)):
        with ShardWriter(folder, split, samples_per_shard=16) as writer:
            for i in range(first, first + count):
                kind, color = KINDS[i % len(KINDS)], list(COLORS)[i % len(COLORS)]
                buffer = io.BytesIO()
                draw(kind, color, i, size).save(buffer, "PNG")
                writer.write(
                    Record(f"{i:06d}", buffer.getvalue(), "png", (f"一个{color}的{kind}",), {}, "test")
                )
    return folder


def write_vocab(folder: Path) -> Path:
    folder.mkdir(parents=True)
    characters = dict.fromkeys("一个的" + "".join(COLORS) + "".join(KINDS))
    (folder / "vocab.txt").write_text("\n".join([*MARKS, *characters]) + "\n", "utf-8")
    return folder
