"""Colours that a title names of its goods: not those of the background ("石榴产品图，白色背景" names none)."""

import re
from collections.abc import Sequence


def color_pattern(color: str) -> str:
    """A regular expression that finds the colour where it is not a background's."""
    return rf"(?<!背景)(?<!背景为)(?<!背景是)(?<!背景色){re.escape(color)}(?!的?(?:纯色)?背景)"


def find_color(text: str, colors: Sequence[str]) -> tuple[str, int]:
    """The longest of `colors` that the text names of its goods, and where it first does so; ("", -1) without one.

    Of equally long ones the first in `colors`.
    """
    for color in sorted(filter(None, colors), key=len, reverse=True):
        if found := re.search(color_pattern(color), text):
            return color, found.start()
    return "", -1


def with_color(text: str, color: str, other: str) -> str:
    """The text with `other` in the place of the colour of its goods; as it is where it does not name that colour."""
    at = find_color(text, [color])[1]
    return text if at < 0 else text[:at] + other + text[at + len(color) :]
