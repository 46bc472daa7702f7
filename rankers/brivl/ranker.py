"""BriVL as a ranker: weights from a file, images prepared as one of three published set-ups did.

    load_ranker("brivl:brivl-with-roberta-base.pth?preset=nmi-grid&vocab=chinese-roberta-wwm-ext/vocab.txt")

| preset | side | ImageNet mean and deviation | regions |
| nmi-grid (default) | 456 | yes | 6 x 6 cells and the whole image; needs no detector |
| brivl1 | 380 | yes | up to 36 detector boxes from `boxes=FILE.jsonl` and the whole image |
| seed | 456 | no | the whole image |
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from common.distributed import pick_device
from common.files import read_lines
from common.precision import autocast
from rankers.base import TwoTowerRanker, as_rgb, content_hash
from rankers.brivl.model import Brivl, BrivlConfig
from rankers.calibration import find_calibration
from vq.published.foreign import read_foreign, require_finite, tensors_of, unwrapped

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Preset:
    """How images become tensors and regions."""

    image_size: int
    normalize: bool
    grid: int
    """Cells a side; 0: none."""
    takes_boxes: bool


PRESETS = {
    "nmi-grid": Preset(456, True, 6, False),
    "brivl1": Preset(380, True, 0, True),
    "seed": Preset(456, False, 0, False),
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def brivl_ranker(name: str, device: str = "auto", precision: str = "auto") -> TwoTowerRanker:
    """`WEIGHTS[?preset=...&vocab=...&boxes=...]`. Raises FileNotFoundError or ValueError in one sentence."""
    path, _, query = name.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = set(options) - {"preset", "vocab", "boxes"}
    if unknown:
        raise ValueError(f"brivl:{name}: unknown option {sorted(unknown)[0]} (known: boxes, preset, vocab)")
    preset = options.get("preset", "nmi-grid")
    if preset not in PRESETS:
        raise ValueError(f"brivl:{name}: unknown preset {preset!r}, use one of {', '.join(PRESETS)}")
    if ("boxes" in options) != PRESETS[preset].takes_boxes:
        need = "needs" if PRESETS[preset].takes_boxes else "takes no"
        raise ValueError(f"brivl:{name}: the preset {preset} {need} boxes=FILE.jsonl of detector boxes")
    boxes = read_boxes(Path(options["boxes"])) if "boxes" in options else None
    path = os.path.expanduser(path)
    model = load_brivl(Path(path), BrivlConfig())
    vocab = Path(options.get("vocab", Path(path).parent / "vocab.txt"))
    towers = BrivlTowers(f"brivl:{name}", model, PRESETS[preset], vocab, boxes, device, precision)
    return TwoTowerRanker(towers, find_calibration(towers.name), batch_size=16)


class BrivlTowers:
    """The model with its preprocessing and tokenizer."""

    def __init__(
        self,
        name: str,
        model: Brivl,
        preset: Preset,
        vocab: Path,
        boxes: dict[bytes, list[Box]] | None = None,
        device: str = "cpu",
        precision: str = "fp32",
    ) -> None:
        """`boxes`: detector boxes in the images' pixels by content hash. Raises FileNotFoundError for no vocab."""
        from transformers import BertTokenizer

        if not vocab.is_file():
            raise FileNotFoundError(
                f"no vocabulary {vocab}: give the vocab.txt of hfl/chinese-roberta-wwm-ext as ?vocab=FILE"
            )
        self.name, self.preset, self.boxes, self.precision = name, preset, boxes, precision
        self.device = pick_device(device)
        self.model = model.to(self.device).eval()
        self.tokenizer = BertTokenizer(vocab=str(vocab), do_lower_case=True)

    def preprocess(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels (B, 3, S, S), boxes (B, R, 4) in pixels of S, mask (B, R)."""
        pixels = torch.stack([self._pixels(image) for image in images])
        boxes, masks = zip(*(self._regions(image) for image in images), strict=True)
        return pixels, torch.stack(boxes), torch.stack(masks)

    def _pixels(self, image: Image.Image) -> Tensor:
        """Squashed without antialiasing, as torchvision 0.9 did with tensors."""
        levels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255  # (3, H, W)
        size = self.preset.image_size
        pixels = F.interpolate(levels[None], size=(size, size), mode="bilinear", align_corners=False)[0]
        if not self.preset.normalize:
            return pixels
        return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)

    def _regions(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """The regions, the whole image last, then zero boxes that do not count."""
        size, limit = float(self.preset.image_size), self.model.config.max_boxes
        regions = grid_boxes(self.preset.grid, size)
        if self.preset.takes_boxes:
            found = (self.boxes or {}).get(content_hash(image))
            if found is None:
                raise ValueError(f"{self.name}: there are no detector boxes for one of the images")
            across, down = size / image.width, size / image.height
            regions = [
                (x1 * across, y1 * down, x2 * across, y2 * down) for x1, y1, x2, y2 in found[: limit - 1]
            ]
        regions = [*regions, (0.0, 0.0, size, size)]
        padded = torch.zeros(limit, 4)
        padded[: len(regions)] = torch.tensor(regions)
        return padded, torch.arange(limit) < len(regions)

    def encode_images(self, pixels: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        images, boxes, mask = (part.to(self.device) for part in pixels)
        with autocast(self.device, self.precision):
            return self.model.imgencoder(images, boxes, mask)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        encoded = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.model.config.max_text_len,
            return_tensors="pt",
        )
        ids, mask = encoded["input_ids"].to(self.device), encoded["attention_mask"].bool().to(self.device)
        with autocast(self.device, self.precision):
            return self.model.textencoder(ids, mask)


def grid_boxes(cells: int, size: float) -> list[Box]:
    """Cells row by row as x1, y1, x2, y2."""
    side = size / cells if cells else 0.0
    return [(x * side, y * side, (x + 1) * side, (y + 1) * side) for y in range(cells) for x in range(cells)]


def read_boxes(path: Path) -> dict[bytes, list[Box]]:
    """BriVL's JSONL, `image_id` (a path) and `bbox` (boxes in the image's pixels) a line, by content hash."""
    if not path.is_file():
        raise FileNotFoundError(f"no file of boxes {path}")
    found: dict[bytes, list[Box]] = {}
    for number, line in enumerate(read_lines(path), 1):
        try:
            row = json.loads(line)
            boxes = [tuple(float(v) for v in box) for box in row["bbox"]]
            with Image.open(path.parent / row["image_id"]) as image:
                key = content_hash(as_rgb(image))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number} is no line with image_id and bbox: {error}") from error
        if any(len(box) != 4 for box in boxes):
            raise ValueError(f"{path}:{number} holds a box that is not x1, y1, x2, y2")
        found[key] = boxes
    return found


def load_brivl(path: Path, config: BrivlConfig) -> Brivl:
    """The two towers from a published file: the entry `learnable`, without the momentum copies. Strict.

    Raises FileNotFoundError, or ValueError for a file of another layout.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no BriVL weights {path}: get brivl-with-roberta-base.pth of the brivl-nmi project, or "
            "BriVL-1.0-5500w.pth where you have it"
        )
    values = read_foreign(path)
    if not isinstance(values, dict) or not isinstance(values.get("learnable"), dict):
        raise ValueError(f"{path} is no BriVL checkpoint: it has no entry 'learnable'")
    kept = {
        name: tensor
        for name, tensor in unwrapped(tensors_of(values["learnable"], path), r"(?:img|text)encoder\.").items()
        if name.startswith(("imgencoder.", "textencoder.")) and not name.endswith("position_ids")
    }
    require_finite(kept, path)
    with torch.device("meta"):
        model = Brivl(config)
    wanted = model.state_dict()
    differing = sorted(set(wanted) ^ set(kept)) or sorted(
        n for n in wanted if wanted[n].shape != kept[n].shape
    )
    if differing:
        raise ValueError(
            f"{path} does not fit BriVL 1.0: {len(differing)} weights differ, {differing[0]} among them"
        )
    model = Brivl(config)
    model.load_state_dict(kept)
    return model.eval()
