"""The independent judge of goods: a small residual network with one head for the kind and one for the colour.

It is trained by `evaluation.train_judge` on real pictures alone, apart from every ranker: no text, no contrast. Both
heads read the same features, pooled from three depths since colour is lost in the last, so features of a picture are
computed once and kept. ResNet: He et al. 2016 (arXiv:1512.03385); squeeze and excitation: Hu et al. 2018.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from common import checkpoint
from common.config import from_mapping, to_mapping
from common.distributed import pick_device
from common.image import resize_square, to_tensor
from rankers.base import as_rgb

KIND = "judge"


@dataclass(frozen=True)
class Vocabulary:
    """What the judge can name."""

    kinds: tuple[str, ...] = ()
    """Kinds of goods, the classes of the first head."""
    colors: tuple[str, ...] = ()
    """Colours, the classes of the second head; may be empty."""
    names: dict[str, list[str]] = field(default_factory=dict)
    """Word of a title -> the kinds that it may mean: a "jacket" may be of two kinds."""

    def kinds_meant(self, text: str) -> tuple[str, str, list[str]]:
        """(word, rest, kinds): the longest known word of the text, the text without it, what it may mean.

        ("", text, []) where the text names no known kind.
        """
        word = max((w for w in self.names if w in text), key=len, default="")
        return (word, text.replace(word, "\0", 1), self.names[word]) if word else ("", text, [])


@dataclass(frozen=True)
class JudgeSizes:
    """The network."""

    channels: tuple[int, ...] = (24, 48, 96, 192)
    """Channels of the four stages; each halves the side."""
    layers: tuple[int, ...] = (1, 1, 1, 1)
    """Residual blocks of the four stages."""
    feature_dim: int = 128
    """Width of the features that both heads read."""
    image_size: int = 64
    """Side in pixels at which pictures are judged."""

    def __post_init__(self) -> None:
        if len(self.channels) != 4 or len(self.layers) != 4 or min(*self.channels, *self.layers) < 1:
            raise ValueError(
                f"channels and layers must be four numbers of at least 1, not {list(self.channels)} and "
                f"{list(self.layers)}"
            )
        if self.feature_dim < 2 or self.image_size < 32:
            raise ValueError(
                f"feature_dim must be at least 2 and image_size at least 32, not {self.feature_dim} and "
                f"{self.image_size}"
            )


class JudgeNetwork(nn.Module):
    """Pictures -> logits of the kinds and of the colours."""

    def __init__(self, sizes: JudgeSizes, num_kinds: int, num_colors: int) -> None:
        super().__init__()
        from timm.models.resnet import BasicBlock, ResNet

        self.trunk = ResNet(
            BasicBlock,
            sizes.layers,
            num_classes=0,
            channels=sizes.channels,
            stem_width=sizes.channels[0] // 2,
            stem_type="deep",
            avg_down=True,
            block_args={"attn_layer": "se"},
        )
        pooled = sum(sizes.channels[1:])
        self.join = nn.Sequential(nn.Linear(pooled, sizes.feature_dim), nn.BatchNorm1d(sizes.feature_dim))
        self.dropout = nn.Dropout(0.2)
        self.kind_head = nn.Linear(sizes.feature_dim, num_kinds)
        self.color_head = nn.Linear(sizes.feature_dim, num_colors) if num_colors else None

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) in [-1, 1] -> float32 (B, D)."""
        images = images.contiguous(memory_format=torch.channels_last)
        maps = self.trunk.forward_intermediates(images, indices=[2, 3, 4], intermediates_only=True)
        pooled = torch.cat([m.float().mean((2, 3)) for m in maps], dim=1)
        return self.join(pooled)  # (B, D)

    def heads(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) -> logits of kinds (B, K) and of colours (B, C), C = 0 without colours."""
        hidden = self.dropout(torch.relu(features))
        colors = self.color_head(hidden) if self.color_head else hidden[:, :0]
        return self.kind_head(hidden), colors

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.heads(self.features(images))


class GoodsJudge:
    """A `FeatureNetwork` (evaluation.features) that also names kinds and colours. Float32: singles equal batches."""

    def __init__(
        self,
        network: JudgeNetwork,
        sizes: JudgeSizes,
        words: Vocabulary,
        identity: str,
        validation: dict[str, float] | None = None,
        device: str = "auto",
    ) -> None:
        """`identity`: sha256 of the weights; `validation`: how right it was on held-out pictures."""
        self.device = pick_device(device)
        self.network = network.to(self.device, memory_format=torch.channels_last).eval()
        self.sizes, self.words, self.identity = sizes, words, identity
        self.validation = validation or {}
        self.name = "judge-resnet"

    @classmethod
    def from_pretrained(cls, name: str | Path, device: str = "auto") -> "GoodsJudge":
        """From a checkpoint directory of kind judge or its run. Raises FileNotFoundError or ValueError."""
        directory = checkpoint.resolve(name)
        values = checkpoint.read_config(directory, KIND)
        where = f"{directory}/config.json"
        sizes = from_mapping(JudgeSizes, values["model"], where=where)
        words = from_mapping(Vocabulary, values["vocabulary"], where=where)
        network = JudgeNetwork(sizes, len(words.kinds), len(words.colors))
        checkpoint.load_weights(network, directory)
        return cls(network, sizes, words, values["sha256"], values.get("validation"), device)

    @torch.inference_mode()
    def features(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """(N, D)"""
        pixels = [to_tensor(resize_square(as_rgb(image), self.sizes.image_size)) for image in images]
        return self.network.features(torch.stack(pixels).to(self.device)).cpu().numpy()

    def probabilities(self, features: NDArray) -> NDArray[np.float64]:
        """(N, D) -> (N, K) over the kinds."""
        return self._heads(features)[0]

    def color_probabilities(self, features: NDArray) -> NDArray[np.float64]:
        """(N, D) -> (N, C) over the colours."""
        return self._heads(features)[1]

    @torch.inference_mode()
    def _heads(self, features: NDArray) -> tuple[NDArray, NDArray]:
        rows = torch.as_tensor(np.asarray(features, np.float32)).to(self.device)
        kinds, colors = self.network.heads(rows)
        return kinds.double().softmax(1).cpu().numpy(), colors.double().softmax(1).cpu().numpy()


def save_judge(
    directory: Path,
    sizes: JudgeSizes,
    words: Vocabulary,
    weights: dict[str, Tensor],
    step: int,
    validation: dict[str, float],
) -> None:
    """Into an existing directory."""
    extra: dict[str, Any] = {"vocabulary": to_mapping(words), "validation": validation}
    checkpoint.write_model(directory, KIND, to_mapping(sizes), weights, step, **extra)
