"""Chinese-CLIP (Yang et al. 2022, arXiv 2211.01335) through transformers: to rank with, and to fine-tune.

Published as OFA-Sys/chinese-clip-vit-base-patch16, -vit-large-patch14, -vit-large-patch14-336px, -vit-huge-patch14.
Its text feature is the first token's through a projection, at most 52 tokens; its pictures are squashed, bicubic.
"""

import shutil
from pathlib import Path
from typing import Any

import torch

from common.distributed import pick_device
from common.files import read_json
from rankers.base import TwoTowerRanker
from rankers.calibration import find_calibration
from rankers.clip import RankerTowers
from rankers.model import ModelConfig, RankerModel, one_axis
from rankers.text import RankerTokenizer

MAX_TEXT_LEN = 52  # [CLS] and [SEP] included: what all published models were trained with
TOWER_FILES = (
    "config.json",
    "preprocessor_config.json",
    "vocab.txt",
    "tokenizer.json",
    "tokenizer_config.json",
)


def chinese_clip_ranker(name: str, device: str = "auto", precision: str = "auto") -> TwoTowerRanker:
    """From a folder in the hub's layout or a hub id. Raises FileNotFoundError or ValueError in one sentence."""
    model, tokenizer = load_folder(find_folder(name))
    towers = RankerTowers(f"chinese_clip:{name}", model, tokenizer, pick_device(device), precision)
    return TwoTowerRanker(towers, find_calibration(towers.name))


def find_folder(name: str) -> Path:
    """A local folder, or the hub's files in the local cache, downloaded if need be."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path} is no Chinese-CLIP folder: it holds no config.json")
        return path
    patterns = [*TOWER_FILES, "model.safetensors", "pytorch_model.bin"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"no Chinese-CLIP weights: {name} is no folder, and the hub id was looked for in {HF_HUB_CACHE} and on the "
            "hub; try OFA-Sys/chinese-clip-vit-base-patch16"
        ) from error


def load_folder(folder: Path) -> tuple[RankerModel, RankerTokenizer]:
    """Weights and tokenizer of a folder. Raises ValueError when the folder holds another model."""
    from transformers import ChineseCLIPModel

    config = model_config(folder)
    if not any((folder / name).is_file() for name in ("model.safetensors", "pytorch_model.bin")):
        raise FileNotFoundError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")
    with torch.device("meta"):
        model = RankerModel(config, folder)
    loaded, report = ChineseCLIPModel.from_pretrained(
        str(folder), dtype=torch.float32, output_loading_info=True
    )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"the weights in {folder} lack {missing[0]} and {len(missing) - 1} more")
    model.clip = loaded
    model.clip.logit_scale = one_axis(loaded.logit_scale)
    model.mean = torch.tensor(config.mean).view(1, 3, 1, 1)
    model.std = torch.tensor(config.std).view(1, 3, 1, 1)
    return model.eval(), RankerTokenizer(folder, config.max_text_len)


def model_config(folder: Path) -> ModelConfig:
    """The folder's preprocessing as a ranker's config; its towers are described by the folder itself."""
    values = _mapping(folder / "config.json")
    if values.get("model_type") != "chinese_clip":
        raise ValueError(f"{folder} holds a model of type {values.get('model_type')!r}, not 'chinese_clip'")
    pictures = _mapping(folder / "preprocessor_config.json")
    if pictures.get("do_center_crop") is not False or pictures.get("resample", 3) != 3:
        raise ValueError(
            f"{folder}/preprocessor_config.json does not squash pictures bicubically (do_center_crop false, resample "
            "3) as the published Chinese-CLIP models do"
        )
    size = pictures["size"]
    side = size if isinstance(size, int) else size.get("height", size.get("shortest_edge"))
    length = min(MAX_TEXT_LEN, values["text_config"].get("max_position_embeddings", 512))
    return ModelConfig(
        architecture="chinese_clip",
        image_tower="chinese_clip",
        embed_dim=values.get("projection_dim", 512),
        image_size=int(side),
        max_text_len=length,
        mean=tuple(pictures["image_mean"]),
        std=tuple(pictures["image_std"]),
        resize="squash",
    )


def _mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is no Chinese-CLIP folder: it holds no {path.name}")
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no object")
    return values


def copy_towers(folder: Path, destination: Path) -> None:
    """What a checkpoint needs beside weights."""
    for name in TOWER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, destination / name)
