"""The options of a training of a base from scratch: what python -m diffusion.train_base reads."""

from dataclasses import dataclass, field
from pathlib import Path

from common.engine import EngineName
from common.engines.deepspeed import DeepSpeedConfig
from common.loop import LoopConfig
from common.optim import OptimConfig
from common.precision import Precision
from data_tools.augment import TextAugment
from data_tools.images.crops import CropFlip
from data_tools.shards.captions import FactCaptions
from data_tools.shards.remote import RemoteOptions
from diffusion.objective import ObjectiveConfig, Prediction
from diffusion.scratch.networks import AutoencoderConfig, TextConfig, UnetConfig


@dataclass(frozen=True)
class AutoencoderTraining:
    """Stage A: the autoencoder."""

    perceptual: str = "none"
    """Perceptual distance: none, efficientnet_lite0, lpips, or a directory made by vq.train_perceptual."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual distance."""
    color_weight: float = 1.0
    """Weight of the error in opponent colours (red against green, blue against yellow)."""
    kl_weight: float = 1e-5
    """Weight of the KL divergence a latent number, which keeps latents near a normal distribution."""
    small_crop: int = 64
    """Side of the random crops that the first steps are trained on; 0: whole images throughout."""
    small_crop_share: float = 0.4
    """Share of the steps that see small crops: four times as many of 64 pixels as whole images of 128 in a second."""
    ema_decay: float = 0.998
    """Decay of the moving average of weights that is saved; about a tenth of the steps are remembered well; 0: none."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-4, beta2=0.99, weight_decay=0.01))
    num_steps: int = 1000
    """Optimizer steps."""
    global_batch_size: int = 16
    """Images a step over all processes and accumulation."""
    val_images: int = 512
    """Validation images of an evaluation."""

    def __post_init__(self) -> None:
        for name in ("perceptual_weight", "color_weight", "kl_weight", "small_crop"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if not 0 <= self.small_crop_share <= 1:
            raise ValueError(f"small_crop_share must lie in [0, 1], not {self.small_crop_share}")


@dataclass(frozen=True)
class LatentOptions:
    """Stage B: latents, encoded once."""

    views: int = 4
    """Encoded views a training image: the plain one and views - 1 augmented ones."""
    batch_size: int = 32
    """Images of one forward pass."""

    def __post_init__(self) -> None:
        if self.views < 1 or self.batch_size < 1:
            raise ValueError(
                f"views and batch_size must be at least 1, not {self.views} and {self.batch_size}"
            )


@dataclass(frozen=True)
class Options:
    """A base in Taiyi's layout from scratch: autoencoder, latents, text encoder and UNet."""

    data: str = ""
    """Image shards (train-*.tar, val-*.tar): a folder, http://, s3:// ...; empty: the embedded default."""
    remote: RemoteOptions = field(default_factory=RemoteOptions)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    text: TextConfig = field(default_factory=TextConfig)
    unet: UnetConfig = field(default_factory=UnetConfig)
    stage_a: AutoencoderTraining = field(default_factory=AutoencoderTraining)
    stage_b: LatentOptions = field(default_factory=LatentOptions)
    prediction: Prediction = "v_prediction"
    """What the UNet predicts."""
    zero_snr: bool = True
    """Noise schedule of zero terminal SNR: the last timestep is pure noise; needs v_prediction."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    caption_dropout: float = 0.1
    """Share of captions hidden in training, which teaches the model to generate without text, for guidance."""
    short_caption_share: float = 0.0
    """Where an image has several captions: share of the samples that take the shortest; the others take any."""
    fact_captions: FactCaptions = field(default_factory=FactCaptions)
    text_augment: TextAugment = field(default_factory=TextAugment)
    augment: CropFlip = field(default_factory=CropFlip)
    """Augmentation of stage A and of the encoded views."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-4, beta2=0.99, weight_decay=0.01))
    """Of stage C."""
    ema_decay: float = 0.999
    """Decay of the moving average of stage C; 0: none."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(run_dir=Path("runs/diffusion")))
    """Of stage C; seed and the intervals hold for stage A too."""
    val_samples: int = 512
    """Validation samples of an evaluation in stage C."""
    sample_texts: tuple[str, ...] = ()
    """Captions of the sample grids, one a row; empty: the first four of the validation shards."""
    sample_images: int = 4
    """Images a caption in the sample grids; 0: no grids."""
    guidance: float = 4.0
    """Guidance of the sample grids."""
    engine: EngineName = "auto"
    """auto: DeepSpeed under its launcher, DDP under torchrun, else plain."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """auto takes bf16 autocast where the machine has it."""
    num_workers: int = 1
    """Processes that read shards; 0 reads in the training process."""

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"caption_dropout must lie in [0, 1), not {self.caption_dropout}")
        if not 0 <= self.short_caption_share <= 1:
            raise ValueError(f"short_caption_share must lie in [0, 1], not {self.short_caption_share}")
        if self.zero_snr and self.prediction == "epsilon":
            raise ValueError(
                "zero_snr needs v_prediction: epsilon says nothing of the image where there is none left"
            )
        if self.val_samples < 1 or self.sample_images < 0:
            raise ValueError("val_samples must be at least 1 and sample_images at least 0")
