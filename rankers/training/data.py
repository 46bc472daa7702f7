"""What `rankers.train` trains on: shards, the names in them, the text tower's folder, the validation images."""

import hashlib
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from common import checkpoint
from common.config import from_mapping
from common.distributed import World
from common.files import atomic_directory
from common.log import say
from common.run_dir import claim
from common.text.bert_text import CaptionTokenizer, write_text_tower
from data_tools.shards.holdout import open_splits
from data_tools.shards.index import ShardIndex
from data_tools.shards.loader import IMAGE_SUFFIXES
from data_tools.synthetic.shards import EMBEDDED, ensure_synthetic
from rankers.calibration import require_mismatches
from rankers.chinese_clip import copy_towers, find_folder, load_folder, model_config
from rankers.model import IMAGENET_TOWER, KIND, TOWERS, ModelConfig, RankerModel
from rankers.retrieval import Pairs, load_pairs
from rankers.training.pairs import Vocabulary, scan_names


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
        pairs = load_pairs(val, options.attributes, options.val_images)
        require_mismatches(pairs, source)
        names = scan_names(train, options.attributes)
        claim(options.loop.run_dir, world.is_main)
        towers = options.loop.run_dir / TOWERS
        own = own_checkpoint(options.init)
        init = find_folder(options.init) if options.init and not own else None
        if world.is_main:
            with atomic_directory(towers) as folder:
                if own:
                    shutil.copytree(own / TOWERS, folder, dirs_exist_ok=True)
                elif init:
                    copy_towers(init, folder)
                else:
                    vocab = Path(options.vocab) if options.vocab else None
                    write_text_tower(folder, [*names.captions, *names.labels], options.model.text, vocab)
        world.barrier()
        config = _config_of(own, init, options.model)
        tokenizer = CaptionTokenizer(towers, config.max_text_len)
        return cls(train, val, names, pairs, towers, tokenizer, config, own or init, source)

    def build_model(self, seed: int) -> RankerModel:
        """Raises FileNotFoundError where the weights that it starts from are not on this machine."""
        torch.manual_seed(seed)
        if self.init and self.config.architecture == "chinese_clip" and not own_checkpoint(str(self.init)):
            return load_folder(self.init)[0]
        model = RankerModel(self.config, self.towers)
        if self.init:
            checkpoint.load_weights(model, self.init)
        elif self.config.image_tower == IMAGENET_TOWER:
            model.clip.visual.trunk.load_imagenet_()
        return model

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
            "no --data given: training on the embedded default, product-like images rendered by data_tools.synthetic"
        )
        if not any(EMBEDDED.glob("train-*.tar")):
            ensure_synthetic(EMBEDDED)
    world.barrier()
    return str(EMBEDDED)


def own_checkpoint(name: str) -> Path | None:
    """The checkpoint directory that a ranker of this project stands for; None where `name` is none on this machine."""
    if not name or not (Path(name).is_dir() or name.startswith("pretrained/")):
        return None
    try:
        directory = checkpoint.resolve(name)
        checkpoint.read_config(directory, KIND)
    except (FileNotFoundError, ValueError):
        return None
    return directory


def _config_of(own: Path | None, init: Path | None, options: Any) -> ModelConfig:
    if own:
        values = checkpoint.read_config(own, KIND)["model"]
        return replace(from_mapping(ModelConfig, values, where=f"{own}/config.json"), released_from="")
    if init:
        return model_config(init)
    return ModelConfig(
        image_tower=options.image_tower,
        embed_dim=options.embed_dim,
        image_size=options.image_size,
        max_text_len=options.text.max_text_len,
    )
