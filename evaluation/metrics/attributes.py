"""Does an image show what its title names: slots of the title, checked three ways.

Slots are the category, the colour, and whatever else the closed word lists of data_tools find in the reference's
captions (material, pattern, audience ...). A scorer of texts and images must prefer the title to the same title with
another word in the slot (hard negatives); the judge's heads must name category and colour; the pixels must have the
colour.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.rules.colors import find_color
from data_tools.rules.lexicon import load_lexicon
from evaluation.judges.goods import GoodsJudge
from evaluation.metrics.pixel_colors import PixelColors
from evaluation.reference import Facts

MOST_NEGATIVES = 24  # other words that a title is tried with
_LISTED = {"color": "colour", "category": "kind"}  # slots of ours that the word lists call otherwise
_NO_SLOT = ("shape", "style", "season")  # words that other words of their class do not exclude


@dataclass(frozen=True)
class Slots:
    """The words of a title by slot: `category`, `color`, and classes of the word lists; a slot has one word at most."""

    words: dict[str, str]
    starts: dict[str, int]
    """Where each word starts."""


@dataclass(frozen=True)
class SlotWords:
    """Words by slot, each slot with at least two, as the reference's captions use them."""

    words: dict[str, tuple[str, ...]]
    meanings: dict[str, frozenset[str]] = field(default_factory=dict)
    """Word for a category -> labels that it may mean."""

    @classmethod
    def of_reference(cls, facts: Sequence[Facts]) -> "SlotWords":
        """From facts and captions; without facts from the captions alone, by the word lists."""
        meanings: dict[str, set[str]] = {}
        for fact in facts:
            for word in {fact.category, fact.word} - {""}:
                meanings.setdefault(word, set()).add(fact.category or word)
        found: dict[str, set[str]] = {"category": set(meanings), "color": {f.color for f in facts if f.color}}
        names = {listed: slot for slot, listed in _LISTED.items()}
        captions = sorted({fact.caption for fact in facts})
        for caption in captions:
            for listed, words in load_lexicon().attributes(_without(caption, found["category"])).items():
                slot = names.get(listed, listed)
                if listed not in _NO_SLOT and not (
                    slot in ("category", "color") and found[slot] and meanings
                ):
                    found.setdefault(slot, set()).update(words)
        words = {slot: tuple(sorted(values)) for slot, values in found.items() if len(values) > 1}
        return cls(words, {word: frozenset(labels) for word, labels in meanings.items()})

    def parse(self, text: str) -> Slots:
        """The longest known word of each slot; the category goes first, so a colour inside its name is no colour."""
        words, starts, rest = {}, {}, text
        for slot in sorted(self.words, key=lambda s: (s != "category", s != "color", s)):
            if slot == "color":
                word, start = find_color(rest, self.words[slot])
            else:
                word = max((w for w in self.words[slot] if w in rest), key=len, default="")
                start = rest.find(word)
            if word:
                words[slot], starts[slot] = word, start
                rest = rest[:start] + "\0" * len(word) + rest[start + len(word) :]
        return Slots(words, starts)

    def negatives(self, text: str, slot: str, parsed: Slots | None = None) -> list[str]:
        """The text with other words in the slot, at most MOST_NEGATIVES, the same ones for the same text.

        A word that contains the right one, is contained in it, or may mean the same category is no negative.
        """
        parsed = parsed or self.parse(text)
        word = parsed.words.get(slot, "")
        if not word:
            return []
        own = self.meanings.get(word, frozenset()) if slot == "category" else frozenset()
        others = [
            other
            for other in self.words[slot]
            if other not in word and word not in other and not own & self.meanings.get(other, frozenset())
        ]
        if len(others) > MOST_NEGATIVES:
            others.sort(key=lambda other: hashlib.sha256(f"{text}\n{other}".encode()).digest())
        start = parsed.starts[slot]
        return [text[:start] + other + text[start + len(word) :] for other in others[:MOST_NEGATIVES]]


def _without(caption: str, words: set[str]) -> str:
    word = max((w for w in words if w in caption), key=len, default="")
    return caption.replace(word, " ", 1) if word else caption


@dataclass(frozen=True)
class SlotHits:
    """1.0 where the image shows the word of the slot, 0.0 where another one, NaN where the text has none."""

    hits: NDArray[np.float64]
    chance: float
    """Mean share of hits of a blind guess."""


def hard_negative_hits(
    ranker: Any, lexicon: SlotWords, slot: str, texts: Sequence[str], images: NDArray
) -> SlotHits | None:
    """Whether the own title scores above every other filling of the slot, by a ranker with text features.

    `images` (N, D): the ranker's unit image features. None where no text has the slot.
    """
    negatives = {text: lexicon.negatives(text, slot) for text in sorted(set(texts))}
    negatives = {text: others for text, others in negatives.items() if others}
    if not negatives:
        return None
    distinct = sorted({text for own, others in negatives.items() for text in (own, *others)})
    index_of = {text: i for i, text in enumerate(distinct)}
    features = ranker.text_features(distinct).numpy()  # (T, D)
    hits = np.full(len(texts), np.nan)
    for i, text in enumerate(texts):
        if text in negatives:
            others = features[[index_of[other] for other in negatives[text]]]
            hits[i] = float(features[index_of[text]] @ images[i] > (others @ images[i]).max())
    return SlotHits(hits, _chance([len(negatives[text]) + 1 for text in texts if text in negatives]))


def judged_categories(
    judge: GoodsJudge, texts: Sequence[str], features: NDArray, top: int = 1
) -> SlotHits | None:
    """Whether one of the judge's `top` first categories is one that the title may mean.

    None where it knows the category of no title.
    """
    meant = [judge.words.categories_meant(text)[2] for text in texts]
    if not any(meant):
        return None
    ranked = judge.top_categories(features, top)
    hits = [float(not set(meant[i]).isdisjoint(ranked[i])) if meant[i] else np.nan for i in range(len(texts))]
    known = len(judge.words.categories)
    return SlotHits(np.array(hits), float(np.mean([_blind(known, len(m), top) for m in meant if m])))


def _blind(known: int, meant: int, top: int) -> float:
    """Chance that `top` different categories of `known`, chosen blindly, hold one of `meant`."""
    if top > known - meant:
        return 1.0
    return 1 - math.comb(known - meant, top) / math.comb(known, top)


def judged_colors(
    judge: GoodsJudge, lexicon: SlotWords, texts: Sequence[str], features: NDArray
) -> SlotHits | None:
    """Whether the judge's first colour is the title's; None where it knows the colour of no title."""
    colors = judge.words.colors
    if not colors:
        return None
    return _named_hits(lexicon, texts, colors, judge.color_probabilities(features))


def pixel_colors(
    measured: PixelColors, lexicon: SlotWords, texts: Sequence[str], histograms: NDArray
) -> SlotHits | None:
    """Whether the pixels have the title's colour; None where no title names a colour that can be measured."""
    return _named_hits(lexicon, texts, measured.colors, measured.votes(histograms))


def _named_hits(
    lexicon: SlotWords, texts: Sequence[str], names: Sequence[str], scores: NDArray
) -> SlotHits | None:
    wanted = [lexicon.parse(text).words.get("color", "") for text in texts]
    known = [word in names for word in wanted]
    if not any(known):
        return None
    best = scores.argmax(1)
    hits = [float(names[best[i]] == word) if known[i] else np.nan for i, word in enumerate(wanted)]
    return SlotHits(np.array(hits), 1 / len(names))


def _chance(choices: Sequence[float]) -> float:
    return float(np.mean([1 / count for count in choices]))
