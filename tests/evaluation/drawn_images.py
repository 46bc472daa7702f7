"""Out directories as generate.py leaves them, without a generator."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image


def plain_image(text: str, index: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (sum(text.encode()) % 256, 20 * index % 256, 0))


def write_out_dir(
    path: Path,
    texts: Sequence[str] = ("a", "b"),
    num: int = 3,
    draw: Callable[[str, int], Image.Image] = plain_image,
    **values,
) -> Path:
    """The likelihood of image i of a text is i + 2."""
    path.mkdir(parents=True)
    lines = []
    for count, (text, index) in enumerate((t, i) for t in texts for i in range(num)):
        name = f"{count:04d}.png"
        draw(text, index).save(path / name)
        line = {"file": name, "text": text, "index": index, "seed": 7, "seconds": 0.5, "checkpoint": "abc"}
        line |= {"log_likelihood": -10.0 + index, "null_log_likelihood": -12.0}
        lines.append(json.dumps(line | {"sampling": {"cfg_scale": 3.0}} | values, ensure_ascii=False))
    (path / "images.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return path
