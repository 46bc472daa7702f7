"""The ranker that `rankers.train` makes: an open_clip model with a BERT text tower, or a Chinese-CLIP to fine-tune.

CLIP: Radford et al. 2021, arXiv 2103.00020; Chinese-CLIP: Yang et al. 2022, arXiv 2211.01335. Images come in as
[-1, 1], texts as ids of the tower's own tokenizer. A checkpoint directory of kind "ranker" holds beside `config.json`
and `model.safetensors` the folder `towers/`, from which the architecture is built without a download, and
`calibration.json`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import checkpoint
from common.config import from_mapping, to_mapping
from common.text.bert_text import CaptionTokenizer
from rankers.imagenet_tower import ImageNetTower
from rankers.light_towers import LightClip, ResNet, read_bert, supports

KIND = "ranker"
TOWERS = "towers"


@dataclass(frozen=True)
class ModelConfig:
    """What `config.json` says about a ranker."""

    architecture: Literal["open_clip", "chinese_clip"] = "open_clip"
    """open_clip: CustomTextCLIP with one of IMAGE_TOWERS; chinese_clip: ChineseCLIPModel of transformers."""
    image_tower: str = "resnet-s"
    """A row of IMAGE_TOWERS; unused by chinese_clip, whose towers/config.json says all."""
    embed_dim: int = 256
    """Width of the common space."""
    image_size: int = 128
    """Side in pixels at which images are scored."""
    max_text_len: int = 48
    """Tokens a text."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Channel means that the image tower expects, of values in [0, 1]."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Channel deviations that the image tower expects."""
    resize: Literal["crop", "squash"] = "crop"
    """crop: centre square, Lanczos; squash: the whole image, bicubic (Chinese-CLIP)."""
    released_from: str = ""
    """Identity of the trained weights that these were rounded from; empty as trained."""

    def __post_init__(self) -> None:
        if self.architecture == "open_clip" and self.image_tower not in IMAGE_TOWERS:
            raise ValueError(
                f"unknown image tower {self.image_tower!r}: use one of {', '.join(IMAGE_TOWERS)}"
            )
        if self.image_size < 32:
            raise ValueError(f"image_size must be at least 32, not {self.image_size}")
        if self.embed_dim < 1:
            raise ValueError(f"embed_dim must be at least 1, not {self.embed_dim}")


class RankerModel(nn.Module):
    """Images and texts into one space; the forward pass of training and of scoring."""

    def __init__(self, config: ModelConfig, towers: Path, clip: nn.Module | None = None) -> None:
        """`towers`: the folder with the text tower's (or the Chinese-CLIP's) config and vocabulary; `clip`: the two
        towers, where they are built already."""
        super().__init__()
        self.config = config
        self.clip: nn.Module = build_clip(config, towers) if clip is None else clip
        self.clip.logit_scale = one_axis(self.clip.logit_scale)
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)

    def encode_image(self, images: Tensor) -> Tensor:
        """images (B, 3, S, S) in [-1, 1], or their `frozen_features` -> unit vectors (B, D), float32."""
        pixels = images if images.ndim == 2 else self._pixels(images)
        if self.config.architecture == "open_clip":
            return F.normalize(self.clip.encode_image(pixels).float(), dim=-1)
        return F.normalize(projected(self.clip.get_image_features(pixel_values=pixels)).float(), dim=-1)

    def frozen_features(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) in [-1, 1] -> (B, F), all that the ImageNet tower knows of them before what training changes."""
        return self.clip.visual.trunk.features(self._pixels(images))

    def _pixels(self, images: Tensor) -> Tensor:
        pixels = ((images + 1) / 2 - self.mean) / self.std
        return pixels.contiguous(memory_format=torch.channels_last)

    def encode_text(self, text_ids: Tensor) -> Tensor:
        """text_ids (B, T) long -> unit vectors (B, D), float32.

        Many texts are read in parts of like length: half of the tokens of a batch of captions are padding.
        """
        lengths = (text_ids != self.pad_id).sum(1)
        order = lengths.argsort(stable=True)
        parts = order.tensor_split(TEXT_PARTS if len(order) >= 16 * TEXT_PARTS else 1)
        read = [self._read(text_ids[rows, : int(lengths[rows].max())]) for rows in parts]
        return F.normalize(torch.cat(read)[order.argsort()].float(), dim=-1)

    @property
    def pad_id(self) -> int:
        if isinstance(self.clip, LightClip):
            return self.clip.text.pad_id
        is_open_clip = self.config.architecture == "open_clip"
        config = self.clip.text.config if is_open_clip else self.clip.config.text_config
        return config.pad_token_id

    def _read(self, text_ids: Tensor) -> Tensor:
        if self.config.architecture == "open_clip":
            return self.clip.encode_text(text_ids)
        mask = (text_ids != self.pad_id).long()
        return projected(self.clip.get_text_features(input_ids=text_ids, attention_mask=mask))

    def forward(self, images: Tensor, text_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> image features (B, D), text features (M, D), the scale of their cosines (a scalar, at most 100).

        Arguments as of `encode_image` and `encode_text`.
        """
        scale = self.clip.logit_scale.float().clamp(max=MAX_LOGIT_SCALE).exp().squeeze()
        return self.encode_image(images), self.encode_text(text_ids), scale


TEXT_PARTS = 4
MAX_LOGIT_SCALE = 4.605170  # log 100, the bound of CLIP, section 2.5


def one_axis(scale: nn.Parameter) -> nn.Parameter:
    """() -> (1,): DeepSpeed cannot broadcast a parameter without axes."""
    return nn.Parameter(scale.detach().reshape(1))


def projected(features: Any) -> Tensor:
    """The projected feature: transformers 5 wraps it in an output object, 4 returns it."""
    return features if isinstance(features, Tensor) else features.pooler_output


def save_ranker(
    directory: Path, config: ModelConfig, weights: dict[str, Tensor], towers: Path, step: int, **extra: Any
) -> None:
    """Everything but the calibration into an existing directory."""
    import shutil

    checkpoint.write_model(directory, KIND, to_mapping(config), weights, step, **extra)
    shutil.copytree(towers, directory / TOWERS)


def load_model(directory: Path) -> tuple[RankerModel, CaptionTokenizer]:
    """From a checkpoint directory alone, strictly. Raises ValueError for another kind or weights that do not fit."""
    values = checkpoint.read_config(directory, KIND)
    config = from_mapping(ModelConfig, values["model"], where=f"{directory}/config.json")
    towers = directory / TOWERS
    if not (towers / "config.json").is_file():
        raise FileNotFoundError(f"{towers} holds no config.json: the checkpoint is not whole")
    model = RankerModel(config, towers, build_light_clip(config, towers))
    checkpoint.load_weights(model, directory)
    return model.eval(), CaptionTokenizer(towers, config.max_text_len)


# --- architectures -------------------------------------------------------------------------------------------------


def build_clip(config: ModelConfig, towers: Path) -> nn.Module:
    """With random weights, to be trained."""
    if config.architecture == "open_clip":
        return build_open_clip(config, towers)
    if config.architecture == "chinese_clip":
        return build_chinese_clip(towers)
    raise ValueError(f"unknown architecture {config.architecture!r}")


def build_light_clip(config: ModelConfig, towers: Path) -> nn.Module | None:
    """The same for scoring, without open_clip; None where only open_clip or transformers has these towers."""
    if config.architecture != "open_clip" or config.image_tower not in (*RESNETS, IMAGENET_TOWER):
        return None
    bert = read_bert(towers)
    if not supports(bert):
        return None
    if config.image_tower == IMAGENET_TOWER:
        trunk: nn.Module = ImageNetTower()
        return LightClip(trunk, trunk.num_features, config.embed_dim, bert)
    channels, blocks, stem = RESNETS[config.image_tower]
    return LightClip(ResNet(channels, blocks, stem), channels[-1], config.embed_dim, bert)


def build_open_clip(config: ModelConfig, towers: Path) -> nn.Module:
    """open_clip's CustomTextCLIP with a BERT text tower of random weights."""
    from open_clip.model import CustomTextCLIP

    _register_towers()
    vision = {**IMAGE_TOWERS[config.image_tower], "image_size": config.image_size}
    text = {
        "hf_model_name": str(towers),
        "hf_model_pretrained": False,
        "hf_proj_type": "linear",
        "hf_pooler_type": "mean_pooler",
    }
    return CustomTextCLIP(config.embed_dim, vision, text)


def build_chinese_clip(towers: Path) -> nn.Module:
    from transformers import ChineseCLIPConfig, ChineseCLIPModel

    return ChineseCLIPModel(ChineseCLIPConfig.from_pretrained(str(towers)))


def takes_any_size(config: ModelConfig) -> bool:
    """Whether the image tower ends in an average over the map, so that training may use other sizes."""
    return config.architecture == "open_clip" and "timm_model_name" in IMAGE_TOWERS[config.image_tower]


def _register_towers() -> None:
    """Make RESNETS and the ImageNet tower known to timm, through which open_clip builds them."""
    import timm
    from timm.models import register_model

    for name in (*RESNETS, IMAGENET_TOWER):
        if not timm.is_model(_timm_name(name)):
            register_model(_resnet_builder(name) if name in RESNETS else _imagenet_builder())


def _imagenet_builder() -> Any:
    def build(pretrained: bool = False, **_: Any) -> nn.Module:
        return ImageNetTower()

    build.__name__ = _timm_name(IMAGENET_TOWER)
    build.__module__ = __name__
    return build


def _resnet_builder(name: str) -> Any:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        from timm.models.resnet import BasicBlock, ResNet

        channels, layers, stem = RESNETS[name]
        passed = {k: kwargs[k] for k in ("num_classes", "global_pool", "drop_path_rate") if k in kwargs}
        model = ResNet(
            BasicBlock, layers, channels=channels, stem_width=stem, stem_type="deep", avg_down=True, **passed
        )
        model.default_cfg = {"pool_size": None}
        return model

    build.__name__ = _timm_name(name)
    build.__module__ = __name__
    return build


def _timm_name(name: str) -> str:
    return name.replace("-", "_") + "_ranker"


IMAGENET_TOWER = "efficientnet-lite0"


# Residual networks of timm with a deep stem and an average over the map: (channels, blocks, stem width). Depth and
# width are for tens of thousands of images and a CPU; 128 pixels end in a map of 4 x 4.
RESNETS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    "resnet-xs": ((32, 64, 128, 256), (1, 1, 1, 1), 16),
    "resnet-s": ((48, 96, 192, 384), (1, 2, 2, 1), 24),
    "resnet-m": ((64, 128, 256, 512), (2, 2, 2, 2), 32),
}

IMAGE_TOWERS: dict[str, dict[str, Any]] = {
    **{
        name: {"timm_model_name": _timm_name(name), "timm_pool": "avg"} for name in (*RESNETS, IMAGENET_TOWER)
    },
    "resnet-50": {"layers": [3, 4, 6, 3], "width": 64},
    "vit-ti-16": {"layers": 12, "width": 192, "head_width": 64, "patch_size": 16},
    "vit-s-16": {"layers": 12, "width": 384, "head_width": 64, "patch_size": 16},
    "vit-b-16": {"layers": 12, "width": 768, "head_width": 64, "patch_size": 16},
}
