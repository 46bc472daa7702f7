"""Shop titles to captions: what describes the sale goes, what describes the product stays.

Titles are keyword soup; filters of at most 32 characters throw most of them away, and a model trained on the raw ones
spends its text capacity on free shipping. Colours, materials, measures (500ml, 3XL, 25cm, 10 pieces) are never touched.
"""

import functools
import re
from pathlib import Path

from common.config import read_mapping
from data_tools.rules.lexicon import Lexicon, load_lexicon

PROMOTIONS = Path(__file__).with_name("promotions.yaml")
# Full-width letters, digits and signs (U+FF01-FF5E) and the ideographic space to their plain forms; not the whole of
# NFKC, which would also turn a squared metre into "m2" and a circled one into "1".
_PLAIN = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " ", 0xA0: " "}
_INVISIBLE = re.compile(
    "[\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufffd\x00-\x08\x0b-\x1f\x7f-\x9f\ue000-\uf8ff]"
)
_BRACKETS = re.compile(r"[\[\]{}\u3010\u3011\u300a\u300b\u300c\u300d\u3014\u3015\u201c\u201d\"]")
_EMPTY_PARENTHESES = re.compile(r"\(\s*\)")
_DECORATION = re.compile(
    r"(?<!\d)#|[!?~@$^|\\<>=_`\u2190-\u21ff\u2500-\u27bf\u2b00-\u2bff\u3002\U0001f000-\U0001faff]+"
)
_REPEATED_SIGNS = re.compile(r"\s*([,;:/\-+*&\u3001])(?:\s*[,;:/\-+*&\u3001])+")
_LOOSE_ENDS = " ,;:/-+*&.\u3001\u00b7"
_PIECES = re.compile(r"([\s,;/\u3001]+)")
_REPEATED_RUN = re.compile(r"([\u3400-\u9fff]{2,}?)\1+")  # not Latin: brands such as "coco" repeat themselves


class TitleNormaliser:
    """A title without its sale; idempotent.

    `promotions`: words and regular expressions to take out; `lexicon`: its words are never cut into by a promotion
    word, and a product noun that comes twice is kept once.
    """

    def __init__(self, words: list[str], patterns: list[str], lexicon: Lexicon):
        self.lexicon = lexicon
        longest_first = sorted(map(str, words), key=len, reverse=True)
        self._words = re.compile("|".join(map(re.escape, longest_first)))
        self._patterns = re.compile("|".join(f"(?:{p})" for p in patterns))

    @classmethod
    @functools.cache
    def default(cls) -> "TitleNormaliser":
        """With `promotions.yaml` and `lexicon.yaml` of this folder."""
        promotions = read_mapping(PROMOTIONS)
        return cls(promotions["words"], promotions["patterns"], load_lexicon())

    def __call__(self, title: str) -> str:
        """The normalised title, possibly empty."""
        for _ in range(8):  # taking a word out can bring the halves of another together
            before = title
            title = self._once(title)
            if title == before:
                break
        return title

    def has_promotion(self, title: str) -> bool:
        """True if words about the sale would be taken out."""
        text = title.translate(_PLAIN)
        return bool(self._patterns.search(text)) or self._drop_promotions(text) != text

    def _once(self, title: str) -> str:
        text = _INVISIBLE.sub("", title.translate(_PLAIN))
        text = self._patterns.sub(" ", text)
        text = self._drop_promotions(text)
        text = _BRACKETS.sub(" ", text)
        text = _DECORATION.sub(" ", text)
        text = _EMPTY_PARENTHESES.sub(" ", text)
        text = _REPEATED_SIGNS.sub(r"\1", text)
        text = _REPEATED_RUN.sub(r"\1", text)
        text = self._once_each(text)
        text = self._nouns_once(text)
        return " ".join(text.split()).strip(_LOOSE_ENDS)

    def _drop_promotions(self, text: str) -> str:
        """Promotion words go, except where they touch a word of the lexicon."""
        covered = [False] * len(text)
        end = 0
        for word in self.lexicon.words(text):
            if word.kind:
                covered[end : end + len(word.text)] = [True] * len(word.text)
            end += len(word.text)

        def replace(match: re.Match[str]) -> str:
            return match.group() if any(covered[match.start() : match.end()]) else " "

        return self._words.sub(replace, text)

    @staticmethod
    def _once_each(text: str) -> str:
        """Repeated pieces between spaces and commas are dropped, with the separator before them."""
        parts = _PIECES.split(text)
        kept, seen = [parts[0]], {parts[0]}
        for separator, piece in zip(parts[1::2], parts[2::2], strict=True):
            if not piece or piece not in seen:
                kept += [separator, piece]
                seen.add(piece)
        return "".join(kept)

    def _nouns_once(self, text: str) -> str:
        """The product noun of two characters or more is said once; a colour may come twice (black top, black belt)."""
        kept, seen = [], set()
        for word in self.lexicon.words(text):
            if word.kind == "kind" and len(word.text) > 1:
                if word.text in seen:
                    continue
                seen.add(word.text)
            kept.append(word.text)
        return "".join(kept)
