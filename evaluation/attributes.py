"""Does a picture show what its title names: slots of the title, checked three ways.

Slots are the kind, the colour, and whatever else the closed word lists of data_tools find in the reference's captions
(material, pattern, audience ...). A text-picture scorer must prefer the title to the same title with another word in
the slot (hard negatives); the judge's heads must name the kind and the colour; the pixels must have the colour.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.rules.lexicon import load_lexicon
from evaluation.goods_judge import GoodsJudge
from evaluation.pixel_colors import PixelColors
from evaluation.reference import Facts

MOST_NEGATIVES = 24  # other words that a title is tried with
_LISTED = {"color": "colour"}  # slots of ours that the word lists call otherwise
_NO_SLOT = ("shape", "style", "season")  # words that other words of their class do not exclude


@dataclass(frozen=True)
class Slots:
    """The words of a title by slot: `kind`, `color`, and classes of the word lists; a slot has one word at most."""

    words: dict[str, str]
    places: dict[str, int]
    """Where each word starts."""


@dataclass(frozen=True)
class Lexicon:
    """Words by slot, each slot with at least two, as the reference's captions use them."""

    words: dict[str, tuple[str, ...]]
    meanings: dict[str, frozenset[str]] = field(default_factory=dict)
    """Word for a kind -> labels that it may mean."""

    @classmethod
    def of_reference(cls, facts: Sequence[Facts]) -> "Lexicon":
        """From facts and captions; without facts from the captions alone, by the word lists."""
        meanings: dict[str, set[str]] = {}
        for fact in facts:
            for word in {fact.kind, fact.word} - {""}:
                meanings.setdefault(word, set()).add(fact.kind or word)
        found: dict[str, set[str]] = {"kind": set(meanings), "color": {f.color for f in facts if f.color}}
        names = {listed: slot for slot, listed in _LISTED.items()}
        captions = sorted({fact.caption for fact in facts})
        for caption in captions:
            for listed, words in load_lexicon().attributes(_without(caption, found["kind"])).items():
                slot = names.get(listed, listed)
                if listed not in _NO_SLOT and not (slot in ("kind", "color") and found[slot] and meanings):
                    found.setdefault(slot, set()).update(words)
        words = {slot: tuple(sorted(values)) for slot, values in found.items() if len(values) > 1}
        return cls(words, {word: frozenset(labels) for word, labels in meanings.items()})

    def parse(self, text: str) -> Slots:
        """The longest known word of each slot; the kind goes first, so a colour inside its name is no colour."""
        words, places, rest = {}, {}, text
        for slot in sorted(self.words, key=lambda s: (s != "kind", s != "color", s)):
            word = max((w for w in self.words[slot] if w in rest), key=len, default="")
            if word:
                words[slot], places[slot] = word, rest.index(word)
                rest = rest.replace(word, "\0" * len(word), 1)
        return Slots(words, places)

    def negatives(self, text: str, slot: str, parsed: Slots | None = None) -> list[str]:
        """The text with other words in the slot, at most MOST_NEGATIVES, the same ones for the same text.

        A word that contains the right one, is contained in it, or may mean the same kind is no negative.
        """
        parsed = parsed or self.parse(text)
        word = parsed.words.get(slot, "")
        if not word:
            return []
        own = self.meanings.get(word, frozenset()) if slot == "kind" else frozenset()
        others = [
            other
            for other in self.words[slot]
            if other not in word and word not in other and not own & self.meanings.get(other, frozenset())
        ]
        if len(others) > MOST_NEGATIVES:
            others.sort(key=lambda other: hashlib.sha256(f"{text}\n{other}".encode()).digest())
        start = parsed.places[slot]
        return [text[:start] + other + text[start + len(word) :] for other in others[:MOST_NEGATIVES]]


def _without(caption: str, words: set[str]) -> str:
    word = max((w for w in words if w in caption), key=len, default="")
    return caption.replace(word, " ", 1) if word else caption


@dataclass(frozen=True)
class SlotHits:
    """1.0 where the picture shows the word of the slot, 0.0 where another one, NaN where the text has none."""

    hits: NDArray[np.float64]
    chance: float
    """Mean share of hits of a blind guess."""


def hard_negative_hits(
    ranker: Any, lexicon: Lexicon, slot: str, texts: Sequence[str], images: NDArray
) -> SlotHits | None:
    """Whether the own title scores above every other filling of the slot, by a ranker with text features.

    `images` (N, D): the ranker's unit picture features. None where no text has the slot.
    """
    negatives = {text: lexicon.negatives(text, slot) for text in sorted(set(texts))}
    negatives = {text: others for text, others in negatives.items() if others}
    if not negatives:
        return None
    distinct = sorted({text for own, others in negatives.items() for text in (own, *others)})
    place = {text: i for i, text in enumerate(distinct)}
    features = ranker.text_features(distinct).numpy()  # (T, D)
    hits = np.full(len(texts), np.nan)
    for i, text in enumerate(texts):
        if text in negatives:
            others = features[[place[other] for other in negatives[text]]]
            hits[i] = float(features[place[text]] @ images[i] > (others @ images[i]).max())
    return SlotHits(hits, _chance([len(negatives[text]) + 1 for text in texts if text in negatives]))


def judged_kinds(judge: GoodsJudge, texts: Sequence[str], features: NDArray) -> SlotHits | None:
    """Whether the judge's first kind is one that the title may mean; None where it knows the kind of no title."""
    meant = [judge.words.kinds_meant(text)[2] for text in texts]
    if not any(meant):
        return None
    named = judge.probabilities(features).argmax(1)
    hits = [float(judge.words.kinds[named[i]] in kinds) if kinds else np.nan for i, kinds in enumerate(meant)]
    return SlotHits(
        np.array(hits), _chance([len(judge.words.kinds) / len(kinds) for kinds in meant if kinds])
    )


def judged_colors(
    judge: GoodsJudge, lexicon: Lexicon, texts: Sequence[str], features: NDArray
) -> SlotHits | None:
    """Whether the judge's first colour is the title's; None where it knows the colour of no title."""
    colors = judge.words.colors
    if not colors:
        return None
    return _named_hits(lexicon, texts, colors, judge.color_probabilities(features))


def pixel_colors(
    measured: PixelColors, lexicon: Lexicon, texts: Sequence[str], histograms: NDArray
) -> SlotHits | None:
    """Whether the pixels have the title's colour; None where no title names a colour that can be measured."""
    return _named_hits(lexicon, texts, measured.colors, measured.votes(histograms))


def _named_hits(
    lexicon: Lexicon, texts: Sequence[str], names: Sequence[str], scores: NDArray
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
