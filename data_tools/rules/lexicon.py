"""Words of product titles by class (colour, material, kind, ...), found by longest match.

A segmenter is not needed for this: the classes are closed lists, and what they miss is reported as unknown.
"""

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from common.config import read_mapping
from data_tools.rules.colors import color_pattern

LEXICON = Path(__file__).with_name("lexicon.yaml")


class Word(NamedTuple):
    """A piece of a title; `kind` is a class of the lexicon, or "" for text between known words."""

    text: str
    kind: str


class Lexicon:
    """Closed word lists by class. A word in several classes counts for the first that lists it."""

    def __init__(self, classes: dict[str, list[str]]):
        self.classes = {name: tuple(str(word) for word in words) for name, words in classes.items()}
        self.kind_of: dict[str, str] = {}
        for name, words in self.classes.items():
            for word in words:
                self.kind_of.setdefault(word, name)
        longest_first = sorted(self.kind_of, key=len, reverse=True)
        self._known = re.compile("|".join(map(self._pattern, longest_first)) or r"(?!)")

    def _pattern(self, word: str) -> str:
        return color_pattern(word) if self.kind_of[word] == "colour" else re.escape(word)

    def words(self, title: str) -> Iterator[Word]:
        """The title cut into known words and the text between; joined they are the title again."""
        end = 0
        for match in self._known.finditer(title):
            if match.start() > end:
                yield Word(title[end : match.start()], "")
            yield Word(match.group(), self.kind_of[match.group()])
            end = match.end()
        if end < len(title):
            yield Word(title[end:], "")

    def attributes(self, title: str) -> dict[str, list[str]]:
        """Known words of the title by class, in their order, each once."""
        found: dict[str, list[str]] = {}
        for word in self.words(title):
            if word.kind and word.text not in found.setdefault(word.kind, []):
                found[word.kind].append(word.text)
        return found


@functools.cache
def load_lexicon(path: Path = LEXICON) -> Lexicon:
    """A YAML or JSON file of class: [words]. Raises ValueError naming the file."""
    classes = read_mapping(path)
    for name, words in classes.items():
        if not isinstance(words, list) or not words:
            raise ValueError(f"{path}: {name} must be a list of words")
    return Lexicon(classes)
