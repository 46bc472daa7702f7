"""What a training of the GAN starts from: image shards, categories where they carry some, and the text tower's folder.

The categories' names and the folder are kept in the run directory from the first start on, so that a run never changes
its language.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import checkpoint
from common.distributed import World
from common.files import atomic_directory, read_json, write_json
from common.log import say
from common.run_dir import claim
from common.text.bert_text import CaptionTokenizer, write_text_tower
from data_tools.shards.captions import CaptionChoice, pick_caption
from data_tools.shards.holdout import open_splits
from data_tools.shards.index import ShardIndex
from data_tools.shards.loader import IMAGE_SUFFIXES, DecodeImage, eval_batches, train_batches
from data_tools.synthetic.shards import embedded_default, ensure_synthetic
from gan.options import Options
from gan.text import FOLDER, copy_text_folder, is_known, open_tokenizer, ranker_text
from vq.data import small_images
from vq.losses.labels import label_of

LABELS_FILE = "labels.json"
MOST_LABELS = 512
LOOK_AT = 20_000  # samples that captions and categories are learned from


@dataclass(frozen=True)
class DecodeLabeled:
    """A sample with its category's number: 0 where it has none or one that is not in `labels`."""

    image: DecodeImage
    labels: tuple[str, ...]

    def __call__(self, index: ShardIndex, i: int, rng: np.random.Generator) -> dict[str, Any]:
        batch = self.image(index, i, rng)
        label = label_of(index.read(i, ("json",))) if self.labels else ""
        number = self.labels.index(label) + 1 if label in self.labels else 0
        return batch | {"label": torch.tensor(number)}


@dataclass(frozen=True)
class TrainData:
    """Shards, category names, and what reads captions."""

    train: ShardIndex
    val: ShardIndex
    labels: tuple[str, ...]
    text_folder: Path
    tokenizer: CaptionTokenizer
    img_size: int

    @classmethod
    def prepare(cls, options: Options, world: World) -> "TrainData":
        """Open the shards, find categories and vocabulary. All processes must call it.

        Raises FileNotFoundError or ValueError in one sentence.
        """
        run_dir, size = options.loop.run_dir, options.generator.img_size
        claim(run_dir, world.is_main)
        if not options.data and world.is_main:
            say(
                "no --data given: training on the embedded default, product-like images made by data_tools.synthetic"
            )
            ensure_synthetic(embedded_default(size), image_size=size)
        world.barrier()
        source = options.data or str(embedded_default(size))
        train, val = (index.require(*IMAGE_SUFFIXES) for index in open_splits(source, options.remote))
        if len(val) < 2:
            raise ValueError(
                f"the validation shards of {source} hold {len(val)} image: a distance needs at least 2"
            )
        if world.is_main and not checkpoint.step_directories(run_dir):
            _write_text_folder(run_dir / FOLDER, options, train)
            found, notes = find_labels(train) if options.labels == "auto" else ((), [])
            write_json(run_dir / LABELS_FILE, found)
            for note in [*train.problems, *val.problems, *notes, small_images(train, size)]:
                if note:
                    say(f"note: {note}")
        world.barrier()
        labels = tuple(read_json(run_dir / LABELS_FILE)) if options.labels == "auto" else ()
        return cls(train, val, labels, run_dir / FOLDER, open_tokenizer(run_dir / FOLDER), size)

    def train_batches(
        self, options: Options, batch_size: int, world: World, start_sample: int
    ) -> Iterator[dict[str, Any]]:
        """This process's share of every global batch: image (B, 3, S, S), label (B,), text, key."""
        facts = options.fact_captions
        choice = CaptionChoice(options.short_caption_share, None, facts if facts.share else None)
        decode = DecodeLabeled(DecodeImage(self.img_size, options.augment, captions=choice), self.labels)
        seed, workers = options.loop.seed, options.num_workers
        return train_batches(self.train, decode, batch_size, world, seed, start_sample, workers)

    def plain_batches(self, index: ShardIndex, batch_size: int, limit: int) -> Iterator[dict[str, Any]]:
        """The first `limit` samples of `index` in order: plain crops, first captions."""
        decode = DecodeLabeled(DecodeImage(self.img_size, first_caption=True), self.labels)
        return eval_batches(index, decode, batch_size, limit)

    def sample_conditions(self, named: Sequence[str], count: int) -> list[tuple[str, int]]:
        """(caption, number of its category) of each row of the sample grids: `named`, or the first different captions
        of the validation shards, or where none is known the first categories.

        Raises ValueError for a named one that is not known, and where there is nothing at all to condition on.
        """
        for text in named:
            if not is_known(self.tokenizer, text):
                raise ValueError(f"the text tower knows nothing of the caption {text!r} of --sample-texts")
        texts = known_captions(self.val, self.tokenizer, 1000)
        found = [(text, 0) for text in (tuple(named) or texts[:count])]
        found = found or [("", number) for number in range(1, len(self.labels) + 1)][:count]
        if not found:
            raise ValueError(
                "the shards have neither captions that the text tower knows nor two categories: a conditional GAN has "
                "nothing to go by"
            )
        return found


def known_captions(index: ShardIndex, tokenizer: CaptionTokenizer, limit: int) -> list[str]:
    """Different captions of up to `limit` samples of which the tokenizer knows a word."""
    return [text for text in dict.fromkeys(captions(index, limit)) if is_known(tokenizer, text)]


def captions(index: ShardIndex, limit: int) -> list[str]:
    """First captions of up to `limit` samples."""
    return [pick_caption(index.read(i, ("txt",)).get("txt", b""), None) for i in index.spread(limit)]


def _write_text_folder(folder: Path, options: Options, train: ShardIndex) -> None:
    if options.text.ranker:
        copy_text_folder(ranker_text(checkpoint.resolve(options.text.ranker))[0], folder)
        return
    texts = [text for text in captions(train, LOOK_AT) if text]
    facts = options.fact_captions
    if facts.share:
        rng = np.random.Generator(np.random.Philox(key=[options.loop.seed, 0]))
        texts += [facts.draw(train.read(i, ("json",)).get("json", b""), rng) for i in train.spread(LOOK_AT)]
    vocab = Path(options.text.vocab) if options.text.vocab else None
    with atomic_directory(folder) as temporary:
        write_text_tower(temporary, texts, options.text.tower, vocab)


def find_labels(index: ShardIndex) -> tuple[tuple[str, ...], list[str]]:
    """Category names of the training shards, the most frequent first, and what a user should know about them.

    Fewer than two different ones tell nothing apart: then none.
    """
    indices = index.spread(LOOK_AT)
    counts = Counter(label_of(index.read(i, ("json",))) for i in indices)
    missing = counts.pop("", 0)
    if not counts:
        return (), []
    if len(counts) == 1:
        return (), [
            f"all samples with a category are of {next(iter(counts))!r}: the GAN reads captions alone"
        ]
    ordered = sorted(counts, key=lambda name: (-counts[name], name))
    notes = []
    if missing:
        notes.append(
            f"{missing} of {len(indices)} samples looked at have no category: they train with captions alone"
        )
    if len(ordered) > MOST_LABELS:
        notes.append(
            f"{len(ordered)} categories: the {MOST_LABELS} most frequent are read, the others count as none"
        )
    return tuple(ordered[:MOST_LABELS]), notes
