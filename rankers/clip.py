"""CLIP rankers: the checkpoints of `rankers.train`, and any published open_clip tag.

Tags that read Chinese: xlm-roberta-base-ViT-B-32/laion5b_s13b_b90k (366M weights, a practical default),
xlm-roberta-large-ViT-H-14/frozen_laion5b_s13b_b90k (1.2B), nllb-clip-base-siglip/mrl. English CLIP does not: its
recall on Chinese captions is near chance.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from common import checkpoint
from common.console.terminal import first_line
from common.distributed import pick_device
from common.precision import autocast
from common.square import resize_square
from common.text.bert_text import CaptionTokenizer
from rankers.base import TwoTowerRanker
from rankers.calibration import find_calibration
from rankers.model import RankerModel, load_model
from vq.published.foreign import read_tensors, require_finite, unwrapped


class RankerTowers:
    """A `RankerModel` and its tokenizer, at scoring."""

    def __init__(
        self, name: str, model: RankerModel, tokenizer: CaptionTokenizer, device: torch.device, precision: str
    ) -> None:
        self.name, self.tokenizer, self.device, self.precision = name, tokenizer, device, precision
        self.model = model.to(device, memory_format=torch.channels_last).eval()
        self.config = model.config

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """uint8 (B, S, S, 3)."""
        return uint8_batch([self._resize(image) for image in images])

    def _resize(self, image: Image.Image) -> Image.Image:
        size = self.config.image_size
        if self.config.resize == "crop":
            return resize_square(image, size)
        return image.resize((size, size), Image.Resampling.BICUBIC)

    def encode_images(self, pixels: Tensor) -> Tensor:
        images = (
            pixels.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        )  # (B, 3, S, S), channels last
        with autocast(self.device, self.precision):
            return self.model.encode_image(images)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        with autocast(self.device, self.precision):
            return self.model.encode_text(self.tokenizer.batch(texts).to(self.device))

    @property
    def num_truncated(self) -> int:
        """Texts that were longer than the text tower reads."""
        return self.tokenizer.num_truncated


def uint8_batch(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of one size -> uint8 (B, H, W, 3)."""
    flat = torch.frombuffer(bytearray(b"".join(image.tobytes() for image in images)), dtype=torch.uint8)
    width, height = images[0].size
    return flat.view(len(images), height, width, 3)


def own_ranker(name: str | Path, device: str = "auto", precision: str = "auto") -> TwoTowerRanker:
    """From a checkpoint directory of kind ranker, a run directory, or a hub id.

    Raises FileNotFoundError or ValueError saying what is wrong with it.
    """
    directory = checkpoint.resolve(name)
    model, tokenizer = load_model(directory)
    towers = RankerTowers(str(name), model, tokenizer, pick_device(device), precision)
    calibration = find_calibration(str(name), directory)
    return TwoTowerRanker(towers, calibration, released_from=model.config.released_from)


class OpenClipTowers:
    """A published open_clip model with the preprocessing and the tokenizer that belong to its tag."""

    def __init__(
        self, name: str, model: Any, transform: Any, tokenizer: Any, device: str, precision: str
    ) -> None:
        self.name, self.transform, self.tokenizer = name, transform, tokenizer
        self.device, self.precision = pick_device(device), precision
        self.model = model.to(self.device).eval()

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """float (B, 3, S, S), normalised as the tag asks."""
        return torch.stack([self.transform(image) for image in images])

    def encode_images(self, pixels: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            return self.model.encode_image(pixels.to(self.device))

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        with autocast(self.device, self.precision):
            return self.model.encode_text(self.tokenizer(list(texts)).to(self.device))


def published_ranker(name: str, device: str = "auto", precision: str = "auto") -> TwoTowerRanker:
    """`MODEL/TAG` of open_clip, or `MODEL@FILE` with weights in a local file.

    Raises ValueError for an unknown model or tag, FileNotFoundError naming the hub id and the folder that was
    looked at when the weights are not there and cannot be downloaded.
    """
    import open_clip

    model_name, tag = _split_name(name, open_clip)
    try:
        model, transform = _from_file(model_name, Path(tag)) if "@" in name else _from_tag(model_name, tag)
        tokenizer = open_clip.get_tokenizer(model_name)
    except (OSError, RuntimeError) as error:  # open_clip wraps download errors in both
        raise FileNotFoundError(
            f"the weights of clip:{name} could not be read: {_where(model_name, tag, open_clip)} "
            f"({first_line(error)})"
        ) from error
    towers = OpenClipTowers(f"clip:{name}", model, transform, tokenizer, device, precision)
    return TwoTowerRanker(towers, find_calibration(towers.name))


def _from_tag(model_name: str, tag: str) -> tuple[Any, Any]:
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms(model_name, pretrained=tag)
    return model, transform


def _from_file(model_name: str, path: Path) -> tuple[Any, Any]:
    """Weights of `model_name` from a file that may have been wrapped. Raises ValueError where they are of another."""
    import open_clip
    from open_clip.factory import load_checkpoint

    tensors = unwrapped(read_tensors(path), r"visual\.|text\.|transformer\.|positional_embedding|logit_scale")
    require_finite(tensors, path)
    model, _, transform = open_clip.create_model_and_transforms(
        model_name, pretrained=None, load_weights=False, pretrained_text=False
    )
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # plain names, for what open_clip renames and resizes itself
        plain = Path(folder) / "weights.safetensors"
        checkpoint.save_weights(plain, tensors)
        try:
            load_checkpoint(model, str(plain))
        except (RuntimeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} does not hold the weights of {model_name}: {_misfit(error)}") from error
    return model, transform


def _misfit(error: BaseException) -> str:
    """What PyTorch says of the first name or shape, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[1] if len(lines) > 1 else first_line(error))[:160]


def _split_name(name: str, open_clip: Any) -> tuple[str, str]:
    if "@" in name:
        model, _, file = name.partition("@")
        file = os.path.expanduser(file)
        if not Path(file).is_file():
            raise FileNotFoundError(f"no weights file {file} for clip:{name}")
    else:
        model, _, file = name.partition("/")
    if model not in open_clip.list_models():
        raise ValueError(
            f"open_clip knows no model {model!r}: see open_clip.list_pretrained(), for Chinese "
            "clip:xlm-roberta-base-ViT-B-32/laion5b_s13b_b90k"
        )
    tags = open_clip.list_pretrained_tags_by_model(model)
    if "@" not in name and file not in tags:
        raise ValueError(f"clip:{name}: the model {model} has the tags {', '.join(tags) or 'none'}")
    return model, file


def _where(model: str, tag: str, open_clip: Any) -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    config = open_clip.get_pretrained_cfg(model, tag)
    if not config:
        return f"looked at {tag}"
    source = config.get("hf_hub") or config.get("url", "")
    return f"looked for {source.rstrip('/')} in {HF_HUB_CACHE} and on the hub"
