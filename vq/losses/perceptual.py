"""Perceptual distance: how far apart two images are in the features of a network.

LPIPS (Zhang et al. 2018, arXiv:1801.03924) where its published weights are on this machine; EfficientNet-Lite0 trained
on ImageNet, whose weights a pip package carries; or the features of a small network that `python -m
vq.train_perceptual` trained on the user's own shards. All are compared in the same way: channels normalised to unit
length at each position, squared differences summed over channels, averaged over positions.
Which one is in use is always named; there is no silent substitute.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import checkpoint
from common.config import from_mapping, to_mapping
from common.files import sha256_file
from vq.losses.imagenet_features import CONFIGS, TRAINING_NETWORK, imagenet_weights, load_imagenet_features
from vq.published.foreign import read_tensors, require_finite

KIND = "perceptual"
DEFAULT_DIRECTORY = Path("runs/perceptual")
VGG_TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 of torchvision's vgg16().features
VGG_WIDTHS = (64, 128, 256, 512, 512)


@dataclass(frozen=True)
class FeatureConfig:
    """Sizes of the feature network."""

    architecture: Literal["small", "vgg16", "efficientnet_lite0"] = "small"
    """small: ours, trained on the user's shards; vgg16: the network of LPIPS; efficientnet_lite0: ImageNet's."""
    channels: tuple[int, ...] = (32, 64, 128, 256)
    """Widths of the small network, one a halving of the side; each is tapped."""
    trained_on: str = ""
    """What the small network learned, for its name: label, caption."""

    @property
    def tap_widths(self) -> tuple[int, ...]:
        if self.architecture == TRAINING_NETWORK:
            return CONFIGS[TRAINING_NETWORK].widths
        return VGG_WIDTHS if self.architecture == "vgg16" else self.channels


class FeatureNet(nn.Module):
    """(B, 3, S, S) in [-1, 1] -> features (B, C_l, S / 2^l, S / 2^l) after each stage, l from 1.

    A stage is a strided 4x4 convolution (each pixel is seen equally often, so gradients have no checkerboard) and a
    3x3 one. `norm` is for training; `fused` gives the same function without norms.
    """

    def __init__(self, channels: tuple[int, ...], norm: bool = False) -> None:
        super().__init__()
        stages = []
        for before, width in zip((3, *channels[:-1]), channels, strict=True):
            stages.append(
                nn.Sequential(
                    nn.Conv2d(before, width, 4, stride=2, padding=1, bias=not norm),
                    nn.BatchNorm2d(width) if norm else nn.Identity(),
                    nn.ReLU(),
                    nn.Conv2d(width, width, 3, padding=1, bias=not norm),
                    nn.BatchNorm2d(width) if norm else nn.Identity(),
                    nn.ReLU(),
                )
            )
        self.stages = nn.ModuleList(stages)

    def forward(self, images: Tensor) -> list[Tensor]:
        x, taps = images, []
        for stage in self.stages:
            x = stage(x)
            taps.append(x)
        return taps

    def fused(self) -> "FeatureNet":
        """The network in use: batch norms, with their running statistics, folded into the convolutions."""
        from torch.nn.utils.fusion import fuse_conv_bn_eval

        plain = FeatureNet(tuple(stage[0].out_channels for stage in self.stages)).eval()
        for own, target in zip(self.stages, plain.stages, strict=True):
            for i in (0, 3):
                fused = fuse_conv_bn_eval(own[i].eval(), own[i + 1].eval())
                target[i].load_state_dict(fused.state_dict())
        return plain


class _VggFeatures(nn.Module):
    """The five taps of LPIPS; weights named as in torchvision (`features.N.weight`)."""

    def __init__(self) -> None:
        from torchvision.models import vgg16

        super().__init__()
        self.features = vgg16(weights=None).features[: VGG_TAPS[-1] + 1]
        self.register_buffer(
            "shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False
        )
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        x, taps = (images - self.shift) / self.scale, []
        for i, layer in enumerate(self.features):
            # Out of place: torchvision's ReLUs would overwrite what autograd keeps of the tap before.
            x = F.relu(x) if isinstance(layer, nn.ReLU) else layer(x)
            if i in VGG_TAPS:
                taps.append(x)
        return taps


def _network(config: FeatureConfig) -> nn.Module:
    if config.architecture == "vgg16":
        return _VggFeatures()
    if config.architecture == TRAINING_NETWORK:
        return load_imagenet_features(TRAINING_NETWORK)
    return FeatureNet(config.channels)


class _UnitDistance(torch.autograd.Function):
    """Features (B, C, h, w) twice, weights (C,) -> (B,): mean over positions of sum_c w_c (a_c / |a| - b_c / |b|)^2.

    The squared lengths have `floor` added, which keeps flat background from being blown up. Written out, since autograd
    would walk over these, the largest tensors of a training step, three times as often. Float32 throughout.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, weight: Tensor, floor: Tensor) -> Tensor:
        inverse = torch.rsqrt(a.float().square().sum(1, keepdim=True) + floor)  # (B, 1, h, w)
        target = b.float()
        target = target * torch.rsqrt(target.square().sum(1, keepdim=True) + floor)
        difference = torch.addcmul(target, a.float(), inverse, value=-1.0)  # unit b - unit a
        ctx.save_for_backward(a, inverse, difference, weight)
        return (difference.square().sum((2, 3)) @ weight) / (a.shape[2] * a.shape[3])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        a, inverse, difference, weight = ctx.saved_tensors
        weighted = difference * weight.view(1, -1, 1, 1)
        along = (weighted * a).sum(
            1, keepdim=True
        ) * inverse.square()  # the part that only changes the length
        scale = inverse * (gradient.view(-1, 1, 1, 1) * (-2.0 / (a.shape[2] * a.shape[3])))
        return torch.addcmul(weighted, a.float(), along, value=-1.0).mul_(scale).to(a.dtype), None, None, None


