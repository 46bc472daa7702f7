"""Shards of small images with captions and categories, and the smallest GAN that trains on them."""

import io
import json
import tarfile
from pathlib import Path

from tiny_goods import COLORS, KINDS, draw

TEXTS = [f"一{'双' if kind == '鞋子' else '个'}{color}的{kind}" for color in COLORS for kind in KINDS]
SIZES = [
    *("--generator.img-size", "32", "--generator.channels", "8", "--generator.max-channels", "16"),
    *("--generator.style-dim", "16", "--generator.z-dim", "16", "--discriminator.channels", "8"),
    *(
        "--text.tower.width",
        "16",
        "--text.tower.layers",
        "1",
        "--text.tower.heads",
        "2",
        "--text.embed-dim",
        "16",
    ),
]
COMMON = [
    *("--loop.global-batch-size", "4", "--loop.log-every", "1", "--loop.tensorboard", "False"),
    *("--loop.eval-every", "0", "--num-workers", "0", "--device", "cpu", "--val-images", "6"),
    *("--sample-images", "2"),
]


def sample(number: int, category: str | None = "", size: int = 40) -> dict[str, bytes]:
    """The `number`th caption and its image; category "": that of the caption, None: none."""
    text = TEXTS[number % len(TEXTS)]
    color, kind = list(COLORS)[number // len(KINDS) % len(COLORS)], KINDS[number % len(KINDS)]
    buffer = io.BytesIO()
    draw(kind, color, number, size).save(buffer, "PNG")
    meta = {} if category is None else {"label": category or kind}
    return {"png": buffer.getvalue(), "txt": text.encode(), "json": json.dumps(meta).encode()}


def write_shards(folder: Path, train: list[dict[str, bytes]], val: list[dict[str, bytes]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, samples in (("train", train), ("val", val)):
        with tarfile.open(folder / f"{split}-00000.tar", "w") as tar:
            for i, members in enumerate(samples):
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{split}{i:04d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def rows(run: Path, source: str = "train") -> list[dict]:
    """Lines of the run's log, without what depends on the machine."""
    timed = ("samples_per_second", "data_share", "eta_seconds")
    found = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    return [{k: v for k, v in row.items() if k not in timed} for row in found if row["kind"] == source]
