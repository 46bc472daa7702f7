"""Keep what is fit for training; every other row is in dropped.jsonl with its reason.

    python -m data_tools.clean data/raw data/clean --rules shop
    python -m data_tools.clean data/raw data/clean --rules wukong-food --captions.keyword-file words.txt
    python -m data_tools.clean data/raw data/clean --rules shop --tokenizer hfl/chinese-roberta-wwm-ext \
        --captions.max-tokens 30 --scores scores.jsonl --min-score 0.2

SRC is any recognised source; DST gets image shards with the bytes of the images as they were. `--rules` names a
preset or a YAML file; single flags go over it. Scores come from `python -m rankers.pair_scores`. A normalised caption
keeps its original in the meta as `title`; flags that do not drop (blurred, watermark) stand in the meta as `flags`. A
killed run is continued by the same command.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import tyro
from PIL import Image

from common.config import command, parse_options, to_mapping
from common.files import read_lines, sha256_file
from data_tools.engine import EngineOptions
from data_tools.images.decode import BadImage, ImageLimits, decode, image_size
from data_tools.ingest.records import HINTS, Problem, Record, problem
from data_tools.ingest.rewrite import Steps, print_report, require_kept, rewrite
from data_tools.ingest.shard_run import announce, say
from data_tools.readers.base import KeyTable, ReaderOptions
from data_tools.readers.detect import open_source
from data_tools.report.token_count import token_counter
from data_tools.rules import CaptionRules, ImageRules, Rules, keyword_path, rules_path
from data_tools.rules.captions import CAPTION_REASONS, CaptionJudge
from data_tools.rules.images import SIDE, check_shape, measure_flags
from data_tools.shard import files_of

Score = Callable[[str, list[Image.Image]], Sequence[float]]
"""A ranker's `score(text, images)`: higher is better; a tensor (N,) will do."""

REASONS: dict[str, str] = (
    HINTS
    | CAPTION_REASONS
    | {
        "aspect_ratio": "the image is too long or too wide; raise --images.max-aspect to keep it",
        "image_too_small": "lower --images.min-side to keep it, but enlarged images teach blur",
        "blurred": "flagged as blurred or enlarged; leave it out of --images.drop-flags to keep it",
        "duplicate_image": "same bytes as an image kept before",
        "low_score": "image and caption do not match by the ranker; lower --min-score",
        "near_constant": "a blank image, such as a placeholder of a shop",
        "no_score": "the file of scores has no line for its key",
        "watermark": "a repeated pattern, an overlay or a print; leave it out of --images.drop-flags to keep it",
    }
)


@dataclass(frozen=True)
class CleanConfig:
    """Filter a source by rules on captions and images."""

    EARLIER_NAMES: ClassVar = {"pictures": "images"}
    src: tyro.conf.Positional[str] = ""
    """File or folder in any recognised format, or URL of shards or of a list."""
    dst: tyro.conf.Positional[str] = ""
    """Folder, or fsspec URL such as s3://bucket/clean."""
    captions: CaptionRules = field(default_factory=CaptionRules)
    images: ImageRules = field(default_factory=ImageRules)
    tokenizer: str = ""
    """Folder, hub id or .model file of the text tokenizer, for the rules that count tokens."""
    scores: Path | None = None
    """JSONL with `key` and `score` of each sample, as a ranker gave them; for --min-score."""
    min_score: float = -math.inf
    """Drop pairs whose score is lower."""
    max_pixels: int = 64_000_000
    """Most pixels of an image; more are refused before they are allocated."""
    samples_per_shard: int = 1000
    """Samples a tar."""
    workers: int = -1
    """Processes that decode and measure; -1: one a processor; 0: none but this one."""
    reader: tyro.conf.OmitArgPrefixes[ReaderOptions] = field(default_factory=ReaderOptions)
    work: tyro.conf.OmitArgPrefixes[EngineOptions] = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        if self.scores and self.min_score == -math.inf:
            raise ValueError("--scores needs --min-score, the score under which a pair is dropped")
        if self.samples_per_shard < 1 or self.max_pixels < 1:
            raise ValueError("--samples-per-shard and --max-pixels must be at least 1")

    @property
    def rules(self) -> Rules:
        """Both kinds of rules."""
        return Rules(self.captions, self.images)


