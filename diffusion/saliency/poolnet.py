"""PoolNet with ResNet-50, without the edge branch (Liu et al. 2019, arXiv:1904.09569), under its published names.

`final.pth` is a plain state dict of 358 tensors. Input: BGR levels minus the ImageNet means of Caffe, unscaled, in the
image's own size; output: the logit of saliency in the same size.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vq.published.foreign import read_tensors

MEANS = (104.00699, 116.66877, 122.67892)  # B, G, R
WIDTHS = (128, 256, 256, 512, 512)  # of the converted features c0..c4
POOLS = (2, 4, 8)


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear, corners aligned, to the size of `like`."""
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=True)


def conv3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)


class Bottleneck(nn.Module):
    """A block of ResNet-50 as Caffe has it: the stride is in the first product."""

    def __init__(self, in_channels: int, width: int, stride: int, dilation: int, is_first: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        if is_first:
            shortcut = nn.Conv2d(in_channels, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width))
        else:
            self.downsample = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


def stage(in_channels: int, width: int, blocks: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    first = Bottleneck(in_channels, width, stride, dilation, is_first=True)
    rest = (Bottleneck(4 * width, width, 1, dilation, is_first=False) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


class ResNet(nn.Module):
    """Features of five scales: (B, 3, H, W) -> widths 64, 256, 512, 1024, 2048 at 1/2, 1/4, 1/8, 1/16, 1/16."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.layer1, self.layer2 = stage(64, 64, 3), stage(256, 128, 4, stride=2)
        self.layer3, self.layer4 = stage(512, 256, 6, stride=2), stage(1024, 512, 3, dilation=2)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = [F.relu(self.bn1(self.conv1(x)))]
        x = F.max_pool2d(features[0], 3, 2, 1, ceil_mode=True)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            features.append(x := layer(x))
        return features


class Base(nn.Module):
    """The backbone, and what it sees of the whole image at four scales (the paper's global guidance)."""

    def __init__(self) -> None:
        super().__init__()
        self.resnet = ResNet()
        self.ppms_pre = nn.Conv2d(2048, 512, 1, bias=False)
        self.ppms = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), nn.Conv2d(512, 512, 1, bias=False), nn.ReLU())
            for size in (1, 3, 5)
        )
        self.ppm_cat = nn.Sequential(conv3(2048, 512), nn.ReLU())
        self.infos = nn.ModuleList(nn.Sequential(conv3(512, w), nn.ReLU()) for w in reversed(WIDTHS[:4]))

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Features x0..x4, and guidance for x3, x2, x1, x0."""
        features = self.resnet(x)
        pyramid = self.ppms_pre(features[-1])
        pooled = [resize(pool(pyramid), pyramid) for pool in self.ppms]
        whole = self.ppm_cat(torch.cat([pyramid, *pooled], 1))
        infos = [info(resize(whole, features[3 - k])) for k, info in enumerate(self.infos)]
        return features, infos


class Convert(nn.Module):
    """1 x 1 products to the decoder's widths."""

    def __init__(self) -> None:
        super().__init__()
        pairs = zip((64, 256, 512, 1024, 2048), WIDTHS, strict=True)
        self.convert0 = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 1, bias=False), nn.ReLU()) for i, o in pairs
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return [convert(x) for convert, x in zip(self.convert0, features, strict=True)]


class DeepPool(nn.Module):
    """Feature aggregation: averages over 2, 4 and 8 pixels, summed, then fused with the next finer features."""

    def __init__(self, width: int, out_width: int, grows: bool, fuses: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv3(width, width) for _ in POOLS)
        self.conv_sum = conv3(width, out_width)
        if fuses:
            self.conv_sum_c = conv3(out_width, out_width)
        self.grows, self.fuses = grows, fuses

    def forward(self, x: Tensor, finer: Tensor | None = None, info: Tensor | None = None) -> Tensor:
        total = x
        for size, conv in zip(POOLS, self.convs, strict=True):
            total = total + resize(conv(F.avg_pool2d(x, size, size)), x)
        total = F.relu(total)
        total = self.conv_sum(resize(total, finer) if self.grows else total)
        return self.conv_sum_c(total + finer + info) if self.fuses else total


class Score(nn.Module):
    """The last product."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Conv2d(128, 1, 1)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        return resize(self.score(x), image)


class PoolNet(nn.Module):
    """(B, 3, H, W) BGR minus `MEANS` -> logits (B, 1, H, W)"""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.convert, self.score = Base(), Convert(), Score()
        widths = (*reversed(WIDTHS), WIDTHS[0])  # 512, 512, 256, 256, 128, 128
        self.deep_pool = nn.ModuleList(
            DeepPool(widths[k], widths[k + 1], grows=k in (1, 2, 3), fuses=k < 4) for k in range(5)
        )

    def forward(self, x: Tensor) -> Tensor:
        features, infos = self.base(x)
        converted = self.convert(features)[::-1]  # c4 .. c0
        merged = converted[0]
        for k, info in enumerate(infos):
            merged = self.deep_pool[k](merged, converted[k + 1], info)
        return self.score(self.deep_pool[4](merged), x)


class PoolNetSaliency:
    """`mask` of a PoolNet; see `diffusion.saliency.Saliency`."""

    def __init__(self, model: PoolNet, device: torch.device | str = "cpu") -> None:
        self.model, self.device = model.eval().to(device), device

    @classmethod
    def open(cls, path: Path, device: torch.device | str = "cpu") -> "PoolNetSaliency":
        """From the published state dict. Raises FileNotFoundError, or ValueError where the file holds another model."""
        tensors, model = read_tensors(path), PoolNet()
        expected = model.state_dict()
        tracked = {n for n in expected if n.endswith("num_batches_tracked")}  # older files have none
        missing, extra = expected.keys() - tensors.keys() - tracked, tensors.keys() - expected.keys()
        wrong = [n for n in expected.keys() & tensors.keys() if expected[n].shape != tensors[n].shape]
        if found := sorted(missing) or sorted(extra) or sorted(wrong):
            how = "lacks" if missing else "has the unknown" if extra else "has another shape of"
            raise ValueError(
                f"{path} is no PoolNet with ResNet-50 without edges: it {how} {found[0]} ({len(found)} such tensors)"
            )
        model.load_state_dict(expected | tensors)
        return cls(model, device)

    @torch.inference_mode()
    def mask(self, image: Image.Image) -> np.ndarray:
        levels = torch.from_numpy(np.asarray(image.convert("RGB"), np.float32)[..., ::-1].copy())
        x = (levels - torch.tensor(MEANS)).permute(2, 0, 1)[None]  # (1, 3, H, W)
        short = min(x.shape[2:])
        if short < 128:  # its coarsest average spans 128 pixels
            size = [-(-128 * side // short) for side in x.shape[2:]]
            x = F.interpolate(x, size, mode="bilinear", align_corners=True)
        logits = self.model(x.to(self.device))
        logits = F.interpolate(logits, (image.height, image.width), mode="bilinear", align_corners=True)
        return logits.sigmoid()[0, 0].cpu().numpy()
