"""Options of `python -m gan.train`."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from common.loop import LoopConfig
from common.optim import OptimConfig
from common.precision import Precision
from common.text.bert_text import TextTowerConfig
from data_tools.images.crops import CropFlip
from data_tools.shards.captions import FactCaptions
from data_tools.shards.remote import RemoteOptions
from gan.augment import AugmentConfig
from gan.discriminator import DiscriminatorConfig
from gan.model import GeneratorConfig
from vq.losses.reconstruction import AdversarialLoss


@dataclass(frozen=True)
class TextOptions:
    """What reads captions."""

    ranker: str = ""
    """Ranker made by rankers.train whose text tower is taken over and stays as it is; empty: one is trained along."""
    vocab: str = ""
    """Without a ranker: folder or vocab.txt of a BERT, pruned to the captions; empty: their single characters."""
    embed_dim: int = 128
    """Without a ranker: length of the vectors."""
    tower: TextTowerConfig = field(default_factory=lambda: TextTowerConfig(width=128, layers=2, dropout=0.0))

    def __post_init__(self) -> None:
        if self.embed_dim < 8:
            raise ValueError(f"text.embed_dim must be at least 8, not {self.embed_dim}")
        if self.ranker and replace(self, ranker="") != TextOptions():
            raise ValueError("text.ranker brings its own tower: leave the other text options out")


@dataclass(frozen=True)
class Options:
    """Conditional GAN: captions and categories -> images."""

    data: str = ""
    """Image shards (train-*.tar, val-*.tar): a folder, http://, s3:// ... or pipe:; empty: the embedded default."""
    remote: RemoteOptions = field(default_factory=RemoteOptions)
    text: TextOptions = field(default_factory=TextOptions)
    labels: Literal["auto", "off"] = "auto"
    """auto: condition on the category too where the shards' json carry at least two; off: on captions alone."""
    label_dropout: float = 0.5
    """Share of categories hidden in training, so that generating needs none."""
    caption_dropout: float = 0.1
    """Share of captions hidden in training, so that a category alone is enough."""
    short_caption_share: float = 0.0
    """Where an image has several captions: share of the draws that take the shortest; the others take any."""
    fact_captions: FactCaptions = field(default_factory=FactCaptions)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    d_augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: AdversarialLoss = "hinge"
    """hinge or non_saturating."""
    sameness_weight: float = 0.0
    """Weight of the term against images of one caption that are alike; 0: none. It generates half a batch more."""
    least_difference: float = 0.5
    """Two images of one caption are alike below this share of what real images differ by at 16 x 16 pixels."""
    ema_decay: float = 0.999
    """Decay of the moving average of weights that is saved; 0: none."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=5e-3,
            warmup_steps=0,
            schedule="constant",
            weight_decay=0.0,
            beta1=0.0,
            beta2=0.99,
            grad_clip=0.0,
        )
    )
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(run_dir=Path("runs/gan")))
    augment: CropFlip = field(default_factory=CropFlip)
    val_images: int = 500
    """Validation images an evaluation compares with, and as many generated ones."""
    collapse_below: float = 0.15
    """Announce a collapse when the diversity within a caption is below this share of that between real images."""
    sample_texts: tuple[str, ...] = ()
    """Captions of the sample grids, one a row; empty: the first eight of the validation shards."""
    sample_images: int = 8
    """Images a caption in the sample grids, always of the same noise."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """auto takes bf16 autocast where the machine has it."""
    num_workers: int = 1
    """Processes that decode images; 0 decodes in the training process."""

    def __post_init__(self) -> None:
        for name in ("label_dropout", "caption_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), not {getattr(self, name)}")
        if self.sameness_weight < 0 or not 0 < self.least_difference <= 2:
            raise ValueError(
                f"sameness_weight must not be negative and least_difference must lie in (0, 2], not "
                f"{self.sameness_weight} and {self.least_difference}"
            )
        for name in ("short_caption_share", "collapse_below"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], not {getattr(self, name)}")
        if self.val_images < 2 or self.sample_images < 2:
            raise ValueError(
                f"val_images and sample_images must be at least 2, not {self.val_images} and {self.sample_images}"
            )
        if self.num_workers < 0:
            raise ValueError(f"num_workers must not be negative, not {self.num_workers}")
        if self.optim.name != "adamw":
            raise ValueError(f"the GAN trains with optim.name adamw, not {self.optim.name}")
        loop = self.loop
        if loop.eval_every and (not loop.save_every or loop.eval_every % loop.save_every):
            raise ValueError(
                f"the best checkpoint is kept: eval_every {loop.eval_every} must be a multiple of save_every "
                f"{loop.save_every}"
            )
