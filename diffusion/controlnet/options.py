"""The options of a training of a ControlNet: what python -m diffusion.train_controlnet reads."""

from dataclasses import dataclass, field
from pathlib import Path

from common.engine import EngineName
from common.engines.deepspeed import DeepSpeedConfig
from common.loop import LoopConfig
from common.optim import OptimConfig
from common.precision import Precision
from data_tools.images.crops import CropFlip
from data_tools.shards.line_views import LineSource
from diffusion.objective import ObjectiveConfig


@dataclass(frozen=True)
class Options:
    """Line drawings as a condition of a diffusion base."""

    base: str = ""
    """Base model: a folder in diffusers' layout, a run of diffusion.train_base, a hub id or a .safetensors file."""
    base_config: str = ""
    """For a single file: folder or hub id with the configs and the tokenizer of its architecture."""
    init: str = ""
    """ControlNet to go on from: a folder of diffusers, a run, a hub id, or control_sd15_canny.pth; empty: a copy of
    the base's own encoder."""
    data: str = ""
    """Image shards (with `line.png` for --lines given), or the published layout: parquet or JSONL of pd_line_drawing,
    pd_realistic_drawing, pd_title."""
    lines: LineSource = "given"
    """given: the drawings of the data; canny, xdog, contour draw each view, mixed takes the three in turn."""
    image_size: int = 0
    """Side in pixels; 0: that of the base."""
    views: int = 1
    """Encoded views an image: the plain one and views - 1 augmented ones."""
    augment: CropFlip = field(default_factory=CropFlip)
    sd_locked: bool = True
    """Only the ControlNet is trained; False also trains the decoder of the base's UNet, which wants a lower lr."""
    prompt_suffix: str = ""
    """Appended to every caption, in training and in inference."""
    negative: str = ""
    """Negative prompt of the sample grids and of inference."""
    caption_dropout: float = 0.1
    """Share of captions hidden in training; the published recipe hides none."""
    line_dropout: float = 0.0
    """Share of drawings replaced by empty ones, for guidance on the drawing."""
    objective: ObjectiveConfig = field(default_factory=lambda: ObjectiveConfig(min_snr_gamma=0.0))
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5, beta2=0.999, weight_decay=0.01))
    ema_decay: float = 0.0
    """Decay of the moving average of weights that is saved; 0: none."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(run_dir=Path("runs/controlnet")))
    val_samples: int = 256
    """Validation pairs of an evaluation."""
    sample_images: int = 3
    """Images a drawing in the sample grids; 0: no grids."""
    num_steps: int = 10
    """Steps of the solver in the sample grids."""
    guidance: float = 7.0
    """Guidance on the text in the sample grids."""
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
        for name in ("caption_dropout", "line_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), not {getattr(self, name)}")
        if self.lines == "none":
            raise ValueError(
                "a ControlNet needs drawings: choose --lines given, canny, xdog, contour or mixed"
            )
        if self.views < 1 or self.val_samples < 1 or self.sample_images < 0 or self.image_size < 0:
            raise ValueError(
                "views and val_samples must be at least 1, sample_images and image_size at least 0, not "
                f"{self.views}, {self.val_samples}, {self.sample_images} and {self.image_size}"
            )
