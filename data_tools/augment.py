"""Captions said differently, and product images moved a little: pure functions of (seed, key, epoch). Off by default.

    python -m data_tools.augment data/clean --text.reorder 1 --text.synonyms 0.5      # show what it would do

In training: `train_dalle.py --text-augment.synonyms 0.3`, `train_vqgan.py --move.shift 0.05`. Whether it helps depends
on the data and was not measured here, so all of it is off: train twice and compare before leaving it on. Nothing here
changes what an image shows or what a caption claims: no mirror images of packages, no colour changes, no words lost
but attributes that `drop` is asked to leave out. `TextAugment` has no state, so a resumed run says the same at the same
place.
"""

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from common.config import command, parse_options, read_mapping
from data_tools.ingest.records import Record
from data_tools.readers.base import ReaderOptions, hash64
from data_tools.rules import PRESETS
from data_tools.rules.lexicon import Lexicon, Word, load_lexicon

NOUN = "kind"
_LINK = "\u7684"  # the particle between an attribute and its noun
_SPACE = re.compile(r"(\s+)")


@dataclass(frozen=True)
class TextAugment:
    """Another caption for the same image; each share is a probability from 0 (never) to 1."""

    synonyms: float = 0.0
    """Replace a known word by a synonym (rules/synonyms.yaml)."""
    reorder: float = 0.0
    """Change the order of adjacent attributes, and of pieces between spaces."""
    drop: float = 0.0
    """Leave an attribute out; the product noun always stays."""
    template: float = 0.0
    """Say colour, material and noun by a template (rules/templates.yaml), where the caption holds nothing else."""
    seed: int = 0
    """Another seed draws other variants."""

    def __post_init__(self) -> None:
        for name in ("synonyms", "reorder", "drop", "template"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"text augmentation: {name} must be between 0 and 1, not {getattr(self, name)}"
                )

    @property
    def is_on(self) -> bool:
        """False if every caption comes back as it is."""
        return any((self.synonyms, self.reorder, self.drop, self.template))

    def __call__(self, caption: str, key: str, epoch: int) -> str:
        """The caption of sample `key` in `epoch`; the same on every machine and after every resume."""
        rng = np.random.Generator(np.random.Philox(key=[hash64(f"{self.seed}\n{key}"), epoch]))
        return self.drawn(caption, rng)

    def drawn(self, caption: str, rng: np.random.Generator) -> str:
        """A variant drawn by `rng`, which the loader makes from (seed, epoch, sample)."""
        if not self.is_on:
            return caption
        lexicon, tables = load_lexicon(), load_tables()
        if rng.random() < self.template:
            caption = from_template(caption, lexicon, tables, rng)
        words = list(lexicon.words(caption))
        if self.drop:
            words = drop_attributes(words, self.drop, rng)
        if rng.random() < self.reorder:
            words = reorder(words, rng)
        if self.synonyms:
            words = [swap(word, tables, self.synonyms, rng) for word in words]
        return "".join(word.text for word in words) or caption


@dataclass(frozen=True)
class Tables:
    """Synonyms by word, templates with their slots, frames of captions."""

    synonyms: dict[str, tuple[str, ...]]
    templates: tuple[tuple[str, frozenset[str]], ...]
    frames: re.Pattern[str]


@cache
def load_tables(folder: Path = PRESETS) -> Tables:
    """The tables beside the presets. Raises ValueError naming the file that is not as it should be."""
    import yaml

    path = folder / "synonyms.yaml"
    groups = yaml.safe_load(path.read_text("utf-8"))
    if not isinstance(groups, list) or not all(isinstance(g, list) and len(g) > 1 for g in groups):
        raise ValueError(f"{path} must be a list of lists of at least two words")
    synonyms = {word: tuple(w for w in group if w != word) for group in groups for word in group}
    said = read_mapping(folder / "templates.yaml")
    templates = tuple((text, _slots(text)) for text in said["templates"])
    frames = "|".join(re.escape(frame) for frame in sorted(said["frames"], key=len, reverse=True))
    return Tables(synonyms, templates, re.compile(rf"{frames}|[\s\uff0c,]"))


def _slots(template: str) -> frozenset[str]:
    return frozenset(name for _, name, _, _ in string.Formatter().parse(template) if name)


def from_template(caption: str, lexicon: Lexicon, tables: Tables, rng: np.random.Generator) -> str:
    """A template with the same attributes, all of them, or the caption where none fits or words would be lost."""
    words = list(lexicon.words(caption))
    rest = "".join(word.text for word in words if not word.kind)
    found = lexicon.attributes(caption)
    if tables.frames.sub("", rest) or any(len(values) > 1 for values in found.values()):
        return caption
    fitting = [text for text, slots in tables.templates if slots == set(found)]
    if not fitting:
        return caption
    template = fitting[rng.integers(len(fitting))]
    return template.format(**{name: values[0] for name, values in found.items()})


def drop_attributes(words: list[Word], share: float, rng: np.random.Generator) -> list[Word]:
    """Leave out attributes that stand before another known word (with the particle between) or alone between spaces.

    Only where a product noun is there to stay. Elsewhere ("the colour is red") the sentence would break.
    """
    if not any(word.kind == NOUN for word in words):
        return words
    kept: list[Word] = []
    skip_link = False
    for index, word in enumerate(words):
        if skip_link and word.text.startswith(_LINK):
            word = Word(word.text.removeprefix(_LINK), "")
        skip_link = False
        if word.kind and word.kind != NOUN and _is_loose(words, index) and rng.random() < share:
            skip_link = True
            continue
        if word.text:
            kept.append(word)
    return _stripped(kept)


