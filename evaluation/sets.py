"""Sets of generated images as every measure reads them: an out directory of generate.py, or any folder of images.

Images stay on disk and are opened when they are looked at, so that a set may hold tens of thousands.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from common.files import read_lines
from common.outputs.image_list import LIST, SETTINGS, read_ranking
from data_tools.images.decode import SUFFIXES, BadImage, decode
from rankers.outdir import Row, read_out_directory

LIKELIHOOD = "likelihood"
_NO_SAMPLE = re.compile(r"(grid|ranked|rank\d+(_text\d+)?)\.png")  # what our scripts write beside the samples


@dataclass(frozen=True)
class Sample:
    """One generated image and how it came about."""

    text: str
    """What was asked for."""
    path: Path
    seed: int | None = None
    """None where it was not recorded."""
    index: int = 0
    """Image `index` of the seed; the place among those of its text in a plain folder."""
    seconds: float | None = None
    """What generating it took; None where it was not recorded."""
    options: dict[str, Any] = field(default_factory=dict)
    """Sampling options."""
    scores: dict[str, float] = field(default_factory=dict)
    """By scorer, higher is better; `likelihood` is log p(image | text) - log p(image | no text), in nats."""

    @property
    def image(self) -> Image.Image:
        """The image, RGB, read anew each time. Raises ValueError when it cannot be decoded."""
        try:
            return decode(self.path.read_bytes())
        except BadImage as error:
            raise ValueError(f"{self.path} is no readable image: {error}") from error


@dataclass(frozen=True)
class SampleSet:
    """Images of one pipeline under one setting."""

    name: str
    samples: tuple[Sample, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    """What all of them share: seed, sampling, checkpoint ..., `ranking` where rerank.py ran, and, for a part that
    was chosen by a scorer, `rerank_width` and `reranker`."""
    corrupt: tuple[str, ...] = ()
    """Images that could not be read and were left out, each with the reason."""

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError(f"the set {self.name} holds no images")

    def __len__(self) -> int:
        return len(self.samples)

    @classmethod
    def from_out_dir(cls, path: Path, name: str = "", text: str = "") -> "SampleSet":
        """What generate.py wrote; without images.jsonl a folder of images, each with its text in a .txt of its
        name, or all with `text`.

        Corrupt images are left out and counted. Raises FileNotFoundError or ValueError when nothing is there.
        """
        path = Path(path)
        if not path.is_dir():
            raise FileNotFoundError(f"no directory of images {path}")
        listed = (path / LIST).is_file()
        samples, settings = _listed(path) if listed else _plain(path, text)
        readable, corrupt = [], []
        for sample in samples:
            reason = _damage(sample.path)
            corrupt += [f"{sample.path}: {reason}"] if reason else []
            readable += [] if reason else [sample]
        if not readable:
            raise ValueError(f"none of the {len(corrupt)} images in {path} can be read: {corrupt[0]}")
        return cls(name or path.name, tuple(readable), settings, tuple(corrupt))

    @property
    def texts(self) -> list[str]:
        """Distinct texts in the order of the set."""
        return list(self.by_prompt())

    def by_prompt(self) -> dict[str, list[Sample]]:
        """Samples of every text, by index."""
        groups: dict[str, list[Sample]] = {}
        for sample in self.samples:
            groups.setdefault(sample.text, []).append(sample)
        return {text: sorted(group, key=lambda s: (s.index, s.seed or 0)) for text, group in groups.items()}

    def best_of(self, n: int, scorer: str = LIKELIHOOD) -> "SampleSet":
        """One sample a text: the one of the first `n` that `scorer` likes best, the earlier of equals.

        Raises ValueError when a text has fewer than `n`, or a sample no such score; n = 1 needs none.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, not {n}")
        chosen = []
        for text, group in self.by_prompt().items():
            if len(group) < n:
                raise ValueError(f"best of {n} needs {n} images of every text: {text!r} has {len(group)}")
            missing = [s.path for s in group[:n] if scorer not in s.scores]
            if missing and n > 1:
                known = ", ".join(sorted(group[0].scores)) or "none"
                raise ValueError(f"{missing[0]} has no score {scorer!r} (its scores: {known})")
            chosen.append(group[0] if n == 1 else max(group[:n], key=lambda s: s.scores[scorer]))
        how = {"rerank_width": n, "reranker": scorer if n > 1 else None}
        name = f"{self.name}, best of {n}" if n > 1 else f"{self.name}, one each"
        return replace(self, name=name, samples=tuple(chosen), settings=self.settings | how)

    def first(self, n: int) -> "SampleSet":
        """The first `n` samples of every text, by index."""
        return replace(self, samples=tuple(s for group in self.by_prompt().values() for s in group[:n]))

    def only(self, texts: Iterable[str]) -> "SampleSet":
        """The samples of these texts."""
        wanted = set(texts)
        return replace(self, samples=tuple(s for s in self.samples if s.text in wanted))

    def with_scores(self, scorer: str, scores: Sequence[float]) -> "SampleSet":
        """The same samples, each with one more score, in the order of `samples`."""
        pairs = zip(self.samples, scores, strict=True)
        return replace(
            self, samples=tuple(replace(s, scores={**s.scores, scorer: float(v)}) for s, v in pairs)
        )

    def scored(self, scorer: str, score: Callable[[str, list[Image.Image]], Any]) -> "SampleSet":
        """`with_scores` of a ranker's `score(text, images)`."""
        values: dict[Path, float] = {}
        for text, group in self.by_prompt().items():
            found = score(text, [sample.image for sample in group])
            values |= {sample.path: float(v) for sample, v in zip(group, found, strict=True)}
        return self.with_scores(scorer, [values[sample.path] for sample in self.samples])


