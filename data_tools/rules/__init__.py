"""What a caption and an image must be to be kept, and the presets: `wukong`, `wukong_food`, `shop`, or a file."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from common.config import from_mapping, read_mapping

PRESETS = Path(__file__).parent
Flag = Literal["blurred", "near_constant", "watermark"]


@dataclass(frozen=True)
class CaptionRules:
    """Conditions on each caption; 0, "" and false switch one off."""

    normalise: Literal["none", "shop"] = "none"
    """shop: take sale words, decoration and repeats out of the title before it is judged (`rules/titles.py`)."""
    min_chars: int = 0
    """Shortest caption, in characters."""
    max_chars: int = 0
    """Longest caption, in characters."""
    drop_special: bool = False
    """Drop captions with HTML tags or entities, control or replacement characters, or runs of three symbols."""
    forbidden: str = ""
    """Regular expression; a caption in which it is found is dropped."""
    max_piece_chars: int = 0
    """Longest piece between separators, in characters: keeps run-on sentences out."""
    piece_separators: str = r"[;,\s]"
    """Regular expression that separates pieces."""
    keyword_file: str = ""
    """One word a line, UTF-8; captions without any of them are dropped. Beside the preset, or a path."""
    keyword_max_chars: int = 6
    """Longer words of the file are not looked for."""
    keyword_exclude: tuple[str, ...] = ()
    """Words of the file that do not count."""
    min_han_share: float = 0.0
    """Smallest share of Chinese characters among the letters, 0 to 1."""
    min_tokens: int = 0
    """Fewest tokens; needs a tokenizer."""
    max_tokens: int = 0
    """Most tokens; needs a tokenizer."""
    max_unknown_share: float = 1.0
    """Largest share of unknown tokens, 0 to 1; below 1 it needs a tokenizer."""

    def __post_init__(self) -> None:
        for name in ("min_han_share", "max_unknown_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"captions.{name} must be between 0 and 1, not {getattr(self, name)}")
        for name in ("min_chars", "max_chars", "max_piece_chars", "min_tokens", "max_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"captions.{name} must be 0 or more, not {getattr(self, name)}")
        for name in ("forbidden", "piece_separators"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise ValueError(f"captions.{name} is not a regular expression: {error}") from error

    @property
    def needs_tokenizer(self) -> bool:
        """True if a condition counts tokens."""
        return bool(self.min_tokens or self.max_tokens or self.max_unknown_share < 1)


@dataclass(frozen=True)
class ImageRules:
    """Conditions on the image; 0 switches one off. Flags are measured on at most 256 pixels."""

    min_side: int = 0
    """Smallest shorter side, in pixels."""
    max_aspect: float = 0.0
    """Largest ratio of longer to shorter side."""
    aspect_thumbnail: int = 0
    """Measure the aspect after shrinking into a square of this side, rounding included, as the food recipe does."""
    drop_duplicates: bool = False
    """Drop an image with the same bytes as one kept before; near duplicates are the work of data_tools.dedup."""
    min_sharpness: float = 0.0
    """Flag `blurred` under this edge sharpness; 0.12 finds four-fold enlargements (see `rules/images.py`)."""
    min_contrast: float = 0.0
    """Flag `near_constant` under this standard deviation of brightness, in levels of 255."""
    max_tiling: float = 0.0
    """Flag `watermark` above this strength of a repeated overlay; 0.06 finds tiled text."""
    drop_flags: tuple[Flag, ...] = ()
    """Flags that drop the image; the others are written into its metadata."""

    def __post_init__(self) -> None:
        for name in (
            "min_side",
            "max_aspect",
            "aspect_thumbnail",
            "min_sharpness",
            "min_contrast",
            "max_tiling",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"images.{name} must be 0 or more, not {getattr(self, name)}")


@dataclass(frozen=True)
class Rules:
    """Both."""

    EARLIER_NAMES: ClassVar = {"pictures": "images"}
    captions: CaptionRules = field(default_factory=CaptionRules)
    """Conditions on captions."""
    images: ImageRules = field(default_factory=ImageRules)
    """Conditions on images."""


def rules_path(name: str) -> Path:
    """The file of a preset (`wukong`, `wukong-food`, `shop`) or of a path ending in .yaml or .json.

    Raises FileNotFoundError naming the presets.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml", ".json"):
        path = PRESETS / f"{name.replace('-', '_')}.yaml"
    if not path.is_file() or path.name in ("lexicon.yaml", "promotions.yaml", "synonyms.yaml"):
        raise FileNotFoundError(
            f"no rules {name!r}: choose shop, wukong or wukong-food, or give a .yaml file"
        )
    return path


def load_rules(name: str) -> Rules:
    """The rules of a preset or file. Raises FileNotFoundError, or ValueError naming an unknown option."""
    path = rules_path(name)
    return from_mapping(Rules, read_mapping(path), where=str(path))


def keyword_path(name: str) -> Path:
    """A keyword file as given, or beside the presets. Raises FileNotFoundError."""
    for path in (Path(name), PRESETS / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"no keyword file {name}: one word a line, UTF-8")