def _stripped(words: list[Word]) -> list[Word]:
    """Without the spaces that a dropped piece has left at the ends or doubled."""
    result: list[Word] = []
    for word in words:
        text = word.text.lstrip() if not result or result[-1].text.endswith(" ") else word.text
        if text:
            result.append(Word(text, word.kind))
    if result:
        result[-1] = Word(result[-1].text.rstrip(), result[-1].kind)
    return [word for word in result if word.text]


def _is_loose(words: list[Word], index: int) -> bool:
    after = words[index + 1] if index + 1 < len(words) else None
    before = words[index - 1] if index else None
    if after and after.text == _LINK and index + 2 < len(words):
        return bool(words[index + 2].kind)
    if after and after.kind:
        return True
    starts = before is None or before.text.endswith(" ")
    ends = after is None or after.text.startswith(" ")
    return starts and ends


def reorder(words: list[Word], rng: np.random.Generator) -> list[Word]:
    """Shuffle each run of adjacent attributes, then the pieces between spaces."""
    result: list[Word] = []
    run: list[Word] = []
    for word in [*words, Word("", "")]:
        if word.kind and word.kind != NOUN:
            run.append(word)
            continue
        result += [run[i] for i in rng.permutation(len(run))]
        run = []
        result.append(word)
    pieces = _SPACE.split("".join(word.text for word in result))
    order = rng.permutation(len(pieces[::2]))
    pieces[::2] = [pieces[::2][i] for i in order]
    return list(load_lexicon().words("".join(pieces)))


def swap(word: Word, tables: Tables, share: float, rng: np.random.Generator) -> Word:
    """A synonym of the word, with probability `share`; the word itself where it has none."""
    others = tables.synonyms.get(word.text, ())
    if not others or rng.random() >= share:
        return word
    return Word(others[rng.integers(len(others))], word.kind)


@dataclass(frozen=True)
class ImageAugment:
    """Moves a product within its image; what comes into view continues the background. Called with a rng."""

    shift: float = 0.0
    """Largest shift, as a share of the side, 0 to 0.5."""
    zoom: float = 0.0
    """Largest change of scale either way, 0 to 0.5."""
    rotate: float = 0.0
    """Largest rotation in degrees, 0 to 45."""
    brightness: float = 0.0
    """Largest relative change of brightness, 0 to 0.5; hue and saturation are labels and stay."""

    def __post_init__(self) -> None:
        for name, limit in (("shift", 0.5), ("zoom", 0.5), ("rotate", 45), ("brightness", 0.5)):
            if not 0 <= getattr(self, name) <= limit:
                raise ValueError(
                    f"image augmentation: {name} must be between 0 and {limit}, not {getattr(self, name)}"
                )

    @property
    def is_on(self) -> bool:
        """False if every image comes back as it is."""
        return any((self.shift, self.zoom, self.rotate, self.brightness))

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """An image of the same size (W, H) and mode, RGB or RGBA; alpha (a mask) is moved along, not lit."""
        right, down, turn, scale, light = rng.uniform(-1, 1, 5)
        if self.shift or self.zoom or self.rotate:
            image = _move(
                image, right * self.shift, down * self.shift, turn * self.rotate, 1 + scale * self.zoom
            )
        if self.brightness:
            factor = 1 + light * self.brightness
            lit = [min(255, round(value * factor)) for value in range(256)]
            image = image.point(lit * 3 + list(range(256)) * (image.mode == "RGBA"))
        return image


@dataclass(frozen=True)
class Chain:
    """One augmentation after the other."""

    steps: tuple[Callable[[Image.Image, np.random.Generator], Image.Image], ...]

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        for step in self.steps:
            image = step(image, rng)
        return image


def _move(image: Image.Image, right: float, down: float, degrees: float, scale: float) -> Image.Image:
    """Around the centre; the background is a mirror of the edge, seamless on plain and textured ones alike."""
    width, height = image.size
    pixels = np.pad(np.asarray(image), ((height, height), (width, width), (0, 0)), mode="symmetric")
    angle = np.deg2rad(degrees)
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    x, y = width / 2, height / 2
    shift_x = 1.5 * width - cos * (x + right * width) - sin * (y + down * height)
    shift_y = 1.5 * height + sin * (x + right * width) - cos * (y + down * height)
    matrix = (cos, sin, shift_x, -sin, cos, shift_y)
    bands = [  # one by one: Pillow would multiply the colours by alpha first
        Image.fromarray(band).transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
        for band in np.moveaxis(pixels, 2, 0)
    ]
    return Image.merge(image.mode, bands)


@dataclass(frozen=True)
class ShowConfig:
    """Print captions beside their variants."""

    src: tyro.conf.Positional[Path]
    """Any recognised source."""
    text: TextAugment = field(default_factory=lambda: TextAugment(0.5, 0.5, 0.2, 0.3))
    rows: int = 10
    """Captions to show."""
    epochs: int = 3
    """Variants of each."""
    reader: tyro.conf.OmitArgPrefixes[ReaderOptions] = field(default_factory=ReaderOptions)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command of this module."""
    from data_tools.readers.detect import open_source

    config = parse_options(ShowConfig, argv, description=__doc__)
    shown = 0
    for item in open_source(config.src, config.reader):
        if isinstance(item, Record) and item.captions:
            variants = [config.text(item.captions[0], item.key, epoch) for epoch in range(config.epochs)]
            print(f"{item.captions[0]}  ->  {' | '.join(variants)}")
            shown += 1
        if shown == config.rows:
            break


if __name__ == "__main__":
    main()
