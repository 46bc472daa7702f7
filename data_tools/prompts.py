"""Files of prompts for generate.py and diffusion.generate, read one line at a time.

    .txt      a text a line
    .tsv      id<TAB>text, as contests hand out their test texts; further columns are left alone
    .jsonl    {"text": ...} with "key" or "id" where the pictures must be found again by it

Empty lines are left out. Ids are names: they are kept as they stand and end up as `key` in images.jsonl.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from common.log import say

TEXT_NAMES, KEY_NAMES = ("text", "caption"), ("key", "id")


@dataclass(frozen=True)
class Prompt:
    """A text to draw, and its name if it has one."""

    text: str
    key: str | None = None


def read_prompts(path: Path) -> Iterator[Prompt]:
    """The prompts of a UTF-8 file. Raises FileNotFoundError, or ValueError naming the line."""
    if not path.is_file():
        raise FileNotFoundError(f"no prompts file {path}")
    parse = {".jsonl": _from_json, ".tsv": _from_columns}.get(path.suffix.lower(), _plain)
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number} is not valid UTF-8") from error
            if "\0" in line:
                raise ValueError(f"{path}:{number} is no text")
            if line.strip():
                yield parse(line, f"{path}:{number}")


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


def _plain(line: str, where: str) -> Prompt:
    return Prompt(line.strip())


def _from_columns(line: str, where: str) -> Prompt:
    columns = line.split("\t")
    if len(columns) < 2 or not columns[0].strip():
        raise ValueError(f"{where} is not id<TAB>text")
    return Prompt(columns[1].strip(), columns[0].strip())


def _from_json(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON") from error
    row = row if isinstance(row, dict) else {}
    text = next((row[name] for name in TEXT_NAMES if name in row), None)
    key = next((row[name] for name in KEY_NAMES if name in row), None)
    if not isinstance(text, str) or not isinstance(key, str | int | None):
        raise ValueError(f'{where} needs "text", a string, and may have "key" or "id", a name')
    return Prompt(text.strip(), None if key is None else str(key))
