"""Chinese-CLIP (Yang et al. 2022, arXiv 2211.01335) through transformers: to rank with, and to fine-tune.

Published as OFA-Sys/chinese-clip-vit-base-patch16, -vit-large-patch14, -vit-large-patch14-336px, -vit-huge-patch14.
Its text feature is the first token's through a projection, at most 52 tokens; its images are squashed, bicubic.
"""

import shutil
from pathlib import Path
from typing import Any

import torch

from common.distributed import pick_device
from common.files import read_json
from common.text.bert_text import CaptionTokenizer
from rankers.base import TwoTowerRanker
from rankers.calibration import find_calibration
from rankers.clip import RankerTowers
from rankers.model import ModelConfig, RankerModel, one_axis
from vq.published.foreign import read_tensors, require_finite, unwrapped

MAX_TEXT_LEN = 52  # [CLS] and [SEP] included: what all published models were trained with
TOWER_FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "vocab.txt",
    "tokenizer.json",
    "tokenizer_config.json",
)


WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ANCHOR = r"text_model\.|vision_model\.|text_projection\.|logit_scale"  # how names of the model begin


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
    patterns = [*TOWER_FILES, *WEIGHTS, "model-*.safetensors", "pytorch_model-*.bin"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"no Chinese-CLIP weights: {name} is no folder, and the hub id was looked for in {HF_HUB_CACHE} and on the "
            "hub; try OFA-Sys/chinese-clip-vit-base-patch16"
        ) from error


def load_folder(folder: Path) -> tuple[RankerModel, CaptionTokenizer]:
    """Weights and tokenizer of a folder. Raises ValueError when the folder holds another model."""
    from transformers import ChineseCLIPConfig, ChineseCLIPModel

    config = model_config(folder)
    weights = {}
    for path in weight_files(folder):
        weights |= read_tensors(path)
        require_finite(weights, path)
    with torch.device("meta"):
        model = RankerModel(config, folder)
    loaded, report = ChineseCLIPModel.from_pretrained(
        None,
        config=ChineseCLIPConfig.from_pretrained(str(folder)),
        state_dict=unwrapped(weights, ANCHOR),
        dtype=torch.float32,
        output_loading_info=True,
    )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"the weights in {folder} lack {missing[0]} and {len(missing) - 1} more")
    model.clip = loaded
    model.clip.logit_scale = one_axis(loaded.logit_scale)
    model.mean = torch.tensor(config.mean).view(1, 3, 1, 1)
    model.std = torch.tensor(config.std).view(1, 3, 1, 1)
    return model.eval(), CaptionTokenizer(folder, config.max_text_len)


def weight_files(folder: Path) -> list[Path]:
    """One file, or the shards that an index lists. Raises FileNotFoundError or ValueError naming what is missing."""
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")
    if found.suffix != ".json":
        return [found]
    shards = _mapping(found).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{found} lists no weights")
    names = sorted({Path(str(name)).name for name in shards.values()})
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{found} lists {missing[0]}, which is not in {folder}: download it too")
    return [folder / name for name in names]


def _images(folder: Path) -> tuple[Path, dict[str, Any]]:
    """How images are prepared: in a file of its own, or, from transformers 5 on, in the processor's."""
    path = folder / "preprocessor_config.json"
    if path.is_file() or not (folder / "processor_config.json").is_file():
        return path, _mapping(path)
    path = folder / "processor_config.json"
    values = _mapping(path).get("image_processor")
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} says nothing of an image_processor, nor is there a preprocessor_config.json"
        )
    return path, values


def model_config(folder: Path) -> ModelConfig:
    """The folder's preprocessing as a ranker's config; its towers are described by the folder itself."""
    values = _mapping(folder / "config.json")
    if values.get("model_type") != "chinese_clip":
        raise ValueError(f"{folder} holds a model of type {values.get('model_type')!r}, not 'chinese_clip'")
    path, images = _images(folder)
    if images.get("do_center_crop") is not False or images.get("resample", 3) != 3:
        raise ValueError(
            f"{path} does not squash images bicubically (do_center_crop false, resample "
            "3) as the published Chinese-CLIP models do"
        )
    lacking = [name for name in ("size", "image_mean", "image_std") if not images.get(name)]
    size = images.get("size")
    side = size.get("height", size.get("shortest_edge")) if isinstance(size, dict) else size
    if lacking or not isinstance(side, int):
        raise ValueError(f"{path} does not say {', '.join(lacking) or 'a size in pixels'}")
    length = min(MAX_TEXT_LEN, values["text_config"].get("max_position_embeddings", 512))
    return ModelConfig(
        architecture="chinese_clip",
        image_tower="chinese_clip",
        embed_dim=values.get("projection_dim", 512),
        image_size=side,
        max_text_len=length,
        mean=tuple(images["image_mean"]),
        std=tuple(images["image_std"]),
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
