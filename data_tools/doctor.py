"""Everything that would stop or spoil a training, before it starts, each with what to do.

    python -m data_tools.doctor data/shards
    python -m data_tools.doctor data/shards --for configs/goods_128              # every config of the folder
    python -m data_tools.doctor catalogue/ --for configs/goods_128/dalle.yaml --image-share 0.1

SRC is any recognised source; a raw one is told how it becomes shards. Token shards of a generator are looked at as far
as captions go. Exit code 0: may start; 1: something would stop it; 2: the command itself was wrong.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from common.config import command, parse_options
from common.files import write_json
from common.text.language import Language, Words, words_of
from data_tools.ingest.shard_run import announce
from data_tools.readers.base import ReaderOptions
from data_tools.readers.detect import Source, open_source
from data_tools.report.checks import (
    Finding,
    Wants,
    check_captions,
    check_config,
    check_images,
    check_likeness,
    check_rows,
    read_wants,
)
from data_tools.report.facts import Facts
from data_tools.report.likeness import likeness
from data_tools.report.token_count import token_counter
from data_tools.stats import StatsConfig, collect

LEVELS = ("stop", "spoil", "note")
MEANING = {
    "stop": "would stop a training",
    "spoil": "would spoil the result",
    "note": "to know",
}


@dataclass(frozen=True)
class DoctorConfig:
    """Examine a source for a training."""

    EARLIER_NAMES: ClassVar = {"picture_share": "image_share"}
    src: tyro.conf.Positional[Path]
    """File or folder in any recognised format."""
    configs: Annotated[tuple[Path, ...], tyro.conf.arg(name="for")] = ()
    """Configs of trainings, or folders of them."""
    tokenizer: str = ""
    """Text tokenizer to count with; empty: that of the configs."""
    image_share: float = 1.0
    """Share of the images that are decoded, above 0 to 1."""
    watermarks: bool = False
    """Look for repeated overlays too, which takes the longest."""
    json: Path | None = None
    """Also write the findings here, in English."""
    language: Language = "auto"
    """Of the findings on the terminal: zh, en, or auto, which follows the locale."""
    workers: int = -1
    """Processes that decode; -1: one a processor; 0: none but this one."""
    reader: tyro.conf.OmitArgPrefixes[ReaderOptions] = field(
        default_factory=lambda: ReaderOptions(captions="optional")
    )

    def __post_init__(self) -> None:
        if not 0 < self.image_share <= 1:
            raise ValueError(f"--image-share must be above 0 and at most 1, not {self.image_share}")


def find_configs(paths: Sequence[Path]) -> list[Path]:
    """Files, and the YAML files of folders. Raises FileNotFoundError for one that is not there, or an empty folder."""
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
        if not inside:
            raise FileNotFoundError(f"there is no .yaml file in {path}")
        found += inside
    return found


def examine(config: DoctorConfig) -> tuple[list[Finding], list[Facts]]:
    """All findings, the gravest first, and what they rest on.

    Raises ValueError or FileNotFoundError where the source or a config cannot be read at all.
    """
    wanted = [read_wants(path) for path in find_configs(config.configs)]
    source = open_source(config.src, config.reader, exclude=[config.json] if config.json else [])
    announce(source)
    tokenizer = usable_tokenizer(config, wanted)
    collecting = StatsConfig(
        config.src,
        tokenizer=tokenizer,
        image_share=config.image_share,
        watermarks=config.watermarks,
        workers=config.workers,
        reader=config.reader,
    )
    facts = collect(collecting, source)
    has_tokens = (config.src / "tokenizer.json").is_file()
    findings = list(
        check_rows(_without_images_is_fine(facts) if has_tokens else facts, config.src, source.format)
    )
    if not any(fact.kept for fact in facts):
        findings.append(Finding("stop", f"no row of {config.src} can be used", "the reasons are above"))
        return _by_level(findings), facts
    for found in _findings(config, source, facts, wanted, tokenizer):
        if found not in findings:
            findings.append(found)
    return _by_level(findings), facts


def _findings(
    config: DoctorConfig, source: Source, facts: Sequence[Facts], wanted: Sequence[Wants], tokenizer: str
) -> Iterator[Finding]:
    if not wanted or any(w.reads_text for w in wanted):
        yield from check_captions(facts)
    yield from check_images(facts)
    yield from check_likeness(likeness(facts), facts)
    for wants in wanted:
        measured = bool(tokenizer) and tokenizer in (config.tokenizer, wants.text_tokenizer)
        for found in check_config(wants, facts, measured):
            yield replace(found, what=f"{wants.path.name}: {found.what}")


def usable_tokenizer(config: DoctorConfig, wanted: Sequence[Wants]) -> str:
    """The tokenizer to count with: that of the user, which must exist, or the first of the configs that does."""
    if config.tokenizer:
        token_counter(config.tokenizer)
        return config.tokenizer
    for wants in wanted:
        if wants.text_tokenizer:
            try:
                token_counter(wants.text_tokenizer)
            except FileNotFoundError:
                continue
            return wants.text_tokenizer
    return ""


def _without_images_is_fine(facts: Sequence[Facts]) -> list[Facts]:
    """Token shards hold codes in place of images."""
    return [replace(fact, without_image=0) for fact in facts]


def _by_level(findings: Sequence[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda found: LEVELS.index(found.level))


def print_findings(findings: Sequence[Finding], facts: Sequence[Facts], words: Words) -> None:
    """To stdout: a line for what was examined, then each finding with what to do, then the verdict."""
    rows = ", ".join(f"{fact.split} {fact.kept}" for fact in facts)
    images = sum(len(fact.rows) for fact in facts)
    print(words("examined {rows} samples, {images} images", rows=rows, images=images))
    for level in LEVELS:
        found = [f for f in findings if f.level == level]
        if found:
            print(f"\n{words(MEANING[level])}:")
        for one in found:
            print(f"  - {_said(one.what, words)}\n    -> {words.sentence(one.todo)}")
    stops = sum(found.level == "stop" for found in findings)
    spoils = sum(found.level == "spoil" for found in findings)
    none = words("nothing")
    verdict = words(
        "{stops} would stop a training, {spoils} would spoil it", stops=stops or none, spoils=spoils or none
    )
    print(f"\n{verdict}")


def _said(what: str, words: Words) -> str:
    """Without the name of the config in front, which is no word of ours."""
    name, colon, rest = what.partition(".yaml: ")
    return f"{name}{colon}{words.sentence(rest)}" if colon else words.sentence(what)


@command
def main(argv: Sequence[str] | None = None) -> list[Finding]:
    """The command of this module."""
    config = parse_options(DoctorConfig, argv, description=__doc__)
    findings, facts = examine(config)
    print_findings(findings, facts, words_of(config.language, "doctor"))
    if config.json:
        rows = [{"level": f.level, "what": f.what, "todo": f.todo} for f in findings]
        write_json(config.json, rows)
    if any(found.level == "stop" for found in findings):
        sys.exit(1)
    return findings


if __name__ == "__main__":
    main()
