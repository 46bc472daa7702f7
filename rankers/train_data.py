"""What `rankers.train` trains on: shards, the names in them, the text tower's folder, the validation pictures."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.bert_text import CaptionTokenizer, write_text_tower
from common.distributed import World
from common.files import atomic_directory
from common.log import say
from common.run_dir import claim
from data_tools.holdout import open_splits
from data_tools.index import ShardIndex
from data_tools.loader import IMAGE_SUFFIXES
from data_tools.synthetic import ensure_synthetic
from rankers.calibration import require_mismatches
from rankers.chinese_clip import copy_towers, find_folder, load_folder, model_config
from rankers.model import TOWERS, ModelConfig, RankerModel
from rankers.pairs import Vocabulary, scan_names
from rankers.retrieval import Pairs, load_pairs

EMBEDDED = Path("data/synthetic")


@dataclass(frozen=True)
class RankerData:
    """Opened once a process."""

    train: ShardIndex
    val: ShardIndex
    names: Vocabulary
    pairs: Pairs
    towers: Path
    """Folder of the run with the towers' configs and vocabulary; goes into every checkpoint."""
    tokenizer: CaptionTokenizer
    config: ModelConfig
    init: Path | None
    source: str

    @classmethod
    def prepare(cls, options: Any, world: World) -> "RankerData":
        """From `rankers.train.Options`. Raises FileNotFoundError or ValueError naming what is wrong."""
        source = options.data or _embedded_default(world)
        train, val = (i.require(*IMAGE_SUFFIXES) for i in open_splits(source, options.remote))
        pairs = load_pairs(val, options.attributes, options.val_pictures)
        require_mismatches(pairs, source)
        names = scan_names(train, options.attributes)
        claim(options.loop.run_dir, world.is_main)
        towers = options.loop.run_dir / TOWERS
        init = find_folder(options.init) if options.init else None
        if world.is_main:
            with atomic_directory(towers) as folder:
                if init:
                    copy_towers(init, folder)
                else:
                    vocab = Path(options.vocab) if options.vocab else None
                    write_text_tower(folder, [*names.captions, *names.labels], options.model.text, vocab)
        world.barrier()
        config = model_config(init) if init else _model_config(options.model)
        tokenizer = CaptionTokenizer(towers, config.max_text_len)
        return cls(train, val, names, pairs, towers, tokenizer, config, init, source)

    def build_model(self, seed: int) -> RankerModel:
        torch.manual_seed(seed)
        return load_folder(self.init)[0] if self.init else RankerModel(self.config, self.towers)

    @property
    def towers_sha256(self) -> str:
        """Of all files of the folder: a run goes on with the vocabulary it was started with, or not at all."""
        digest = hashlib.sha256()
        for file in sorted(self.towers.iterdir()):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
        return digest.hexdigest()


def _embedded_default(world: World) -> str:
    if world.is_main:
        say(
            "no --data given: training on the embedded default, product-like pictures drawn by data_tools.synthetic"
        )
        if not any(EMBEDDED.glob("train-*.tar")):
            ensure_synthetic(EMBEDDED)
    world.barrier()
    return str(EMBEDDED)


def _model_config(options: Any) -> ModelConfig:
    return ModelConfig(
        image_tower=options.image_tower,
        embed_dim=options.embed_dim,
        image_size=options.image_size,
        max_text_len=options.text.max_text_len,
    )
