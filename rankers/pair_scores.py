"""How well each caption fits its image, by a ranker: the file that `data_tools.clean --scores` filters by.

    python -m rankers.pair_scores runs/ranker data/raw scores.jsonl
    python -m data_tools.clean data/raw data/clean --rules shop --scores scores.jsonl --min-score 0.2

One line a sample with an image and a caption: {"key": ..., "score": ...}, of its first caption. Where to cut depends
on the ranker: look at the quartiles that are printed, and at pairs on both sides. Chinese-CLIP ViT-B/16 has been used
with cosines over 0.475 on Wukong. The same command goes on where it was stopped.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image

from common.config import command, parse_options
from common.console.progress import progress
from common.lock import locked
from common.log import say
from data_tools.images.decode import BadImage, decode
from data_tools.ingest.records import Record
from data_tools.readers.base import Meter, ReaderOptions
from data_tools.readers.detect import open_source
from rankers import load_ranker
from rankers.base import TwoTowerRanker


@dataclass(frozen=True)
class Options:
    """Score the pairs of a source."""

    ranker: tyro.conf.Positional[str]
    """Any ranker that scores single images: a checkpoint, a Chinese-CLIP, clip:NAME ..."""
    src: tyro.conf.Positional[Path]
    """File or folder in any recognised format, with images."""
    out: tyro.conf.Positional[Path]
    """File to write, or to go on with."""
    batch_size: int = 64
    """Pairs of one pass."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    reader: tyro.conf.OmitArgPrefixes[ReaderOptions] = field(default_factory=ReaderOptions)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, not {self.batch_size}")


def score_pairs(ranker: Any, texts: Sequence[str], images: Sequence[Image.Image]) -> list[float]:
    """The score of each text with its own image."""
    if isinstance(ranker, TwoTowerRanker):
        together = ranker.text_features(texts) * ranker.image_features(images)  # (B, D)
        return together.sum(1).tolist()
    return [float(ranker.score(text, [image])[0]) for text, image in zip(texts, images, strict=True)]


def read_whole_lines(path: Path) -> dict[str, float]:
    """What an earlier run has written; a torn last line is cut off. Raises ValueError for a file of another kind."""
    if not path.is_file():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    try:
        rows = [json.loads(line) for line in whole.split(b"\n")[:-1]]
        scores = {row["key"]: float(row["score"]) for row in rows}
        if data and not rows and not data.startswith(b"{"):
            raise ValueError("a line that no killed run left")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of scores: name a new one") from error
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return scores


def _batches(options: Options, known: dict[str, float]) -> Iterator[list[tuple[str, str, Image.Image]]]:
    """(key, caption, image) of samples that are not known yet; what cannot be read is clean's to report."""
    source, meter, rows = open_source(options.src, options.reader), Meter(), []
    meter.total = source.num_bytes
    with progress(unit="B", unit_scale=True, desc="scoring") as bar:
        for part in source.parts:
            for item in source.read(part, meter):
                bar.total = meter.total
                bar.update(meter.done - bar.n)
                if not isinstance(item, Record) or item.key in known or not item.image or not item.captions:
                    continue
                try:
                    image = decode(item.image)
                except BadImage:
                    continue
                rows.append((item.key, item.captions[0], image))
                if len(rows) == options.batch_size:
                    yield rows
                    rows = []
    if rows:
        yield rows


@command
def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Write the scores; returns them by key."""
    options = parse_options(Options, argv, description=__doc__)
    ranker = load_ranker(options.ranker, options.device)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with locked(options.out.parent, f".{options.out.name}.lock"):
        return score_all(options, ranker)


def score_all(options: Options, ranker: Any) -> dict[str, float]:
    """Go on behind what an earlier run has written."""
    scores = read_whole_lines(options.out)
    with options.out.open("a", encoding="utf-8") as file, torch.inference_mode():
        for rows in _batches(options, scores):
            keys, texts, images = (list(column) for column in zip(*rows, strict=True))
            found = dict(zip(keys, score_pairs(ranker, texts, images), strict=True))
            lines = (json.dumps({"key": k, "score": v}, ensure_ascii=False) for k, v in found.items())
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            scores |= found
    if not scores:
        raise ValueError(f"{options.src} has no sample with an image and a caption")
    marks = np.percentile(list(scores.values()), (0, 5, 25, 50, 75, 100)).round(3).tolist()
    said = dict(zip(("least", "5 %", "25 %", "median", "75 %", "most"), marks, strict=True))
    say(f"{len(scores)} pairs | {', '.join(f'{name} {mark}' for name, mark in said.items())} | {options.out}")
    return scores


if __name__ == "__main__":
    main()
