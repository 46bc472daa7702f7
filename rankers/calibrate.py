"""Calibrate a ranker: what its scores mean, on real images with captions.

    python -m rankers.calibrate --ranker OFA-Sys/chinese-clip-vit-base-patch16 --data ../shared/data/goods

See rankers.calibration; a ranker of rankers.train has its calibration already.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.config import command, parse_options
from data_tools.shards.index import ShardIndex
from rankers import default_ranker, load_ranker
from rankers.calibration import Calibration, NegativeWords, cache_path, calibrate, default_lexicon
from rankers.retrieval import load_pairs
from rankers.training.pairs import AttributeConfig, scan_names


@dataclass(frozen=True)
class Options:
    """Calibrate a ranker on real images with captions."""

    ranker: str = ""
    """Name of the ranker; empty: the newest one trained here, else the one that ships."""
    data: str = "../shared/data/goods"
    """Folder of image shards with a validation split."""
    limit: int = 1000
    """Images at most."""
    out: Path | None = None
    """Where to write; None: where load_ranker looks for it."""


@command
def main(argv: Sequence[str] | None = None) -> Calibration:
    options = parse_options(Options, argv, description=__doc__)
    name = options.ranker or str(default_ranker())
    ranker = load_ranker(name)
    if not hasattr(ranker, "score_matrix"):
        raise ValueError(
            f"the ranker {name} has no score between any text and any image: nothing to calibrate"
        )
    index = ShardIndex.open(options.data, "val")
    pairs = load_pairs(index, AttributeConfig(), options.limit)
    names = scan_names(index, AttributeConfig())
    lexicon = NegativeWords(names.colors, names.categories) if names.categories else default_lexicon()
    found = calibrate(ranker, pairs, lexicon, options.data)
    path = options.out or cache_path(ranker.name)
    found.save(path)
    print(f"{len(pairs.captions)} images of {options.data}: wrote {path}", flush=True)
    return found


if __name__ == "__main__":
    main()
