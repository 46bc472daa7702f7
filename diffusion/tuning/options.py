"""Options that fine-tuning a base and training a LoRA share."""

from dataclasses import dataclass, field, replace
from typing import Literal

from common.engine import EngineName
from common.engines.deepspeed import DeepSpeedConfig
from common.loop import LoopConfig
from common.optim import OptimConfig
from data_tools.augment import ImageAugment, TextAugment
from data_tools.images.crops import CropFlip
from data_tools.shards.captions import FactCaptions
from data_tools.shards.remote import RemoteOptions
from diffusion.objective import ObjectiveConfig
from diffusion.tuning.buckets import BucketConfig
from diffusion.tuning.caption_folder import MissingCaptions

TunePrecision = Literal["auto", "bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class DataOptions:
    """Which images and captions, and how they are seen."""

    source: str = ""
    """Image shards (train-*.tar; a folder, http://, s3:// ...); a folder of images/ and captions/; or any format that
    data_tools reads, such as ECommerce-T2I's TSV files, which is packed into data/NAME_shards first."""
    val_source: str = ""
    """Validation images, where they are in a source of their own; empty: the val split of the shards, of a folder a
    share by the hash of the names."""
    val_share: float = 0.05
    """Share of a folder, or of a source without a validation split, that is held out."""
    missing_captions: MissingCaptions = "refuse"
    """Images of a folder without a caption: refuse them, or skip and count them."""
    remote: RemoteOptions = field(default_factory=RemoteOptions)
    buckets: BucketConfig = field(default_factory=BucketConfig)
    enlarge: bool = False
    """Squares of the one resolution from every image, small ones enlarged and counted, in the place of buckets."""
    crops: CropFlip = field(default_factory=lambda: CropFlip(min_scale=1.0, flip=False))
    """Only with enlarge: random square crops and mirror images."""
    move: ImageAugment = field(default_factory=ImageAugment)
    text_augment: TextAugment = field(default_factory=TextAugment)
    fact_captions: FactCaptions = field(default_factory=FactCaptions)
    short_caption_share: float = 0.0
    """Where an image has several captions: share of the samples that take the shortest; the others take any."""
    cache_latents: bool = False
    """Encode every image once and keep its latents in run_dir/latents; not with random crops or moves."""
    num_workers: int = 1
    """Processes that decode images; 0 decodes in the training process."""

    def __post_init__(self) -> None:
        if not 0 < self.val_share < 1:
            raise ValueError(f"val_share must lie in (0, 1), not {self.val_share}")
        if not 0 <= self.short_caption_share <= 1:
            raise ValueError(f"short_caption_share must lie in [0, 1], not {self.short_caption_share}")
        if self.num_workers < 0:
            raise ValueError(f"num_workers must not be negative, not {self.num_workers}")
        if self.enlarge and len(self.buckets.resolutions) > 1:
            raise ValueError("enlarge makes squares of one resolution: give buckets.resolutions one number")
        crops = self.crops.flip or self.crops.min_scale < 1
        if crops and not self.enlarge:
            raise ValueError("random crops and mirror images (crops) need enlarge: buckets show images whole")
        if self.cache_latents and (crops or self.move.is_on):
            raise ValueError("cache_latents keeps one view an image: switch crops and move off, or the cache")


@dataclass(frozen=True)
class TuneOptions:
    """What diffusion.finetune and diffusion.train_lora have in common."""

    base: str = ""
    """Folder in diffusers' layout (Stable Diffusion 1.x, Taiyi, a run of diffusion.train_base), hub id, or a single
    .safetensors file; empty: the newest run of diffusion.train_base."""
    base_config: str = ""
    """For a single file: folder or hub id with the configs and the tokenizer of its architecture."""
    text_len: int | None = None
    """Tokens of a text; None: as the base has it. Generation takes the same."""
    data: DataOptions = field(default_factory=DataOptions)
    epochs: float = 0.0
    """Passes over the images, in the place of loop.num_steps; 0: loop.num_steps counts."""
    caption_dropout: float = 0.1
    """Share of captions hidden in training, which keeps the model able to generate without text, for guidance."""
    objective: ObjectiveConfig = field(default_factory=lambda: ObjectiveConfig(min_snr_gamma=0.0))
    gradient_checkpointing: bool = False
    """Compute activations of the UNet again in the backward pass: about a third more time, a fraction of the memory."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    val_samples: int = 256
    """Validation images whose loss an evaluation takes the mean of."""
    distance_every: int = 0
    """Steps between measurements of the distance of generated from validation images (KID, in ImageNet features); a
    multiple of loop.eval_every; 0: never."""
    distance_images: int = 128
    """Images that are generated for it."""
    sample_texts: tuple[str, ...] = ()
    """Captions of the sample grids; empty: the first four of the validation images."""
    sample_steps: int = 20
    """Denoising steps of sample images."""
    guidance: float = 5.0
    """Classifier-free guidance of sample images."""
    engine: EngineName = "auto"
    """auto: DeepSpeed under its launcher, DDP under torchrun, else plain."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: TunePrecision = "auto"
    """auto takes bf16 autocast where the machine has it; fp16 (with a scaled loss) is for GPUs without bf16."""
    ignore_memory: bool = False
    """Start though the planned memory is more than there is."""

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"caption_dropout must lie in [0, 1), not {self.caption_dropout}")
        if self.epochs < 0 or self.distance_every < 0:
            raise ValueError(
                f"epochs and distance_every must not be negative: {self.epochs}, {self.distance_every}"
            )
        for name in ("val_samples", "sample_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.distance_images < 2:
            raise ValueError(f"distance_images must be at least 2, not {self.distance_images}")
        if self.distance_every and (not self.loop.eval_every or self.distance_every % self.loop.eval_every):
            raise ValueError(
                f"distance_every {self.distance_every} must be a multiple of loop.eval_every {self.loop.eval_every}"
            )
        if self.precision == "fp16" and self.engine == "deepspeed":
            raise ValueError("fp16 is for the plain engine and DDP: use bf16 with DeepSpeed")
        if self.optim.name != "adamw":
            raise ValueError(
                "optim.name must be adamw here: the matrices of a trained UNet are not made for muon"
            )

    def with_epochs(self, num_images: int) -> "TuneOptions":
        """loop.num_steps from epochs."""
        if not self.epochs:
            return self
        steps = max(1, round(self.epochs * num_images / self.loop.global_batch_size))
        return replace(self, loop=replace(self.loop, num_steps=steps))
