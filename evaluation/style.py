"""Do generated images have a style, and still the colour that their text names?

    python -m evaluation.style out/ --style ../shared/data/emoji/train --photos ../shared/data/goods

The judge is a linear head on frozen ImageNet features (EfficientNet-Lite1, which no training here uses), fitted on
images of the style against photos, apart from every generator; its accuracy on images that it has not seen stands
beside the result. The colour is measured in the pixels, by the photos whose colour is known
(evaluation.metrics.pixel_colors).
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from common.config import command, parse_options
from common.files import write_json
from common.image import to_tensor
from common.log import say
from common.square import resize_square
from data_tools.images.decode import decode
from data_tools.rules.colors import find_color
from diffusion.tuning.caption_folder import CaptionFolder
from evaluation.metrics.pixel_colors import ColorHistogram, PixelColors
from evaluation.metrics.statistics import Interval, wilson
from evaluation.reference import ReferenceImages
from evaluation.sets import SampleSet

SIDE = 128  # pixels a side that images are judged at
WHITE, WHITE_SHARE = (
    235,
    0.9,
)  # a border is white where so large a share of its pixels reaches so high a level

Features = Callable[[Sequence[Image.Image]], Tensor]
"""Images of any size -> float32 (N, D)."""


@dataclass(frozen=True)
class Options:
    """Judge the style of an out directory."""

    out_dir: Annotated[Path, tyro.conf.Positional]
    """Directory that diffusion.generate or generate.py wrote, or a folder of images with texts."""
    style: str = "../shared/data/emoji/train"
    """Images of the style: a folder, or image shards."""
    photos: str = "../shared/data/goods"
    """Image shards that are not of the style, as the base was trained on; their facts name colours."""
    per_class: int = 800
    """Images of each that the judge is fitted and tested on."""
    test_share: float = 0.25
    """Share of them that it is only tested on."""

    def __post_init__(self) -> None:
        if self.per_class < 8:
            raise ValueError(f"per_class must be at least 8, not {self.per_class}")
        if not 0 < self.test_share < 1:
            raise ValueError(f"test_share must lie in (0, 1), not {self.test_share}")


class StyleJudge:
    """Logistic regression on standardised features: which images are of the style."""

    def __init__(self, style: Tensor, photos: Tensor, decay: float = 1e-2) -> None:
        """Features (M, D) and (N, D). `decay`: of the weights, beside the mean loss."""
        both = torch.cat([style, photos]).double()
        self.mean, self.std = both.mean(0), both.std(0).clamp(min=1e-6)
        labels = torch.cat([torch.ones(len(style)), torch.zeros(len(photos))]).double()
        balance = torch.where(labels > 0, len(photos) / len(style), 1.0)
        weight = torch.zeros(both.shape[1] + 1, dtype=torch.float64, requires_grad=True)
        inputs = (both - self.mean) / self.std
        optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            logits = inputs @ weight[1:] + weight[0]
            errors = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, balance)
            total = errors + decay * weight[1:].square().sum()
            total.backward()
            return total

        optimizer.step(loss)
        self.weight = weight.detach()

    def has_style(self, features: Tensor) -> NDArray[np.bool_]:
        """(N, D) -> (N,)"""
        logits = (features.double() - self.mean) / self.std @ self.weight[1:] + self.weight[0]
        return (logits > 0).numpy()


@dataclass(frozen=True)
class StyleReport:
    """What was found, and how far the judge can be trusted."""

    style: Interval
    """Share of the images that have the style."""
    white_border: Interval
    """Share of them with a white border."""
    color: Interval | None
    """Share of the images with the colour of their text, of those whose text names one."""
    test_style: Interval
    """Share of unseen images of the style that are taken for it."""
    test_photos: Interval
    """Share of unseen photos that are taken for the style: wrong ones."""
    num_images: int

    def lines(self) -> list[str]:
        """The table, a line a row."""
        rows = [("style found by the judge", self.style), ("white border", self.white_border)]
        rows += [("colour of the text", self.color)] if self.color else []
        rows += [
            ("judge: unseen images of the style", self.test_style),
            ("judge: unseen photos", self.test_photos),
        ]
        return [f"{name:36s} {i.value:6.1%}  ({i.low:.1%} to {i.high:.1%})" for name, i in rows]


def lite_features() -> Features:
    """Of the network that is kept for judging."""
    from vq.losses.imagenet_features import JUDGE_NETWORK, load_imagenet_features

    network = load_imagenet_features(JUDGE_NETWORK)

    @torch.no_grad()
    def features(images: Sequence[Image.Image]) -> Tensor:
        tensors = [to_tensor(resize_square(image, SIDE)) for image in images]
        return torch.cat([network.pooled(torch.stack(part)) for part in _batches(tensors, 32)])

    return features


def _batches(items: list[Tensor], size: int) -> list[list[Tensor]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def has_white_border(image: Image.Image) -> bool:
    """Whether the outer twentieth of an image is white."""
    grey = np.asarray(resize_square(image, SIDE)).min(2)  # (S, S), the darkest channel
    width = max(1, SIDE // 20)
    border = np.ones_like(grey, dtype=bool)
    border[width:-width, width:-width] = False
    return bool((grey[border] >= WHITE).mean() >= WHITE_SHARE)


def split_images(
    names: Sequence[str], images: Sequence[Image.Image], share: float
) -> tuple[list[Image.Image], list[Image.Image]]:
    """To fit and to test, by the hash of the name."""
    indices = np.argsort([hashlib.sha256(name.encode()).hexdigest() for name in names])
    count = max(1, round(share * len(names)))
    return [images[i] for i in sorted(indices[count:])], [images[i] for i in sorted(indices[:count])]


def judge_style(
    generated: Sequence[Image.Image],
    texts: Sequence[str],
    style: tuple[Sequence[Image.Image], Sequence[Image.Image]],
    photos: tuple[Sequence[Image.Image], Sequence[Image.Image]],
    features: Features,
    colors: PixelColors | None = None,
) -> StyleReport:
    """`style` and `photos`: images to fit on and images to test on."""
    judge = StyleJudge(features(style[0]), features(photos[0]))

    def share(images: Sequence[Image.Image]) -> Interval:
        return wilson(int(judge.has_style(features(images)).sum()), len(images))

    white = wilson(sum(map(has_white_border, generated)), len(generated))
    tests = (share(style[1]), share(photos[1]))
    return StyleReport(
        share(generated), white, named_colors(generated, texts, colors), *tests, len(generated)
    )


def named_colors(
    images: Sequence[Image.Image], texts: Sequence[str], colors: PixelColors | None
) -> Interval | None:
    """Share with the colour of the text, of those whose text names one that can be measured; None without any."""
    if colors is None:
        return None
    wanted = [find_color(text, colors.colors)[0] for text in texts]
    known = [i for i, color in enumerate(wanted) if color]
    if not known:
        return None
    found = colors.named(ColorHistogram().features([images[i] for i in known]))
    return wilson(sum(color == wanted[i] for i, color in zip(known, found, strict=True)), len(known))


def known_colors(photos: ReferenceImages, most: int = 1500) -> PixelColors | None:
    """From the photos whose colour is known, evenly spread; None where too few are."""
    indices = range(0, len(photos), max(1, len(photos) // most))
    found = [(i, photos.facts(i).color) for i in indices]
    found = [(i, color) for i, color in found if color]
    names = [color for _, color in found]
    if not PixelColors.enough(names):
        return None
    return PixelColors(ColorHistogram().features([photos.open(i) for i, _ in found]), names)


def style_images(source: str, limit: int) -> tuple[list[str], list[Image.Image]]:
    """Names and images, evenly spread, of a folder or of shards. Raises FileNotFoundError or ValueError."""
    if not Path(source).is_dir() or any(Path(source).glob("*.tar")):
        reference = ReferenceImages.of_split(source, "train", SIDE)
        indices = range(0, len(reference), max(1, len(reference) // limit))
        return [reference.index.samples[i].key for i in indices], [reference.open(i) for i in indices]
    folder = CaptionFolder.open(source, "skip")
    indices = range(0, len(folder), max(1, len(folder) // limit))
    images = [decode(folder.read(i, ("png",))["png"]) for i in indices]
    return [folder.images[i] for i in indices], images


@command
def main(argv: Sequence[str] | None = None) -> StyleReport:
    """Print the table, write style.json into the directory; returns the report."""
    options = parse_options(Options, argv, description=__doc__)
    generated = SampleSet.from_out_dir(options.out_dir)
    images = [sample.image for sample in generated.samples]
    named = [style_images(source, options.per_class) for source in (options.style, options.photos)]
    style, photos = (split_images(*found, options.test_share) for found in named)
    colors = known_colors(ReferenceImages.of_split(options.photos, "train", SIDE))
    texts = [sample.text for sample in generated.samples]
    report = judge_style(images, texts, style, photos, lite_features(), colors)
    say(f"{report.num_images} images in {options.out_dir}")
    for line in report.lines():
        say(line)
    values = {n: [v.value, v.low, v.high] for n, v in vars(report).items() if isinstance(v, Interval)}
    write_json(options.out_dir / "style.json", values | {"num_images": report.num_images})
    return report


if __name__ == "__main__":
    main()