def _damage(path: Path) -> str:
    """Why the image cannot be read, or ""."""
    try:
        decode(path.read_bytes())
    except BadImage as error:
        return str(error)
    return ""


# --- what generate.py and rerank.py wrote --------------------------------------------------------------------------


def _listed(path: Path) -> tuple[list[Sample], dict[str, Any]]:
    rows = read_out_directory(path)
    ranking = read_ranking(path)
    settings = _common(rows)
    if ranking:
        settings["ranking"] = {name: value for name, value in ranking.items() if name != "texts"}
    ranks = {p["file"]: float(p["score"]) for t in ranking.get("texts", ()) for p in t["pictures"]}
    samples = []
    for row in rows:
        scores = {}
        if row.log_likelihood is not None:
            scores[LIKELIHOOD] = row.log_likelihood - (row.null_log_likelihood or 0.0)
        if row.file in ranks:
            scores[str(ranking["ranker"])] = ranks[row.file]
        values = row.values
        samples.append(
            Sample(
                row.text,
                path / row.file,
                values.get("seed"),
                int(values.get("index", 0)),
                values.get("seconds"),
                values.get("sampling") or {},
                scores,
            )
        )
    return samples, settings


def _common(rows: Sequence[Row]) -> dict[str, Any]:
    """Settings; one that differs between the images becomes {"several": [...]}."""
    settings: dict[str, Any] = {}
    for name in SETTINGS:
        found = {json.dumps(row.values.get(name), sort_keys=True): row.values.get(name) for row in rows}
        values = list(found.values())
        settings[name] = values[0] if len(values) == 1 else {"several": values}
    return {name: value for name, value in settings.items() if value not in (None, "")}


# --- any folder ----------------------------------------------------------------------------------------------------


def _plain(path: Path, text: str) -> tuple[list[Sample], dict[str, Any]]:
    files = [
        file
        for file in sorted(path.iterdir())
        if file.suffix.lower().lstrip(".") in SUFFIXES
        and not file.name.startswith(".")
        and not _NO_SAMPLE.fullmatch(file.name)
    ]
    if not files:
        raise ValueError(f"{path} holds no images and no {LIST}: python generate.py TEXT N {path} makes some")
    samples, counts = [], {}
    for file in files:
        caption = _caption(file) or text
        if not caption:
            raise ValueError(
                f"nobody knows what {file} was to show: put the text into {file.stem}.txt beside it, or give one "
                "for all of them with --text"
            )
        counts[caption] = counts.get(caption, 0) + 1
        samples.append(Sample(caption, file, index=counts[caption] - 1))
    return samples, {}


def _caption(file: Path) -> str:
    beside = file.with_suffix(".txt")
    if not beside.is_file():
        return ""
    return next((line.strip() for line in read_lines(beside) if line.strip()), "")
