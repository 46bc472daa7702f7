"""Sixteen small images with captions in a folder, a tiny base beside it, and the flags of a short run."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from tiny_base import tiny_base

from diffusion.base import save_base

COLORS = {
    "红色的鞋": (220, 40, 40),
    "蓝色的裙": (40, 60, 220),
    "黑色的鞋": (30, 30, 30),
    "金色的盒": (220, 180, 40),
}
FLAGS = ["--loop.tensorboard", "False", "--device", "cpu", "--precision", "fp32", "--data.num-workers", "0"]
FLAGS += ["--loop.log-every", "1", "--sample-steps", "2", "--data.buckets.resolutions", "48"]
FLAGS += ["--data.buckets.step", "16", "--optim.warmup-steps", "0", "--loop.keep-last", "0"]


def write_base(folder: Path, **options) -> Path:
    folder.mkdir(parents=True)
    save_base(tiny_base(folder.parent / f"{folder.name}_tokenizer", **options), folder)
    return folder


def write_images(folder: Path, count: int = 16, sizes=((40, 40), (64, 40), (40, 64))) -> Path:
    for name in ("images", "captions"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        text, color = list(COLORS.items())[i % len(COLORS)]
        width, height = sizes[i % len(sizes)]
        noise = rng.integers(-10, 10, (height, width, 3))
        pixels = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i:02d}.png")
        (folder / "captions" / f"{i:02d}.txt").write_text(text + "\n", "utf-8")
    return folder


def rows(run: Path, kind: str = "train") -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]
