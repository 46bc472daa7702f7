"""The independent judge of goods: which category and which colour an image shows.

Linear heads on frozen features of an ImageNet network (vq.losses.imagenet_features.JUDGE_NETWORK), fitted on real
images alone by `evaluation.train_judge`: no text and no contrast, and no loss, ranker or generator ever sees that
network. A network trained from scratch on ten thousand images names 58 % of real ones right, which is too blunt to
see what an image tokenizer loses; linear probes of ImageNet features (Kornblith et al. 2019, arXiv:1805.08974) name
four in five.
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
from evaluation.metrics.features import Features, JudgeNetwork

KIND = "judge"


@dataclass(frozen=True)
class Vocabulary:
    """What the judge can name."""

    categories: tuple[str, ...] = ()
    """Categories of goods, the classes of the first head."""
    colors: tuple[str, ...] = ()
    """Colours, the classes of the second head; may be empty."""
    names: dict[str, list[str]] = field(default_factory=dict)
    """Word of a title -> the categories that it may mean: a "jacket" may be of two categories."""

    def categories_meant(self, text: str) -> tuple[str, str, list[str]]:
        """(word, rest, categories): the longest known word of the text, the text without it, what it may mean.

        ("", text, []) where the text names no known category.
        """
        word = max((w for w in self.names if w in text), key=len, default="")
        return (word, text.replace(word, "\0", 1), self.names[word]) if word else ("", text, [])


@dataclass(frozen=True)
class JudgeConfig:
    """What the heads stand on."""

    network: str
    """Name of the frozen network."""
    input_size: int
    """Side in pixels at which it sees images."""
    features: str
    """Identity of its features (`JudgeNetwork.identity`): weights, input_size, what is pooled."""


class JudgeHeads(nn.Module):
    """Features (B, deep + shallow) -> logits of the categories (B, K) and of the colours (B, C), C = 0 without.

    Categories are read from the deep features, colours from the shallow ones.
    """

    def __init__(self, num_deep: int, num_shallow: int, num_categories: int, num_colors: int) -> None:
        super().__init__()
        self.num_deep = num_deep
        self.register_buffer("mean", torch.zeros(num_deep + num_shallow))
        self.register_buffer("scale", torch.ones(num_deep + num_shallow))
        self.category = nn.Linear(num_deep, num_categories)
        self.color = nn.Linear(num_shallow, num_colors) if num_colors else None

    def standardised(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, deep), (B, shallow), each column of mean 0 and deviation 1 over the training images."""
        rows = (features - self.mean) / self.scale
        return rows[:, : self.num_deep], rows[:, self.num_deep :]

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        deep, shallow = self.standardised(features)
        return self.category(deep), self.color(shallow) if self.color else shallow[:, :0]


class GoodsJudge:
    """Names categories and colours from the features of `network`."""

    name = "judge"

    def __init__(
        self,
        network: JudgeNetwork,
        heads: JudgeHeads,
        words: Vocabulary,
        identity: str,
        validation: dict[str, float] | None = None,
    ) -> None:
        """`identity`: sha256 of the heads; `validation`: how right it was on held-out images."""
        self.network, self.heads, self.words = network, heads.eval(), words
        self.identity, self.validation = identity, validation or {}

    @classmethod
    def from_pretrained(cls, name: str | Path, device: str = "auto") -> "GoodsJudge":
        """From a checkpoint directory of kind judge or its run.

        Raises FileNotFoundError or ValueError, the latter too where this machine's features are not those of training.
        """
        directory = checkpoint.resolve(name)
        values = checkpoint.read_config(directory, KIND)
        where = f"{directory}/config.json"
        if "vocabulary" not in values or "kinds" in values["vocabulary"]:
            raise ValueError(
                f"{directory} holds a judge of an older version, which saw other features: train one again with python "
                "-m evaluation.train_judge"
            )
        config = from_mapping(JudgeConfig, values["model"], where=where)
        words = from_mapping(Vocabulary, values["vocabulary"], where=where)
        network = JudgeNetwork(config.input_size, device)
        if network.identity != config.features:
            raise ValueError(
                f"{directory} stands on other features of {config.network} than this version computes: train it again "
                "with python -m evaluation.train_judge"
            )
        heads = JudgeHeads(network.num_deep, network.num_shallow, len(words.categories), len(words.colors))
        checkpoint.load_weights(heads, directory)
        return cls(network, heads, words, values["sha256"], values.get("validation"))

    def features(self, images: Sequence[Image.Image]) -> Features:
        """(N, D)"""
        return self.network.features(images)

    def probabilities(self, features: NDArray) -> NDArray[np.float64]:
        """(N, D) -> (N, K) over the categories."""
        return self._heads(features)[0]

    def top_categories(self, features: NDArray, top: int = 1) -> list[list[str]]:
        """The likeliest categories of each image, the first one first."""
        order = np.argsort(-self.probabilities(features), axis=1, kind="stable")[:, :top]
        return [[self.words.categories[j] for j in row] for row in order]

    def color_probabilities(self, features: NDArray) -> NDArray[np.float64]:
        """(N, D) -> (N, C) over the colours."""
        return self._heads(features)[1]

    @torch.inference_mode()
    def _heads(self, features: NDArray) -> tuple[NDArray, NDArray]:
        categories, colors = self.heads(torch.from_numpy(np.asarray(features, np.float32)))
        return categories.double().softmax(1).numpy(), colors.double().softmax(1).numpy()


def save_judge(
    directory: Path,
    network: JudgeNetwork,
    heads: JudgeHeads,
    words: Vocabulary,
    step: int,
    validation: dict[str, float],
) -> None:
    """Into an existing directory."""
    config = JudgeConfig(network.name, network.input_size, network.identity)
    extra: dict[str, Any] = {"vocabulary": to_mapping(words), "validation": validation}
    checkpoint.write_model(directory, KIND, to_mapping(config), heads.state_dict(), step, **extra)
