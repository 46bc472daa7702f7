"""What is measured of a source for its report: captions, attributes, labels, images; one pass, 130 bytes a sample."""

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from data_tools.images.decode import BadImage, ImageLimits, decode, image_size
from data_tools.images.phash import image_signature
from data_tools.ingest.records import Problem, Record, problem
from data_tools.report.pair_facts import densities, drawing_density, missing_ids, number_of
from data_tools.report.token_count import CountTokens
from data_tools.rules.captions import han_share, special_characters
from data_tools.rules.images import grey256, sharpness, tiling
from data_tools.rules.lexicon import Lexicon
from data_tools.rules.titles import TitleNormaliser

FORMATS = ("jpg", "png", "webp", "gif", "bmp", "tiff", "avif", "heic")
IMAGE = np.dtype(
    [
        ("width", "<u4"),
        ("height", "<u4"),
        ("bytes", "<u4"),
        ("format", "u1"),
        ("mean", "<f4", 3),  # levels 0..255, R G B
        ("background", "<f4", 3),  # median of the outer ring
        ("white", "<f4"),  # share of the outer ring that is white
        ("sharpness", "<f4"),
        ("contrast", "<f4"),
        ("tiling", "<f4"),
        ("phash", "<u8"),
        ("colours", "u1", 48),
        ("white_area", "<f4"),  # share of the whole image that is white
        ("line_density", "<f4"),  # of its line drawing; below 0: pair_facts
    ]
)
WHITE = 240  # levels: a ring pixel with all channels from here on counts as white
RING = 0.06  # of the shorter side
MOST_WORDS = 200_000  # different words that are counted at a time; the rare half is forgotten beyond


@dataclass(frozen=True)
class MeasureImage:
    """Records to measurements as bytes of PICTURE, or to problems; picklable. `tiled`: watermarks, 8 ms each."""

    limits: ImageLimits
    tiled: bool = False

    def __call__(self, records: Sequence[Record]) -> list[bytes | Problem]:
        return [self.one(record) for record in records]

    def one(self, record: Record) -> bytes | Problem:
        try:
            image = decode(record.image, self.limits, near=256)
        except BadImage as error:
            return problem(record.where, record.key, error.reason, error.what)
        found = measure(image, record, self.tiled)
        found["line_density"] = drawing_density(record, self.limits)
        return found.tobytes()


def measure(image: Image.Image, record: Record, tiled: bool) -> np.ndarray:
    """One PICTURE of an RGB image; sizes are those of the file."""
    found = np.zeros((), IMAGE)
    found["width"], found["height"] = image_size(record.image)
    found["bytes"] = len(record.image)
    found["format"] = FORMATS.index(record.suffix)
    image.thumbnail((256, 256), Image.Resampling.BOX)
    pixels = np.asarray(image)  # (H, W, 3)
    ring = ring_pixels(pixels)
    found["mean"], found["background"] = pixels.mean(axis=(0, 1)), np.median(ring, axis=0)
    found["white"] = (ring.min(axis=1) >= WHITE).mean()
    found["white_area"] = (pixels.min(axis=2) >= WHITE).mean()
    grey = grey256(image)
    found["sharpness"], found["contrast"] = sharpness(grey), grey.std()
    found["tiling"] = tiling(grey) if tiled else 0.0
    signature = image_signature(image)
    found["phash"], found["colours"] = signature.phash, np.frombuffer(signature.colours, np.uint8)
    return found


def ring_pixels(pixels: np.ndarray) -> np.ndarray:
    """The outer ring (N, 3) of an image (H, W, 3): the background on which a product stands."""
    edge = max(1, round(min(pixels.shape[:2]) * RING))
    inside = np.zeros(pixels.shape[:2], bool)
    inside[edge:-edge, edge:-edge] = True
    return pixels[~inside]


