"""Judges of the synthetic goods: a small classifier of the kind, and the colour measured in the pixels.

The classifier sees synthetic pictures of another seed than any training set has, sharp ones and ones that
were blurred, compressed and made coarse as reconstructions are. It trains in under a minute on a CPU, once:
the weights stay in a cache folder under a name that changes with the recipe, the code and the pictures.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from common.checkpoint import save_weights
from common.files import atomic_path, sha256_file
from common.image import resize_square, to_tensor
from data_tools.synthetic import KINDS, draw_sample, drawing_fingerprint
from evaluation.colors import dominant_color

__all__ = ["JudgeConfig", "KindJudge", "degrade", "dominant_color", "judge_accuracy", "train_judge"]


@dataclass(frozen=True)
class JudgeConfig:
    """Recipe of the classifier."""

    num_train: int = 5000
    """Pictures to train on."""
    num_epochs: int = 6
    """Passes over them."""
    batch_size: int = 100
    """Pictures in a step."""
    lr: float = 6e-3
    """Peak learning rate."""
    seed: int = 777_001
    """Of the pictures and of the training; training sets have other seeds."""

    def __post_init__(self) -> None:
        if min(self.num_train, self.num_epochs, self.batch_size) < 1 or self.batch_size > self.num_train:
            raise ValueError(
                f"num_train, num_epochs, batch_size must be at least 1, batch_size <= num_train: {self}"
            )


class KindJudge(nn.Module):
    """(B, 3, 64, 64) in [-1, 1] -> logits (B, kinds) in the order of KINDS; 184 thousand weights."""

    image_size = 64

    def __init__(self) -> None:
        super().__init__()
        channels = (3, 24, 48, 96, 128)
        layers: list[nn.Module] = []
        for c_in, c_out in pairwise(channels):
            layers += [nn.Conv2d(c_in, c_out, 3, 2, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(channels[-1] * 4 * 4, len(KINDS)))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))  # (B, 128, 4, 4) -> (B, kinds)

    @torch.no_grad()
    def probabilities(self, images: Sequence[Image.Image]) -> Tensor:
        """float (N, kinds): how likely each picture, of any size, shows each kind."""
        if not images:
            return torch.zeros(0, len(KINDS))
        self.eval()
        return self(torch.stack([_as_input(image) for image in images])).softmax(dim=1)

    def kinds(self, images: Sequence[Image.Image]) -> list[str]:
        """The likeliest kind of each picture, a key of KINDS."""
        names = list(KINDS)
        return [names[i] for i in self.probabilities(images).argmax(dim=1).tolist()]


def train_judge(config: JudgeConfig = JudgeConfig(), cache: Path = Path(".cache")) -> KindJudge:
    """The classifier from `cache`, trained and stored there first where it is missing."""
    recipe = json.dumps([asdict(config), list(KINDS), drawing_fingerprint(), sha256_file(Path(__file__))])
    path = Path(cache) / f"kind_judge_{hashlib.sha256(recipe.encode()).hexdigest()[:12]}.safetensors"
    if path.is_file():
        return _load(path)
    print(f"kind judge: training on {config.num_train} synthetic pictures, into {path}", flush=True)
    judge = _fit(config)
    with atomic_path(path) as temporary:
        save_weights(temporary, judge.state_dict())
    return judge


def judge_accuracy(judge: KindJudge, num_images: int = 500, seed: int = 888_001) -> dict[str, float]:
    """Shares of held-out synthetic pictures whose kind and colour are named right, sharp and degraded."""
    rng = np.random.default_rng(seed)
    samples = [draw_sample(seed, index, judge.image_size) for index in range(num_images)]
    sharp = [sample.image for sample in samples]
    shares = {}
    for name, images in (("sharp", sharp), ("degraded", [degrade(rng, image) for image in sharp])):
        kinds, colors = judge.kinds(images), [dominant_color(image) for image in images]
        shares[f"kind_{name}"] = float(np.mean([k == s.kind for k, s in zip(kinds, samples, strict=True)]))
        shares[f"color_{name}"] = float(np.mean([c == s.color for c, s in zip(colors, samples, strict=True)]))
    return shares


def degrade(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """What an image tokenizer does to a picture, roughly: blur, coarse pixels or block artefacts."""
    choice = rng.integers(4)
    if choice == 0:
        return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 2.0) * image.width / 64))
    if choice == 1:
        side = round(image.width * rng.uniform(0.25, 0.8))
        return image.resize((side, side), Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC)
    if choice == 2:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=int(rng.integers(25, 80)), subsampling=0)
        return Image.open(buffer).convert("RGB")
    noise = rng.normal(0.0, rng.uniform(3, 10), (*image.size, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def _as_input(image: Image.Image) -> Tensor:
    return to_tensor(resize_square(image, KindJudge.image_size))


def _load(path: Path) -> KindJudge:
    judge = KindJudge()
    with safe_open(path, framework="pt") as file:
        judge.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return judge.eval()


def _fit(config: JudgeConfig) -> KindJudge:
    images, labels = _training_set(config)
    with torch.random.fork_rng(devices=[]):  # weight init and dropout draw from the global generator
        torch.manual_seed(config.seed)
        judge = KindJudge()
        _train(judge, images, labels, config)
    return judge.eval()


def _train(judge: KindJudge, images: Tensor, labels: Tensor, config: JudgeConfig) -> None:
    from tqdm import tqdm

    generator = torch.Generator().manual_seed(config.seed)
    num_steps = config.num_epochs * (config.num_train // config.batch_size)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=config.lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=num_steps)
    for batch in tqdm(_batches(config, generator), "training the judge", num_steps):
        loss = F.cross_entropy(judge(_augment(images[batch], generator)), labels[batch], label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _training_set(config: JudgeConfig) -> tuple[Tensor, Tensor]:
    """Pictures (N, 3, 64, 64) in [-1, 1], half of them degraded, and the numbers of their kinds (N,)."""
    from tqdm import tqdm

    rng = np.random.default_rng(config.seed)
    names = list(KINDS)
    images, labels = [], []
    for index in tqdm(range(config.num_train), "drawing for the judge"):
        sample = draw_sample(config.seed, index, KindJudge.image_size)
        images.append(to_tensor(degrade(rng, sample.image) if index % 2 else sample.image))
        labels.append(names.index(sample.kind))
    return torch.stack(images), torch.tensor(labels)


def _batches(config: JudgeConfig, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(config.num_epochs):
        order = torch.randperm(config.num_train, generator=generator)
        yield from order[: config.num_train // config.batch_size * config.batch_size].split(config.batch_size)


def _augment(images: Tensor, generator: torch.Generator, reach: int = 5) -> Tensor:
    """One mirror, one shift of up to `reach` pixels and one brightness a batch."""
    shift_x, shift_y = (int(v) for v in torch.randint(0, 2 * reach + 1, (2,), generator=generator))
    size = images.shape[-1]
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    images = padded[..., shift_y : shift_y + size, shift_x : shift_x + size]
    if torch.rand((), generator=generator) < 0.5:
        images = images.flip(-1)
    return images * (0.9 + 0.2 * torch.rand((), generator=generator))