@dataclass
class Examine:
    """Records to (record with its captions judged and its flags, digest of the image), or to problems. Picklable."""

    rules: Rules
    tokenizer: str
    limits: ImageLimits
    _judge: CaptionJudge | None = None

    def __call__(self, records: Sequence[Record]) -> list[tuple[Record, str] | Problem]:
        if self._judge is None:  # once a process: tokenizers and word lists do not travel well
            counter = token_counter(self.tokenizer) if self.tokenizer else None
            self._judge = CaptionJudge(self.rules.captions, counter)
        return [self.one(record) for record in records]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_judge": None}

    def one(self, record: Record) -> tuple[Record, str] | Problem:
        """Captions first: they cost nothing."""
        judged = self._captions(record)
        if isinstance(judged, Problem):
            return judged
        if not record.image:
            return problem(record.where, record.key, "no_image")
        try:
            image, size = decode_with_size(record.image, self.limits)
        except BadImage as error:
            return problem(record.where, record.key, error.reason, error.what)
        if found := check_shape(size, self.rules.images):
            return Problem(record.where, record.key, *found)
        flags = measure_flags(image, self.rules.images)
        for flag in flags:
            if flag in self.rules.images.drop_flags:
                return Problem(record.where, record.key, flag, REASONS[flag])
        if flags:
            judged = replace(judged, meta={**judged.meta, "flags": flags})
        return judged, hashlib.blake2b(record.image, digest_size=16).hexdigest()

    def _captions(self, record: Record) -> Record | Problem:
        """The record with the captions that pass; a problem, the first one's, if there were some and none passes."""
        verdicts = [self._judge(caption) for caption in record.captions]
        kept = tuple(dict.fromkeys(v.caption for v in verdicts if not v.reason))
        if verdicts and not kept:
            return Problem(
                record.where, record.key, verdicts[0].reason, f"{verdicts[0].detail}: {record.captions[0]}"
            )
        meta = dict(record.meta)
        lost = [[caption, v.reason] for caption, v in zip(record.captions, verdicts, strict=True) if v.reason]
        if lost:
            meta["captions_dropped"] = lost
        if kept and "title" not in meta and not set(kept) <= set(record.captions):
            meta["title"] = record.captions[0]
        return replace(record, captions=kept, meta=meta)


def decode_with_size(data: bytes, limits: ImageLimits) -> tuple[Image.Image, tuple[int, int]]:
    """An image good for measuring, decoded small where the format allows, and its true size (W, H).

    Raises BadImage.
    """
    return decode(data, limits, near=SIDE), image_size(data)


class Decide:
    """What needs all rows before: exact duplicates, and the score of image and caption."""

    def __init__(self, config: CleanConfig, score: Score | None):
        self.config, self.score = config, score
        self.seen, self.count = KeyTable(), 0
        self.scores = read_scores(config.scores) if config.scores else None

    def __call__(self, _: int, record: Record, result: tuple[Record, str]) -> Record | Problem:
        judged, digest = result
        if self.config.images.drop_duplicates and self._is_duplicate(digest):
            return Problem(record.where, record.key, "duplicate_image", REASONS["duplicate_image"])
        if self.scores is None and self.score is None:
            return judged
        value = self._score(judged)
        if value is None:
            return Problem(record.where, record.key, "no_score", REASONS["no_score"])
        if value < self.config.min_score:
            return Problem(
                record.where, record.key, "low_score", f"score {value:.4f} is under {self.config.min_score:g}"
            )
        return replace(judged, meta={**judged.meta, "score": round(value, 6)})

    def remember(self, record: Record) -> None:
        """A record that was kept by an interrupted run."""
        self._is_duplicate(hashlib.blake2b(record.image, digest_size=16).hexdigest())

    def _is_duplicate(self, digest: str) -> bool:
        self.count += 1
        return bool(self.seen.first_row(digest, self.count))

    def _score(self, record: Record) -> float | None:
        if self.scores is not None:
            return self.scores.get(record.key)
        image = decode(record.image, ImageLimits(self.config.reader.max_image_bytes, self.config.max_pixels))
        return float(self.score(record.captions[0] if record.captions else "", [image])[0])


