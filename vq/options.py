"""Options of train_vqgan.py."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

from common import checkpoint
from common.config import from_mapping, to_mapping
from common.loop import LoopConfig
from common.optim import OptimConfig
from common.precision import Precision
from data_tools.augment import ImageAugment
from data_tools.images.crops import CropFlip
from data_tools.shards.remote import RemoteOptions
from vq.losses.adversary import AdversaryConfig
from vq.losses.reconstruction import LossConfig
from vq.model import KIND, TokenizerConfig

CHANGEABLE = {"image_size", "code_depth", "level_dropout"}  # sizes that may differ from those of --init


@dataclass(frozen=True)
class Options:
    """Stage 1: images -> image tokenizer."""

    EARLIER_NAMES: ClassVar = {"val_pictures": "val_images"}
    data: str = ""
    """Image shards (train-*.tar, val-*.tar): a folder, http://, s3:// ... or pipe:; empty: the embedded default."""
    remote: RemoteOptions = field(default_factory=RemoteOptions)
    image_folder: str = ""
    """A plain folder of images instead of shards; one in fifty is held out for validation."""
    preset: Literal["vqvae", "vqgan"] = "vqvae"
    """vqvae: reconstruction losses alone; vqgan: with an adversary."""
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=4e-4, beta1=0.9, beta2=0.99))
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(run_dir=Path("runs/vqgan")))
    augment: CropFlip = field(default_factory=CropFlip)
    move: ImageAugment = field(default_factory=ImageAugment)
    init: str = ""
    """Start from this image tokenizer: a checkpoint, a run directory or a hub id. Its sizes are taken over."""
    freeze_codes: bool = False
    """Train the decoder alone: encoder and codebook of --init stay, so codes already encoded stay valid."""
    kmeans_step: int = 50
    """Step at which the codebook starts anew from the centres of the latents seen; 0, or with --init: never."""
    revive_every: int = 50
    """Steps between revivals of codes that no image used; 0: never."""
    ema_decay: float = 0.999
    """Decay of the moving average of weights that is saved; 0: none."""
    val_images: int = 500
    """Validation images an evaluation looks at."""
    multiscale: tuple[float, ...] = ()
    """Train each step at one of these multiples of model.image_size, drawn by step; empty: always at 1."""
    checkpoint_activations: bool = False
    """Compute inner activations of blocks again in the backward pass: less memory, a third more time."""
    compile: bool = False
    """torch.compile encoder and decoder (needs a C++ compiler on a CPU)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """auto takes bf16 autocast where the machine has it."""
    num_workers: int = 1
    """Processes that decode images; 0 decodes in the training process."""

    def __post_init__(self) -> None:
        if self.freeze_codes and not self.init:
            raise ValueError("freeze_codes needs --init CHECKPOINT: the tokenizer whose codes shall stay")
        if self.preset == "vqvae" and self.adversary != AdversaryConfig():
            raise ValueError("adversary options have no effect with preset vqvae: add --preset vqgan")
        if self.data and self.image_folder:
            raise ValueError("give either data (shards) or image_folder, not both")
        if any(not 0.25 <= scale <= 4 for scale in self.multiscale):
            raise ValueError(f"multiscale must lie in [0.25, 4], not {self.multiscale}")
        for name in ("kmeans_step", "revive_every", "num_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.val_images < 1:
            raise ValueError(f"val_images must be at least 1, not {self.val_images}")
        loop = self.loop
        smallest, side = (
            self.adversary.discriminator.smallest_side,
            self.model.image_size * min((1, *self.multiscale)),
        )
        if self.preset == "vqgan" and not self.init and side < smallest:
            raise ValueError(
                f"the discriminator needs images of at least {smallest} pixels, not {side:g}: use fewer "
                "adversary.discriminator.layers"
            )
        rolls_back = self.preset == "vqgan" and self.adversary.rollback_share > 0
        if rolls_back and loop.eval_every and (not loop.save_every or loop.eval_every % loop.save_every):
            raise ValueError(
                f"going back after a collapse needs a checkpoint at every evaluation: eval_every {loop.eval_every} "
                f"must be a multiple of save_every {loop.save_every} (or set --adversary.rollback-share 0)"
            )

    @property
    def model_config(self) -> TokenizerConfig:
        """`model`, or the sizes of --init. Raises ValueError where both are given and differ."""
        if not self.init:
            return self.model
        directory = checkpoint.resolve(self.init)
        stored = checkpoint.read_config(directory, KIND)["model"]
        found = from_mapping(TokenizerConfig, stored, where=f"{directory}/config.json")
        given, kept, changed = to_mapping(self.model), to_mapping(found), self._changed_sizes()
        differing = [name for name in changed - CHANGEABLE if given[name] != kept[name]]
        if differing:
            name = min(differing)
            raise ValueError(
                f"--init {self.init} has {name} {kept[name]}, not {given[name]}: leave model.{name} out, its own sizes "
                "are taken over"
            )
        taken = {name: getattr(self.model, name) for name in changed & CHANGEABLE}
        return replace(found, **taken)

    def _changed_sizes(self) -> set[str]:
        """Fields of `model` that the user set: those that differ from the defaults."""
        given, default = to_mapping(self.model), to_mapping(TokenizerConfig())
        return {name for name in given if given[name] != default[name]}
