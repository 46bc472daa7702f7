"""The options of a training of the generator: what train_dalle.py reads, and dalle.plan prices."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import tyro

from common import checkpoint
from common.config import to_mapping
from common.engine import EngineName
from common.engines.deepspeed import DeepSpeedConfig
from common.loop import LoopConfig
from common.optim import OptimConfig
from common.precision import Precision
from dalle.losses import LossConfig
from dalle.model import SIZES, TRAINING_ONLY, DalleConfig, ModelOptions, read_model_config
from dalle.options import SamplingOptions
from data_tools.augment import TextAugment
from data_tools.images.crops import CropFlip
from data_tools.ingest.prepare import ImageOptions
from data_tools.readers.base import ReaderOptions
from data_tools.shards.captions import FactCaptions
from data_tools.shards.remote import RemoteOptions


@dataclass(frozen=True)
class Options:
    """Stage 2: captions and image tokens -> generator."""

    EARLIER_NAMES: ClassVar = {"picture": "image"}
    data: str = ""
    """Token shards or image shards: a folder, http://, s3:// ...; or images with captions in any format that
    data_tools.inspect knows: all that is missing is made on the way. Empty: the embedded default."""
    vqgan_config: str = ""
    """Recipe of the image tokenizer that is trained where `data` are images and no image_tokenizer is named; empty:
    configs/own_128/vqgan.yaml."""
    reader: tyro.conf.OmitArgPrefixes[ReaderOptions] = field(default_factory=ReaderOptions)
    """How `data` is read where it holds images, as data_tools.shard takes it."""
    image: tyro.conf.OmitArgPrefixes[ImageOptions] = field(default_factory=ImageOptions)
    """Size and limits of the images in the shards that are made of it."""
    remote: RemoteOptions = field(default_factory=RemoteOptions)
    image_tokenizer: str = ""
    """Stage 1 checkpoint or run directory; empty: that of the run, or the newest one in runs/."""
    text_tokenizer: str = ""
    """Folder or hub id of a tokenizer, or a SentencePiece model; empty: characters learned from the captions."""
    init: str = ""
    """Generator whose weights this one starts from: a checkpoint, a run or a hub id. Its sizes and its tokenizers are
    taken over, so captions and token shards of another tokenizer are refused."""
    new_codes: bool = False
    """Take --init although `image_tokenizer` gives other codes than its own, as many: one that was trained on from its
    own (train_vqgan.py --init), whose codes still mean nearly the same."""
    max_text_len: int = 32
    """Text tokens, begin and end marks included; longer captions are cut and counted."""
    caption_dropout: float = 0.1
    """Share of captions hidden in training, which teaches the model to generate without text, for guidance."""
    short_caption_share: float = 0.0
    """Where an image has several captions: share of the draws that take the shortest; the others take any."""
    fact_captions: FactCaptions = field(default_factory=FactCaptions)
    lines: bool = False
    """Train the generator to follow line drawings, of token shards that vq.encode_shards --lines made; with --init it
    starts as the generator it is."""
    line_dropout: float = 0.3
    """Share of drawings hidden in training, so that the generator stays one without drawings too."""
    line_width: int = 128
    """Channels of the encoder of drawings, a multiple of 8."""
    unknown_insert: float = 0.0
    """Share of captions with a random piece of the vocabulary put in, which teaches to read past unknown words."""
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
    """Images a caption in the sample grids; 0: no grids."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """How the sample grids are sampled."""
    engine: EngineName = "auto"
    """auto: DeepSpeed under its launcher, DDP under torchrun, else plain."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    compile: bool = False
    """Compile the blocks with torch.compile, and pad every text to max_text_len; a CPU needs a C++ compiler for it."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """auto takes bf16 where the machine has it, and in compiled code on CPUs with AVX2."""
    kernels: Literal["auto", "off"] = "auto"
    """auto: compiled code and hand-written passes on CPUs where they are faster; off: PyTorch alone."""
    num_workers: int = 1
    """Processes that read shards; 0 reads in the training process."""

    def __post_init__(self) -> None:
        if self.new_codes and not (self.init and self.image_tokenizer):
            raise ValueError(
                "new_codes needs --init GENERATOR and the --image-tokenizer whose codes are new to it"
            )
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"caption_dropout must lie in [0, 1), not {self.caption_dropout}")
        if not 0 <= self.line_dropout < 1:
            raise ValueError(f"line_dropout must lie in [0, 1), not {self.line_dropout}")
        if not 0 <= self.unknown_insert <= 1:
            raise ValueError(f"unknown_insert must lie in [0, 1], not {self.unknown_insert}")
        if not 0 <= self.short_caption_share <= 1:
            raise ValueError(f"short_caption_share must lie in [0, 1], not {self.short_caption_share}")
        if self.max_text_len < 3:
            raise ValueError(f"max_text_len must be at least 3, not {self.max_text_len}")
        if self.val_samples < 1 or self.sample_images < 0:
            raise ValueError(
                f"val_samples must be at least 1 and sample_images at least 0, not {self.val_samples} "
                f"and {self.sample_images}"
            )

    def with_init_tokenizers(self) -> "Options":
        """The tokenizers of `init` where none are named. Raises FileNotFoundError or ValueError where there is no such
        generator."""
        if not self.init:
            return self
        directory = checkpoint.resolve(self.init)
        read_model_config(directory)
        return replace(
            self,
            image_tokenizer=self.image_tokenizer or str(directory / "image_tokenizer"),
            text_tokenizer=self.text_tokenizer or str(directory),
        )

    def model_config(
        self,
        text_vocab_size: int,
        pad_id: int,
        codebook_size: int,
        grid_size: int,
        downsample_factor: int = 0,
    ) -> DalleConfig:
        """Of the generator to train: `model`, or the sizes of `init`. Raises ValueError where both differ.

        downsample_factor: pixels a token, for the encoder of drawings.
        """
        config = self._config_without_lines(text_vocab_size, pad_id, codebook_size, grid_size)
        if not self.lines and config.line_factor:
            raise ValueError(f"--init {self.init} follows line drawings: train it with --lines")
        if not self.lines or config.line_factor:
            return config
        return replace(config, line_factor=downsample_factor, line_width=self.line_width)

    def _config_without_lines(
        self, text_vocab_size: int, pad_id: int, codebook_size: int, grid_size: int
    ) -> DalleConfig:
        if not self.init:
            vocabularies = (text_vocab_size, pad_id, self.max_text_len, codebook_size, grid_size)
            return self.model.config(*vocabularies, text_head=self.loss.text_weight > 0)
        stored = read_model_config(checkpoint.resolve(self.init))
        asked = self._asked_sizes()
        asked |= {"text_vocab_size": text_vocab_size, "codebook_size": codebook_size, "grid_size": grid_size}
        for name, value in asked.items():
            if value != getattr(stored, name):
                raise ValueError(
                    f"--init {self.init} has {name} {getattr(stored, name)}, not {value}: leave sizes and tokenizers "
                    "out, its own are taken over"
                )
        if self.loss.text_weight and not stored.text_head:
            raise ValueError(f"--init {self.init} has no text head: set --loss.text-weight 0")
        return replace(stored, **{name: getattr(self.model, name) for name in TRAINING_ONLY})

    def _asked_sizes(self) -> dict[str, Any]:
        """What of the architecture was asked for: all that is not as it would be by default."""
        given, default = to_mapping(self.model), to_mapping(ModelOptions())
        asked = {n: v for n, v in given.items() if v != default[n] and n not in TRAINING_ONLY}
        if asked.pop("size", None):
            asked = dict(zip(("dim", "num_layers", "num_heads"), SIZES[self.model.size], strict=True)) | asked
        if self.max_text_len != Options.max_text_len:
            asked["max_text_len"] = self.max_text_len
        return asked
