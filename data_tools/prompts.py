"""Files of prompts for generate.py and diffusion.generate, one a row, as readers.formats.texts reads them.

Text a line, CSV or TSV with or without a header, JSONL. Ids are names: they are kept as they stand and end up as `key`
in images.jsonl.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from common.log import say
from data_tools.readers.formats.texts import read_texts


@dataclass(frozen=True)
class Prompt:
    """A text to generate, and its name if it has one."""

    text: str
    key: str | None = None


def read_prompts(path: Path) -> Iterator[Prompt]:
    """The prompts of a UTF-8 file. Raises FileNotFoundError, or ValueError naming the line."""
    if not path.is_file():
        raise FileNotFoundError(f"no prompts file {path}")
    return (Prompt(row.text, row.key) for row in read_texts(path))


def count_prompts(path: Path) -> int:
    """Reads the whole file, so that a bad line is found before anything is generated. Raises as `read_prompts`,
    and ValueError for a key that comes twice: its images could not be told apart."""
    count, keys = 0, set()
    for prompt in read_prompts(path):
        count += 1
        if prompt.key in keys:
            raise ValueError(f"{path}: the id {prompt.key!r} comes twice")
        if prompt.key is not None:
            keys.add(prompt.key)
    return count


@dataclass
class Unused:
    """What a file of prompts lost on the way."""

    reasons: list[str] = field(default_factory=list)
    """Why texts were skipped; the first few."""
    skipped: int = 0
    cut: int = 0

    def report(self, path: Path) -> None:
        for reason in self.reasons:
            say(f"skipped: {reason}")
        if self.skipped:
            say(f"skipped {self.skipped} of the texts in {path}")
        if self.cut:
            say(f"note: {self.cut} of the texts in {path} were too long for the generator and cut")


def usable(prompts: Iterator[Prompt], note: Callable[[str], str], unused: Unused) -> Iterator[Prompt]:
    """Prompts that a generator can read; the others are counted.

    note: what is lost of a text, "" for nothing; raises ValueError for one that cannot be read.
    """
    for prompt in prompts:
        try:
            lost = note(prompt.text)
        except ValueError as error:
            unused.skipped += 1
            unused.reasons += [str(error)] if unused.skipped <= 5 else []
        else:
            unused.cut += bool(lost)
            yield prompt
