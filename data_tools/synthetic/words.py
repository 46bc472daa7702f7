"""Names and words of the synthetic images: kinds, colours, patterns, backgrounds and Chinese captions."""

from dataclasses import dataclass

import numpy as np

from data_tools.synthetic.rendering import Color


@dataclass(frozen=True)
class Kind:
    """Words for one kind of goods; its shape stands in SHAPES under the same name."""

    nouns: tuple[str, ...]
    """The first is the usual one."""
    counter: str
    """Numeral and measure word."""


KINDS: dict[str, Kind] = {
    "tshirt": Kind(("T恤", "T恤衫"), "一件"),
    "dress": Kind(("连衣裙", "裙子"), "一件"),
    "trousers": Kind(("长裤", "裤子"), "一条"),
    "shoe": Kind(("鞋子", "鞋", "运动鞋"), "一只"),
    "bag": Kind(("包", "手提包", "包包"), "一个"),
    "cup": Kind(("杯子", "马克杯", "水杯"), "一个"),
    "lamp": Kind(("台灯", "灯"), "一盏"),
    "chair": Kind(("椅子",), "一把"),
    "bottle": Kind(("瓶子", "水瓶"), "一个"),
    "hat": Kind(("帽子", "礼帽"), "一顶"),
}
COLORS: dict[str, str] = {
    "red": "红",
    "orange": "橙",
    "yellow": "黄",
    "green": "绿",
    "blue": "蓝",
    "purple": "紫",
    "pink": "粉",
    "brown": "棕",
    "black": "黑",
    "white": "白",
}
COLOR_RGB: dict[str, Color] = {
    "red": (212, 38, 40),
    "orange": (247, 134, 30),
    "yellow": (250, 212, 48),
    "green": (44, 150, 72),
    "blue": (36, 92, 205),
    "purple": (124, 60, 172),
    "pink": (248, 154, 190),
    "brown": (118, 70, 40),
    "black": (44, 44, 49),
    "white": (245, 245, 243),
}
PATTERNS: dict[str, tuple[str, ...]] = {"plain": ("纯色",), "striped": ("条纹",), "dotted": ("圆点", "波点")}
BACKGROUNDS: dict[str, tuple[str, ...]] = {
    "white": ("白色背景", "白底"),
    "grey": ("灰色背景", "灰底"),
    "wood": ("木纹背景", "木板"),
}

# {n} numeral and measure word, {c} colour, {p} pattern or nothing, {k} noun, {g} background. The first is what
# people type first, so it is the most frequent one.
_TEMPLATES = (
    ("{n}{c}色的{p}{k}", 0.34),
    ("{c}色{p}{k}", 0.16),
    ("{n}{c}色{p}{k}", 0.16),
    ("{c}色的{p}{k}", 0.08),
    ("{c}{p}{k}", 0.04),
    ("{k}，{c}色{p}", 0.04),
    ("{g}上的{n}{c}色{p}{k}", 0.07),
    ("{g}上{n}{c}色的{p}{k}", 0.05),
    ("{n}{c}色的{p}{k}，{g}", 0.06),
)


def write_caption(rng: np.random.Generator, kind: str, color: str, pattern: str, background: str) -> str:
    """A Chinese caption: kind and colour, often the pattern, sometimes the background; all it says is true."""
    template = str(rng.choice([t for t, _ in _TEMPLATES], p=[w for _, w in _TEMPLATES]))
    nouns = KINDS[kind].nouns
    noun = nouns[0] if rng.random() < 0.8 else nouns[rng.integers(len(nouns))]
    words = PATTERNS[pattern]
    tell = rng.random() < (0.08 if pattern == "plain" else 0.8)
    pattern_word = words[rng.integers(len(words))] if tell else ""
    background_word = BACKGROUNDS[background][rng.integers(len(BACKGROUNDS[background]))]
    return template.format(n=KINDS[kind].counter, c=COLORS[color], p=pattern_word, k=noun, g=background_word)


def prompt(kind: str, color: str) -> str:
    """The plainest caption of a kind in a colour: what the demo is asked to draw."""
    return f"{KINDS[kind].counter}{COLORS[color]}色的{KINDS[kind].nouns[0]}"
