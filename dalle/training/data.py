"""What a training of the generator starts from: shards and the two tokenizers.

Both tokenizers are copied into the run directory at the first start, so that a run never changes its language when a
newer image tokenizer appears or the folder of the text tokenizer moves.
"""

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import checkpoint
from common.distributed import World
from common.files import atomic_directory
from common.log import say
from common.run_dir import claim
from dalle.text_tokenizer import TextTokenizer
from dalle.training.options import Options
from data_tools.images.line_drawings import LINE_MEMBER
from data_tools.ingest.prepare import ImageOptions
from data_tools.readers.base import ReaderOptions
from data_tools.shards.captions import CaptionChoice, pick_caption
from data_tools.shards.holdout import open_splits
from data_tools.shards.index import ShardIndex
from data_tools.shards.loader import (
    IMAGE_SUFFIXES,
    DecodeImage,
    DecodeTokens,
    eval_batches,
    train_batches,
)
from data_tools.shards.remote import RemoteOptions, is_remote
from vq.encoding import require_tokenizer
from vq.model import KIND as TOKENIZER_KIND
from vq.model import ImageTokenizer


@dataclass(frozen=True)
class TrainData:
    """Shards, of tokens or of images, and the tokenizers that read them."""

    train: ShardIndex
    val: ShardIndex
    has_tokens: bool
    image_tokenizer: ImageTokenizer
    image_tokenizer_dir: Path
    text_tokenizer: TextTokenizer
    with_lines: bool = False
    """Batches of tokens also have `line` (B, 1, S, S) uint8."""

    @classmethod
    def prepare(
        cls,
        run_dir: Path,
        data: str,
        image_tokenizer: str,
        text_tokenizer: str,
        world: World,
        remote: RemoteOptions | None = None,
    ) -> "TrainData":
        """Open what is named, find or make what is not. All processes must call it.

        Raises FileNotFoundError or ValueError in one sentence, also when the run was started with another tokenizer.
        """
        if data and not is_remote(data):
            open_splits(data)  # what the user named is looked at before what is derived from it
        claim(run_dir, world.is_main)
        goes_on = bool(checkpoint.step_directories(run_dir))
        image_dir, text_dir = run_dir / "image_tokenizer", run_dir / "text_tokenizer"
        if world.is_main and not (goes_on and image_dir.is_dir()):
            copy_image_tokenizer(find_image_tokenizer(image_tokenizer), image_dir)
        world.barrier()
        tokenizer = ImageTokenizer.from_pretrained(image_dir, world.device)
        if goes_on and image_tokenizer:
            _require_same(run_dir, tokenizer.sha256, image_tokenizer)
        source = data or synthetic_tokens(tokenizer, world)
        train, val, has_tokens = open_shards(source, tokenizer, remote)
        if world.is_main and not (goes_on and text_dir.is_dir()):
            with atomic_directory(text_dir) as temporary:
                find_text_tokenizer(text_tokenizer, train).save(temporary)
        world.barrier()
        data = cls(train, val, has_tokens, tokenizer, image_dir, TextTokenizer.from_pretrained(text_dir))
        if goes_on and text_tokenizer:
            data.require_same_text_tokenizer(run_dir, text_tokenizer, world)
        return data

    def require_same_text_tokenizer(self, run_dir: Path, name: str, world: World) -> None:
        """Raises ValueError where `name` is another than the run has. One that is gone is no reason to stop."""
        try:
            named = TextTokenizer.from_pretrained(name)
        except (OSError, ValueError):
            if world.is_main:
                say(f"note: the text tokenizer {name} cannot be read, the run goes on with its own copy")
            return
        if not self.cuts_captions_as(named):
            raise ValueError(
                f"{run_dir} was started with another text tokenizer than {name}: choose another --loop.run-dir"
            )

    def cuts_captions_as(self, other: TextTokenizer) -> bool:
        """Whether captions have the same ids under `other`."""
        texts = self.first_texts(64)
        return other.encode(texts, 64).ids.tolist() == self.text_tokenizer.encode(texts, 64).ids.tolist()

    def train_batches(
        self, options: Options, batch_size: int, world: World, start_sample: int
    ) -> Iterator[dict[str, Any]]:
        """This process's share of every global batch: image_ids (B, N), or image (B, 3, S, S), text, key."""
        text = options.text_augment
        rewrite, facts = text.drawn if text.is_on else None, options.fact_captions
        choice = CaptionChoice(options.short_caption_share, rewrite, facts if facts.share else None)
        decode = replace(self._decode_tokens, captions=choice)
        if not self.has_tokens:
            decode = DecodeImage(self.image_tokenizer.image_size, options.augment, captions=choice)
        seed, workers = options.loop.seed, options.num_workers
        return train_batches(self.train, decode, batch_size, world, seed, start_sample, workers)

    @property
    def _decode_tokens(self) -> DecodeTokens:
        tokenizer = self.image_tokenizer
        return DecodeTokens(
            num_tokens=tokenizer.grid_size**2, codebook_size=tokenizer.codebook_size, lines=self.with_lines
        )

    def require_lines(self) -> None:
        """Raises ValueError where the shards hold no drawings."""
        if not (self.has_tokens and self.train.has(LINE_MEMBER) and self.val.has(LINE_MEMBER)):
            raise ValueError(
                f"--lines needs token shards with drawings, and {self.train.paths[0].parent} has none: make them with "
                "`python -m vq.encode_shards TOKENIZER IMAGES TOKENS --lines mixed`"
            )

    def val_batches(self, batch_size: int, limit: int) -> Iterator[dict[str, Any]]:
        """The first `limit` validation samples in order: plain crops, first captions."""
        if self.has_tokens:
            return eval_batches(self.val, replace(self._decode_tokens, first_view=True), batch_size, limit)
        decode = DecodeImage(self.image_tokenizer.image_size, first_caption=True)
        return eval_batches(self.val, decode, batch_size, limit)

    def first_texts(self, count: int) -> tuple[str, ...]:
        """The first different captions of the validation shards that the text tokenizer knows something of."""
        texts = dict.fromkeys(text for text in captions(self.val, 1000) if text.strip())
        return tuple(itertools.islice(filter(self.is_known, texts), count))

    def is_known(self, text: str) -> bool:
        """Whether the text tokenizer knows a piece of it."""
        encoded = self.text_tokenizer.encode([text], 1024)
        return encoded.num_unknown < encoded.num_pieces