@dataclass
class Facts:
    """What was found in one split."""

    split: str
    kept: int = 0
    without_image: int = 0
    without_caption: int = 0
    several_captions: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    chars: array = field(default_factory=lambda: array("I"))
    tokens: array = field(default_factory=lambda: array("I"))
    unknown_tokens: int = 0
    captions_with_unknown: int = 0
    han: array = field(default_factory=lambda: array("f"))
    special: int = 0
    """Captions with markup, control characters or runs of symbols."""
    promoted: int = 0
    """Captions with words about the sale."""
    repeats: Counter[int] = field(default_factory=Counter)
    """Captions by hash."""
    words: Counter[str] = field(default_factory=Counter)
    attributes: dict[str, Counter[str]] = field(default_factory=dict)
    named: Counter[str] = field(default_factory=Counter)
    """Captions that name an attribute, by class."""
    fields: dict[str, Counter[str]] = field(default_factory=dict)
    ids: array = field(default_factory=lambda: array("q"))
    """The number that each id ends in, -1 for none."""
    rows: array = field(default_factory=lambda: array("Q"))
    """Row of each measured image in its split, from 0."""
    raw: bytearray = field(default_factory=bytearray)

    @property
    def images(self) -> np.ndarray:
        """All measurements (N,) of dtype PICTURE."""
        return np.frombuffer(bytes(self.raw), IMAGE)

    def add_image(self, row: int, measured: bytes) -> None:
        """What MeasureImage found."""
        self.rows.append(row)
        self.raw += measured

    def add_record(
        self, record: Record, lexicon: Lexicon, counter: CountTokens | None, names: Sequence[str]
    ) -> None:
        """Count a record's captions and the fields `names` of its meta."""
        self.kept += 1
        self.ids.append(number_of(record))
        self.without_image += not record.image
        self.without_caption += not record.captions
        self.several_captions += len(record.captions) > 1
        for caption in record.captions[:1]:
            self._add_caption(caption, lexicon, counter)
        for name in names:
            value = record.meta.get(name)
            if value is not None and not isinstance(value, (dict, list)):
                self.fields.setdefault(name, Counter())[str(value)] += 1

    def _add_caption(self, caption: str, lexicon: Lexicon, counter: CountTokens | None) -> None:
        self.chars.append(len(caption))
        self.han.append(han_share(caption))
        self.special += bool(special_characters(caption))
        self.promoted += TitleNormaliser.default().has_promotion(caption)
        self.repeats[hash(caption)] += 1
        if counter:
            tokens, unknown = counter(caption)
            self.tokens.append(tokens)
            self.unknown_tokens += unknown
            self.captions_with_unknown += unknown > 0
        for word in set(words_of(caption, lexicon)):
            self.words[word] += 1
        for kind, found in lexicon.attributes(caption).items():
            self.named[kind] += 1
            self.attributes.setdefault(kind, Counter()).update(found)
        if len(self.words) > MOST_WORDS:
            self.words = Counter(dict(self.words.most_common(MOST_WORDS // 2)))

    @property
    def repeated_captions(self) -> int:
        """Samples whose caption another sample has too."""
        return sum(count for count in self.repeats.values() if count > 1)

    def numbers(self) -> dict[str, Any]:
        """The counts, JSON-ready."""
        images = self.images
        captions = max(len(self.chars), 1)
        return {
            "kept": self.kept,
            "dropped": dict(self.reasons),
            "without_picture": self.without_image,
            "without_caption": self.without_caption,
            "several_captions": self.several_captions,
            "repeated_captions": self.repeated_captions,
            "caption_chars": spread(self.chars),
            "caption_tokens": spread(self.tokens),
            "unknown_token_share": self.unknown_tokens / max(sum(self.tokens), 1),
            "attribute_unnamed_share": {kind: 1 - self.named[kind] / captions for kind in sorted(self.named)},
            "shorter_side": spread(np.minimum(images["width"], images["height"])),
            "aspect": spread(aspects(images)),
            "mean_rgb": [round(float(v) / 255, 4) for v in images["mean"].mean(0)] if len(images) else None,
            "ground_rgb": [round(float(v) / 255, 4) for v in images["background"].mean(0)]
            if len(images)
            else None,
            "white_grounds": int((images["white"] >= 0.9).sum()),
            "pictures": len(images),
            "white_area": spread(images["white_area"]),
            "ids": missing_ids(self.ids),
            "drawings": self._drawings(),
        }

    def _drawings(self) -> dict[str, Any] | None:
        """Of line drawings beside the images; None where there are none."""
        found, unreadable = densities(self.images["line_density"])
        if not found and not unreadable:
            return None
        return {"count": len(found), "unreadable": unreadable, "line_density": spread(found)}


def words_of(caption: str, lexicon: Lexicon) -> list[str]:
    """Known words, and the runs of letters between them where these are short enough to be words."""
    found: list[str] = []
    for word in lexicon.words(caption):
        if word.kind:
            found.append(word.text)
            continue
        run = ""
        for character in [*word.text, " "]:
            if character.isalnum():
                run += character
            else:
                found += [run] if 1 < len(run) <= 8 else []
                run = ""
    return found


def aspects(images: np.ndarray) -> np.ndarray:
    """Width over height (N,)."""
    return images["width"] / np.maximum(images["height"], 1)


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Smallest, quartiles, 99th percentile and largest; None for none."""
    if not len(values):
        return None
    names, marks = ("min", "p25", "median", "p75", "p99", "max"), (0, 25, 50, 75, 99, 100)
    found = np.percentile(np.asarray(values), marks)
    return {name: round(float(value), 4) for name, value in zip(names, found, strict=True)}