class PerceptualDistance(nn.Module):
    """Frozen; `forward` gives one distance an image."""

    def __init__(self, config: FeatureConfig) -> None:
        super().__init__()
        self.config = config
        self.name = ""
        widths = config.tap_widths
        self.net: nn.Module = _network(config)
        # LPIPS learned a weight a channel; ours weighs all alike, so that a layer's distance is its mean over layers.
        self.weights = nn.ParameterList([torch.full((c,), 1.0 / len(widths)) for c in widths])
        self.register_buffer("floor", torch.full((len(widths),), 1e-10))
        self.requires_grad_(False)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """(B, 3, S, S) twice, in [-1, 1] -> (B,) float32; gradients reach `images` alone."""
        with torch.no_grad():
            wanted = self.net(targets)
        total = torch.zeros(len(images), device=images.device)
        for tap, target, weight, floor in zip(
            self.net(images), wanted, self.weights, self.floor, strict=True
        ):
            total = total + _UnitDistance.apply(tap, target, weight, floor)
        return total

    @torch.no_grad()
    def pooled(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, D) float32: the last tap averaged over positions, for a feature Frechet distance."""
        return self.net(images)[-1].float().mean((2, 3))

    @torch.no_grad()
    def set_floor_(self, images: Tensor, share: float = 0.1) -> None:
        """Floor of the squared length: `share` of its mean over `images`."""
        for i, tap in enumerate(self.net(images)):
            self.floor[i] = share * tap.float().square().sum(1).mean()

    def write(self, directory: Path, step: int) -> None:
        """config.json and model.safetensors into an existing directory."""
        checkpoint.write_model(directory, KIND, to_mapping(self.config), self.state_dict(), step)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "PerceptualDistance":
        """From a directory of kind `perceptual`, a run directory or a hub id."""
        directory = checkpoint.resolve(name)
        config = checkpoint.read_config(directory, KIND)
        model = cls(from_mapping(FeatureConfig, config["model"], where=f"{directory}/config.json"))
        checkpoint.load_weights(model, directory)
        if model.config.architecture == "vgg16":
            model.name = "LPIPS (VGG16)"
        else:
            model.name = f"own features ({model.config.trained_on}-trained, {config['sha256'][:8]})"
        return model.eval()


def load_perceptual(spec: str, device: torch.device | str = "cpu") -> PerceptualDistance:
    """`spec` as in LossConfig.perceptual, but for none. Raises FileNotFoundError naming what would make one."""
    if spec == "auto":
        spec = _available()
    if spec == TRAINING_NETWORK:
        model = lite_distance()
    elif spec == "lpips":
        files = lpips_files()
        if not files:
            raise FileNotFoundError(f"no LPIPS weights on this machine: put {_WANTED}")
        model = lpips_from_files(*files)
    elif Path(spec).is_file():
        model = lpips_from_files(Path(spec), Path(spec))
    else:
        model = PerceptualDistance.from_pretrained(spec)
    return model.to(device=device, memory_format=torch.channels_last)


_WANTED = "vgg16-397923af.pth and vgg.pth of lpips into the torch hub folder checkpoints"


def _available() -> str:
    """What `auto` stands for on this machine. Raises FileNotFoundError."""
    if lpips_files():
        return "lpips"
    try:
        imagenet_weights(TRAINING_NETWORK)
        return TRAINING_NETWORK
    except FileNotFoundError as error:
        if checkpoint.latest_step(DEFAULT_DIRECTORY) or (DEFAULT_DIRECTORY / "config.json").is_file():
            return str(DEFAULT_DIRECTORY)
        raise FileNotFoundError(
            f"no perceptual network: neither LPIPS weights ({_WANTED}) nor {DEFAULT_DIRECTORY}, and {error}; "
            "or train one on your shards with `python -m vq.train_perceptual --data DATA` (minutes), or set "
            "--loss.perceptual none"
        ) from None


def lite_distance() -> PerceptualDistance:
    """EfficientNet-Lite0 after the stem and each stage. Raises FileNotFoundError naming the package that is missing."""
    model = PerceptualDistance(FeatureConfig(architecture=TRAINING_NETWORK)).eval()
    model.name = f"EfficientNet-Lite0 (ImageNet, {model.net.identity[:8]})"
    return model


def lpips_files() -> tuple[Path, Path] | None:
    """VGG16 weights of torchvision and the linear layers of lpips: in the torch hub cache, or in the package lpips."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    linear = [folder / "vgg.pth", folder / "lpips_vgg.pth"]
    package = importlib.util.find_spec("lpips")
    if package and package.submodule_search_locations:
        linear.append(Path(package.submodule_search_locations[0]) / "weights" / "v0.1" / "vgg.pth")
    found = next((path for path in linear if path.is_file()), None)
    network = folder / "vgg16-397923af.pth"
    return (network, found) if found and network.is_file() else None


