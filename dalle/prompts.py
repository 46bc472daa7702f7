"""Files of prompts for generate.py, one a row, read as `data_tools.readers.texts` reads texts.

Text a line, CSV or TSV with or without a header, JSONL. Ids are names: they are kept as they stand and end up as `key`
in images.jsonl.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_tools.readers.texts import read_texts


@dataclass(frozen=True)
class Prompt:
    """A text to draw, and its name if it has one."""

    text: str
    key: str | None = None


def read_prompts(path: Path) -> Iterator[Prompt]:
    """The prompts of a UTF-8 file. Raises FileNotFoundError, or ValueError naming the line."""
    return (Prompt(row.text, row.key) for row in read_texts(path))


def count_prompts(path: Path) -> int:
    """Reads the whole file, so that a bad line is found before anything is drawn. Raises as `read_prompts`,
    and ValueError for a key that comes twice: its pictures could not be told apart."""
    count, keys = 0, set()
    for prompt in read_prompts(path):
        count += 1
        if prompt.key in keys:
            raise ValueError(f"{path}: the id {prompt.key!r} comes twice")
        if prompt.key is not None:
            keys.add(prompt.key)
    return count