def require_data(options: Options) -> None:
    """What the user named as data is there, and what says how images are read has images to read.

    Raises FileNotFoundError or ValueError, before anything is looked for that is made of the data.
    """
    data = options.data
    is_local = data and "://" not in data and not data.startswith("pipe:")
    if is_local and not Path(data).exists() and not set("{:") & set(data):
        raise FileNotFoundError(f"there is no file or folder {data} (--data)")
    reads = (options.reader, options.image) != (ReaderOptions(), ImageOptions())
    if reads and not (is_local and Path(data).exists() and not has_shards(Path(data))):
        raise ValueError(
            "options of reading images (--encoding, --captions, --size ...) need --data with images, not shards"
        )


def names_images(data: str) -> bool:
    """Whether `data` is a folder or a file on this machine that holds no shards."""
    path = Path(data)
    return bool(data) and path.exists() and not has_shards(path)


def has_shards(path: Path) -> bool:
    """Whether a folder holds training shards."""
    return path.is_dir() and any(p.name.startswith("train-") and p.suffix == ".tar" for p in path.iterdir())


def find_image_tokenizer(name: str) -> Path:
    """`name`, or the newest one in runs/. Raises FileNotFoundError naming the command that makes one."""
    directory = checkpoint.resolve(name) if name else checkpoint.newest_run(TOKENIZER_KIND)
    if directory is None:
        raise FileNotFoundError(
            "no image tokenizer in runs/ yet: train one with `python train_vqgan.py`, or name one with "
            "--image-tokenizer DIR"
        )
    say(f"image tokenizer: {directory}")
    return directory


