"""The options of a training of the generator: what train_dalle.py reads, and dalle.plan prices."""

from dataclasses import dataclass, field
from pathlib import Path

from common.distributed import DeepSpeedConfig, EngineName, Precision
from common.loop import LoopConfig
from common.optim import OptimConfig
from dalle.losses import LossConfig
from dalle.model import ModelOptions
from dalle.sampling import SamplingOptions
from data_tools.augment import TextAugment
from data_tools.crops import CropFlip
from data_tools.remote import RemoteOptions


@dataclass(frozen=True)
class Options:
    """Stage 2: captions and image tokens -> generator."""

    data: str = ""
    """Token shards or image shards: a folder, http://, s3:// ...; empty: the embedded default, encoded into data/."""
    remote: RemoteOptions = field(default_factory=RemoteOptions)
    image_tokenizer: str = ""
    """Stage 1 checkpoint or run directory; empty: that of the run, or the newest one in runs/."""
    text_tokenizer: str = ""
    """Folder or hub id of a tokenizer, or a SentencePiece model; empty: characters learned from the captions."""
    max_text_len: int = 32
    """Text tokens, begin and end marks included; longer captions are cut and counted."""
    caption_dropout: float = 0.1
    """Share of captions hidden in training, which teaches the model to draw without text, for guidance."""
    short_caption_share: float = 0.0
    """Where a picture has several captions: share of the draws that take the shortest; the others take any."""
    text_augment: TextAugment = field(default_factory=TextAugment)
    ema_decay: float = 0.999
    """Decay of the moving average of weights that is saved; 0: none."""
    model: ModelOptions = field(default_factory=ModelOptions)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-3, beta2=0.95))
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(run_dir=Path("runs/dalle")))
    augment: CropFlip = field(default_factory=CropFlip)
    """Augmentation of image shards; token shards carry their views."""
    val_samples: int = 1000
    """Validation samples an evaluation looks at."""
    sample_texts: tuple[str, ...] = ()
    """Captions of the sample grids, one a row; empty: the first four of the validation shards."""
    sample_images: int = 4
    """Pictures a caption in the sample grids; 0: no grids."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """How the sample grids are drawn."""
    engine: EngineName = "auto"
    """auto: DeepSpeed under its launcher, DDP under torchrun, else plain."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    compile: bool = False
    """Compile the blocks with torch.compile, and pad every text to max_text_len; a CPU needs a C++ compiler for it."""
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
        if self.max_text_len < 3:
            raise ValueError(f"max_text_len must be at least 3, not {self.max_text_len}")
        if self.val_samples < 1 or self.sample_images < 0:
            raise ValueError(
                f"val_samples must be at least 1 and sample_images at least 0, not {self.val_samples} "
                f"and {self.sample_images}"
            )
