"""Is a caption fit for training? The first condition that fails names the reason."""

import re
import unicodedata
from typing import NamedTuple

from common.files import read_lines
from data_tools.report.token_count import CountTokens
from data_tools.rules import CaptionRules, keyword_path
from data_tools.rules.titles import TitleNormaliser

CAPTION_REASONS: dict[str, str] = {
    "caption_forbidden": "holds a character that the rules forbid",
    "caption_language": "too few of its letters are Chinese; lower --captions.min-han-share",
    "caption_no_keyword": "holds no word of the keyword file",
    "caption_piece_too_long": "a run-on sentence; raise --captions.max-piece-chars",
    "caption_special_characters": "debris of a web page; --captions.normalise shop removes much of it",
    "caption_too_few_tokens": "lower --captions.min-tokens to keep it",
    "caption_too_long": "raise --captions.max-chars, or try --captions.normalise shop",
    "caption_too_many_tokens": "the trainer would cut it; raise --captions.max-tokens and its max_text_len",
    "caption_too_short": "says too little; lower --captions.min-chars",
    "caption_unknown_tokens": "written in characters that the tokenizer does not know",
}
_MARKUP = re.compile(r"<[A-Za-z/!][^<>]*>|&(?:#\d+|#[xX][0-9A-Fa-f]+|[A-Za-z]{2,8});")


class Verdict(NamedTuple):
    """The caption as it goes on, and why it does not: `reason` "" means kept."""

    caption: str
    reason: str = ""
    detail: str = ""


class CaptionJudge:
    """Applies `CaptionRules`; keyword file and normaliser are loaded once.

    Raises ValueError if the rules count tokens and no tokenizer is given, FileNotFoundError for the keyword file.
    """

    def __init__(self, rules: CaptionRules, count_tokens: CountTokens | None = None):
        if rules.needs_tokenizer and count_tokens is None:
            raise ValueError("the rules count tokens: give --tokenizer, a folder with the tokenizer's files")
        self.rules, self.count_tokens = rules, count_tokens
        self._normalise = TitleNormaliser.default() if rules.normalise == "shop" else None
        self._forbidden = re.compile(rules.forbidden) if rules.forbidden else None
        self._separators = re.compile(rules.piece_separators)
        self._keywords = _read_keywords(rules) if rules.keyword_file else None

    def __call__(self, caption: str) -> Verdict:
        """Judge one caption, normalised first where the rules say so."""
        text = self._normalise(caption) if self._normalise else caption
        for check in (self._length, self._characters, self._content, self._tokens):
            if found := check(text):
                return Verdict(text, *found)
        return Verdict(text)

    def _length(self, text: str) -> tuple[str, str] | None:
        rules = self.rules
        if rules.max_chars and len(text) > rules.max_chars:
            return "caption_too_long", f"{len(text)} characters, at most {rules.max_chars} are kept"
        if len(text) < rules.min_chars:
            return "caption_too_short", f"{len(text)} characters, at least {rules.min_chars} are kept"
        return None

    def _characters(self, text: str) -> tuple[str, str] | None:
        if self.rules.drop_special and (found := special_characters(text)):
            return "caption_special_characters", found
        if self._forbidden and (match := self._forbidden.search(text)):
            return "caption_forbidden", f"holds {match.group()!r}"
        longest = max(map(len, self._separators.split(text)), default=0) if self.rules.max_piece_chars else 0
        if longest > self.rules.max_piece_chars:
            return (
                "caption_piece_too_long",
                f"a piece has {longest} characters, at most {self.rules.max_piece_chars}",
            )
        return None

    def _content(self, text: str) -> tuple[str, str] | None:
        if self._keywords is not None and not self._has_keyword(text):
            return "caption_no_keyword", f"no word of {self.rules.keyword_file}"
        if (share := han_share(text)) < self.rules.min_han_share:
            return (
                "caption_language",
                f"{share:.0%} of the letters are Chinese, at least {self.rules.min_han_share:.0%}",
            )
        return None

    def _has_keyword(self, text: str) -> bool:
        """Any substring of at most `keyword_max_chars` in the vocabulary."""
        longest = self.rules.keyword_max_chars
        for start in range(len(text)):
            for end in range(start + 1, min(start + longest, len(text)) + 1):
                if text[start:end] in self._keywords:
                    return True
        return False

    def _tokens(self, text: str) -> tuple[str, str] | None:
        rules = self.rules
        if not rules.needs_tokenizer:
            return None
        tokens, unknown = self.count_tokens(text)
        if rules.max_tokens and tokens > rules.max_tokens:
            return "caption_too_many_tokens", f"{tokens} tokens, at most {rules.max_tokens} are kept"
        if tokens < rules.min_tokens:
            return "caption_too_few_tokens", f"{tokens} tokens, at least {rules.min_tokens} are kept"
        if unknown > rules.max_unknown_share * max(tokens, 1):
            return "caption_unknown_tokens", f"{unknown} of {tokens} tokens are unknown to the tokenizer"
        return None


def _read_keywords(rules: CaptionRules) -> frozenset[str]:
    path = keyword_path(rules.keyword_file)
    words = {line.strip() for line in read_lines(path)}
    return frozenset(words - set(rules.keyword_exclude) - {""})


def special_characters(text: str) -> str:
    """The markup, control character or run of symbols that marks debris of a web page, or ""."""
    if match := _MARKUP.search(text):
        return f"HTML markup {match.group()!r}"
    run = 0
    for character in text:
        category = unicodedata.category(character)
        if category in ("Cc", "Cf", "Co", "Cs") or character == "\ufffd":
            return f"the control or replacement character U+{ord(character):04X}"
        run = run + 1 if category[0] in "PS" else 0
        if run == 3:
            return f"three symbols in a row, ending in {character!r}"
    return ""


def han_share(text: str) -> float:
    """Chinese characters as a share of letters, 0 to 1; a text without letters has 0."""
    letters = [c for c in text if c.isalpha()]
    return sum(map(is_han, letters)) / len(letters) if letters else 0.0


def is_han(character: str) -> bool:
    """A CJK ideograph of the basic block, extension A or the supplementary planes."""
    code = ord(character)
    return (
        0x4E00 <= code <= 0x9FFF or 0x3400 <= code <= 0x4DBF or 0x20000 <= code <= 0x323AF or code == 0x3007
    )