def copy_image_tokenizer(source: Path, target: Path) -> None:
    checkpoint.read_config(source, TOKENIZER_KIND)
    with atomic_directory(target) as temporary:
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(source / name, temporary / name)


def _require_same(run_dir: Path, sha256: str, name: str) -> None:
    asked = checkpoint.read_config(checkpoint.resolve(name), TOKENIZER_KIND)["sha256"]
    if asked != sha256:
        raise ValueError(
            f"{run_dir} was started with the image tokenizer {sha256[:12]}, but {name} is {asked[:12]}: choose "
            "another --loop.run-dir"
        )


def require_tokenizers_of(init: str, data: TrainData, new_codes: bool = False) -> None:
    """Raises ValueError where the generator `init` was trained on other codes (unless `new_codes`) or cuts captions
    otherwise."""
    directory = checkpoint.resolve(init)
    image_tokenizer = ImageTokenizer.from_pretrained(directory / "image_tokenizer")
    if image_tokenizer.codes_sha256 != data.image_tokenizer.codes_sha256 and not new_codes:
        raise ValueError(
            f"--init {init} was trained on the codes of its own image tokenizer: leave --image-tokenizer out, and "
            f"encode images with `python -m vq.encode_shards {directory / 'image_tokenizer'} IMAGES TOKENS`; or, "
            "where the new tokenizer was trained on from its own, add --new-codes"
        )
    if not data.cuts_captions_as(TextTokenizer.from_pretrained(directory)):
        raise ValueError(
            f"--init {init} cuts captions otherwise: leave --text-tokenizer out, its own is taken over"
        )


def synthetic_tokens(tokenizer: ImageTokenizer, world: World) -> str:
    """The embedded default as token shards of `tokenizer`, made where it is missing."""
    from data_tools.synthetic.shards import embedded_default, ensure_synthetic
    from vq.encode_shards import Options, encode_shards

    source = embedded_default(tokenizer.image_size)
    target = Path(f"data/synthetic_tokens_{tokenizer.codes_sha256[:8]}")
    if world.is_main:
        say(
            "no --data given: training on the embedded default, product-like images rendered by data_tools.synthetic"
        )
        ensure_synthetic(source, image_size=tokenizer.image_size)
    world.barrier()
    encode_shards(tokenizer, Options("", source, target, views=2), world)
    return str(target)


def open_shards(
    data: str, tokenizer: ImageTokenizer, remote: RemoteOptions | None = None
) -> tuple[ShardIndex, ShardIndex, bool]:
    """Training and validation samples, and whether they are tokens. Raises ValueError for another tokenizer's."""
    train, val = open_splits(data, remote)
    has_tokens = train.has("ids.npy")
    if has_tokens:
        require_tokenizer(train.paths[0].parent, tokenizer.codes_sha256)
    suffixes = ("ids.npy",) if has_tokens else IMAGE_SUFFIXES
    return train.require(*suffixes), val.require(*suffixes), has_tokens


def find_text_tokenizer(name: str, train: ShardIndex) -> TextTokenizer:
    """The one that is named, or one of the characters in the training captions."""
    if name:
        return TextTokenizer.from_pretrained(name)
    say("no --text-tokenizer given: learning one from the characters of the captions")
    texts = captions(train, len(train))
    return TextTokenizer.train(texts, vocab_size=8000, model_type="char", character_coverage=1.0)


def captions(index: ShardIndex, limit: int) -> list[str]:
    """First captions of up to `limit` samples."""
    return [
        pick_caption(index.read(i, ("txt",)).get("txt", b""), None) for i in range(min(len(index), limit))
    ]
