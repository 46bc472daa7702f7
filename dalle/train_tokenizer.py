"""Train a SentencePiece model on captions, for shops whose words the Chinese RoBERTa vocabulary does not know.

python -m dalle.train_tokenizer data/shards runs/text_tokenizer --vocab-size 8000
python -m dalle.train_tokenizer captions.txt runs/text_tokenizer --model-type char
python train_dalle.py --text-tokenizer runs/text_tokenizer
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from common.config import command, parse_options
from common.console.progress import progress
from common.files import ensure_writable_directory, split_lines
from common.log import say
from common.outputs.record import new_directory, require_new
from dalle.text_tokenizer import TextTokenizer
from data_tools.shards.index import ShardIndex


@dataclass(frozen=True)
class Options:
    """Captions -> SentencePiece model."""

    source: Annotated[Path, tyro.conf.Positional]
    """Folder of shards, a .txt file with a caption a line, or JSONL with "sentences", "caption" or "text"."""
    target: Annotated[Path, tyro.conf.Positional]
    """Folder for the model."""
    vocab_size: int = 8000
    """Largest number of pieces; small collections give fewer."""
    model_type: Literal["unigram", "bpe", "char"] = "unigram"
    """unigram and bpe learn words, char takes single characters: the safest for a few thousand captions."""
    character_coverage: float = 0.9999
    """Share of the characters' occurrences that must have a piece; rarer ones become unknown. At least 0.98."""
    limit: int = 2_000_000
    """Captions that are read at most."""
    max_text_len: int = 32
    """Length to report truncation for, begin and end marks included."""


def read_captions(source: Path) -> Iterator[str]:
    """Every caption of shards, a text file or JSONL. Raises FileNotFoundError, or ValueError naming the line."""
    if source.is_dir() or source.suffix == ".tar":
        index = ShardIndex.open(source, "train" if source.is_dir() else "").require("txt")
        for i in range(len(index)):
            yield from split_lines(index.read(i, ("txt",))["txt"].decode("utf-8", errors="replace"))
        return
    if not source.is_file():
        raise FileNotFoundError(f"no captions at {source}: give a folder of shards, a .txt or a .jsonl file")
    with source.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if source.suffix == ".jsonl":
                yield from _sentences(line, f"{source}:{number}")
            else:
                yield line.rstrip("\n")


def _sentences(line: str, where: str) -> list[str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error.msg}") from error
    found = next(
        (row[n] for n in ("sentences", "caption", "text") if isinstance(row, dict) and n in row), None
    )
    if found is None:
        raise ValueError(f'{where} has none of "sentences", "caption", "text"')
    return [str(s) for s in found] if isinstance(found, list) else [str(found)]


@command
def main(argv: Sequence[str] | None = None) -> TextTokenizer:
    """Train, save, report; returns the tokenizer."""
    options = parse_options(Options, argv, description=__doc__)
    require_new(options.target)
    ensure_writable_directory(options.target.parent)
    captions = []
    for caption in progress(read_captions(options.source), unit="captions", desc="reading"):
        captions.append(caption)
        if len(captions) == options.limit:
            break
    tokenizer = TextTokenizer.train(
        captions, options.vocab_size, options.model_type, options.character_coverage
    )
    with new_directory(options.target) as temporary:
        tokenizer.save(temporary)
    report = tokenizer.encode(captions[:100_000], options.max_text_len)
    say(
        f"{options.target}: {tokenizer.vocab_size} pieces from {len(captions)} captions; "
        f"{report.num_pieces / max(1, len(captions[:100_000])):.1f} pieces a caption, {report.unknown_share:.3%} of "
        f"them unknown, {report.num_truncated} captions longer than {options.max_text_len} tokens"
    )
    return tokenizer


if __name__ == "__main__":
    main()
