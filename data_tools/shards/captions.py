"""Which caption of a sample a model reads: one of its lines, a short one, one said differently, or one of its facts."""

import json
import string
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from common.files import split_lines

Rewrite = Callable[[str, np.random.Generator], str]


@dataclass(frozen=True)
class FactCaptions:
    """Short captions from what a sample's json says: people type "milk" where every caption names a brand."""

    templates: tuple[str, ...] = ()
    """Captions with fields of the json in braces, such as "{label_zh}" or "{color_zh}{item_zh}"; one is drawn of those
    whose fields all say something."""
    share: float = 0.0
    """Share of the draws that take one."""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"the share of fact captions must lie in [0, 1], not {self.share}")
        if bool(self.share) != bool(self.templates):
            raise ValueError("fact captions need templates and a share above 0: give both or neither")
        for template in self.templates:
            if not fields_of(template):
                raise ValueError(f"the fact caption {template!r} has no field of the json in braces")

    def draw(self, data: bytes, rng: np.random.Generator) -> str:
        """From the bytes of the json; "" where no template can be filled."""
        try:
            meta = json.loads(data or b"{}")
        except (json.JSONDecodeError, UnicodeDecodeError):
            return ""
        known = (
            {n: v.strip() for n, v in meta.items() if isinstance(v, str)} if isinstance(meta, dict) else {}
        )
        fit = [t for t in self.templates if all(known.get(name) for name in fields_of(t))]
        return fit[int(rng.integers(len(fit)))].format_map(known) if fit else ""


def fields_of(template: str) -> list[str]:
    """Names in braces. Raises ValueError for braces that do not pair or hold more than a name."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"the fact caption {template!r} is damaged: {error}") from error
    names = [name for _, name, _, _ in parts if name is not None]
    if not all(name.isidentifier() for name in names):
        raise ValueError(
            f"the fact caption {template!r} may hold names of fields in its braces and nothing else"
        )
    return names


@dataclass(frozen=True)
class CaptionChoice:
    """What of a sample's texts is read in training; the default is any of its lines."""

    short_share: float = 0.0
    rewrite: Rewrite | None = None
    facts: FactCaptions | None = None

    @property
    def members(self) -> tuple[str, ...]:
        """Files of a sample that `pick` needs."""
        return ("txt", "json") if self.facts else ("txt",)

    def pick(self, members: Mapping[str, bytes], rng: np.random.Generator | None) -> str:
        """Without `rng` the first line."""
        text = pick_caption(members.get("txt", b""), rng, self.short_share)
        if rng is not None and self.facts and rng.random() < self.facts.share:
            text = self.facts.draw(members.get("json", b""), rng) or text
        return self.rewrite(text, rng) if self.rewrite and rng is not None else text


ANY_LINE = CaptionChoice()


def pick_caption(data: bytes, rng: np.random.Generator | None, short_share: float = 0.0) -> str:
    """One of the lines, drawn by `rng`, or the first; "" when there is none.

    With probability `short_share` it is the shortest: models that only read long descriptions do badly on short ones.
    """
    lines = [line.strip() for line in split_lines(data.decode("utf-8", errors="replace")) if line.strip()]
    if not lines:
        return ""
    if rng is None or len(lines) == 1:
        return lines[0]
    if short_share and rng.random() < short_share:
        return min(lines, key=len)
    return lines[int(rng.integers(len(lines)))]


def hides_caption(key: str, share: float, salt: tuple[int, int]) -> bool:
    """Whether the caption of sample `key` is hidden at this step, so that a model also learns to generate without text
    (Ho and Salimans 2022, classifier-free guidance, algorithm 1); salt: (seed, step).

    A pure function, so it does not depend on how many processes share a batch.
    """
    return share > 0 and uniform(f"{salt[0]}/{salt[1]}/{key}") < share


def uniform(name: str) -> float:
    """[0, 1) from the CRC of the name, scrambled: CRCs of names that differ in one digit lie on a lattice."""
    x = zlib.crc32(name.encode())
    x = (x ^ (x >> 16)) * 0x45D9F3B & 0xFFFFFFFF  # multiply-xorshift finalizer of murmur3's family
    x = (x ^ (x >> 16)) * 0x45D9F3B & 0xFFFFFFFF
    return (x ^ (x >> 16)) / 2**32