def lpips_from_files(network: Path, linear: Path) -> PerceptualDistance:
    """From torchvision's VGG16 and lpips' linear layers, or from one taming checkpoint that holds both.

    Raises ValueError naming what a file lacks.
    """
    weights, taken = read_tensors(network), read_tensors(linear)
    require_finite(weights, network)
    require_finite(taken, linear)
    model = PerceptualDistance(FeatureConfig(architecture="vgg16"))
    state: dict[str, Any] = {"floor": model.floor}
    prefix = "loss.perceptual_loss."
    for name in model.state_dict():
        if name.startswith("net."):
            number, leaf = name.split(".")[-2:]
            taming = f"{prefix}net.slice{_slice_of(int(number))}.{number}.{leaf}"
            state[name] = _pick(weights, network, f"features.{number}.{leaf}", taming)
        elif name.startswith("weights."):
            layer = name.removeprefix("weights.")
            state[name] = _pick(
                taken, linear, f"lin{layer}.model.1.weight", f"{prefix}lin{layer}.model.1.weight"
            ).flatten()
    model.load_state_dict(state)
    model.name = f"LPIPS (VGG16, {sha256_file(network)[:8]})"
    return model.eval()


def _slice_of(number: int) -> int:
    """1-5: which slice of lpips' VGG holds layer `number` of `features`."""
    return next(i for i, tap in enumerate(VGG_TAPS, start=1) if number <= tap)


def _pick(weights: dict[str, Tensor], path: Path, *names: str) -> Tensor:
    for name in names:
        if name in weights:
            return weights[name].float()
    raise ValueError(f"{path} holds no LPIPS network: it lacks {' and '.join(names)}")