def read_scores(path: Path) -> dict[str, float]:
    """JSONL of `key`, `score`. Raises FileNotFoundError, or ValueError with the line that is none."""
    scores = {}
    for number, line in enumerate(read_lines(path), 1):
        try:
            row = json.loads(line)
            scores[row["key"]] = float(row["score"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}:{number}: expected {{"key": ..., "score": ...}}, found {line[:60]!r}'
            ) from error
    return scores


def clean(config: CleanConfig, score: Score | None = None) -> dict[str, Any]:
    """Run it; returns the content of report.json. `score` is a ranker's, for `min_score` in one pass.

    A run with `score` is continued like any other; whether the ranker is still the same is the caller's care.
    Raises ValueError or FileNotFoundError for what the user has to change.
    """
    if config.min_score > -math.inf and score is None and config.scores is None:
        raise ValueError(
            "--min-score needs --scores FILE: the scores that a ranker gave, one JSON object a line"
        )
    source = open_source(config.src, config.reader, exclude=[config.dst])
    announce(source)
    examine = Examine(
        config.rules, config.tokenizer, ImageLimits(config.reader.max_image_bytes, config.max_pixels)
    )
    examine([])  # missing word lists and tokenizers are found before any row is read
    decide = Decide(config, score)
    job = job_of(config, source) | {"scored_by_callable": score is not None}
    workers = config.work.workers(config.workers)
    steps = Steps(examine, decide, decide.remember)
    return rewrite(source, config.dst, job, steps, config.samples_per_shard, workers, _flags)


def _flags(record: Record) -> list[str]:
    return [f"flag {name}" for name in record.meta.get("flags", ())]


def job_of(config: CleanConfig, source: Any) -> dict[str, Any]:
    """What decides the result: options, word lists, names and sizes of the source's files."""
    options = to_mapping(config)
    for name in ("src", "dst", "workers", "work"):
        del options[name]
    if config.captions.keyword_file:
        options["captions"]["keyword_file"] = sha256_file(keyword_path(config.captions.keyword_file))
    if config.scores:
        options["scores"] = sha256_file(config.scores)
    options["min_score"] = str(config.min_score)  # JSON has no infinity
    files = files_of(source)
    return {"step": "clean", "source_format": source.format, "files": files, "options": options}


def preset_to_config(argv: Sequence[str]) -> list[str]:
    """`--rules NAME` as the `--config FILE` that it stands for. Raises ValueError if both are given."""
    args: list[str] = []
    for arg in argv:
        args += arg.split("=", 1) if arg.startswith("--rules=") else [arg]
    if "--rules" not in args:
        return args
    index = args.index("--rules")
    if index + 1 == len(args):
        raise ValueError("--rules needs a name: shop, wukong, wukong-food, or a .yaml file")
    if any(arg == "--config" or arg.startswith("--config=") for arg in args):
        raise ValueError("--rules and --config both name a file of options: give one of them")
    return [*args[:index], "--config", str(rules_path(args[index + 1])), *args[index + 2 :]]


@command
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command of this module."""
    import sys

    args = preset_to_config(sys.argv[1:] if argv is None else argv)
    config = parse_options(CleanConfig, args, description=__doc__)
    if not config.dst:
        raise ValueError("name a source and a folder: python -m data_tools.clean SRC DST --rules shop")
    start = time.monotonic()
    report = clean(config)
    print_report(report, config.dst, REASONS)
    say(f"  {time.monotonic() - start:.1f} s")
    require_kept(report, config.src, config.dst)
    return report


if __name__ == "__main__":
    main()
