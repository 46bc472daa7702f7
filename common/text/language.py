"""Reports and pages in Chinese or English. English is the key: what chinese.json does not hold stays as it is.

chinese.json has a table for each page. A key may hold fields, `{count} samples`, which the caller fills; `sentence`
finds the key of a text whose fields are filled already, as findings of the doctor are.
"""

import functools
import locale
import os
import re
from pathlib import Path
from typing import Literal

from common.files import read_json

Language = Literal["auto", "zh", "en"]
CHINESE = Path(__file__).parent / "chinese.json"


class Words:
    """`words("{count} samples", count=3)`: the text of a page in its language."""

    def __init__(self, table: dict[str, str], tag: str) -> None:
        self.table = table
        self.tag = tag
        """Of <html lang>: zh or en."""

    def __call__(self, text: str, **values: object) -> str:
        found = self.table.get(text, text)
        return found.format(**values) if values else found

    def sentence(self, text: str) -> str:
        """Of a text with its values in it; unknown sentences stay."""
        if text in self.table:
            return self.table[text]
        for pattern, chinese in _patterns(tuple(self.table.items())):
            if found := pattern.fullmatch(text):
                return chinese.format(**found.groupdict())
        return text


@functools.cache
def _patterns(items: tuple[tuple[str, str], ...]) -> list[tuple[re.Pattern, str]]:
    """Keys with fields, the longest first."""
    keyed = sorted((pair for pair in items if "{" in pair[0]), key=lambda pair: -len(pair[0]))
    return [(re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+?)", re.escape(k)), re.S), v) for k, v in keyed]


def words_of(language: Language, page: str) -> Words:
    """The words of one page, a table of chinese.json; auto follows the locale."""
    tag = ("zh" if is_chinese_locale() else "en") if language == "auto" else language
    return Words(read_json(CHINESE)[page] if tag == "zh" else {}, tag)


def is_chinese_locale() -> bool:
    """By the environment as gettext reads it, else the system's own setting."""
    names = ("LC_ALL", "LC_MESSAGES", "LANG")
    name = next((os.environ[n] for n in names if os.environ.get(n)), "") or locale.getlocale()[0] or ""
    return name.lower().startswith(("zh", "chinese"))
