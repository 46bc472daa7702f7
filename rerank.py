"""Order the images that generate.py made: the best first, with what their scores mean.

    python rerank.py                                     # out/, the ranker trained last
    python rerank.py out/ --ranker pretrained/goods-128/ranker --top-k 4
    python rerank.py out/ --min-percentile 20            # keeps nothing that real images would not pass
    python rerank.py out/ --min-percentile 20 --until 4  # generates until four pass, at most --budget images

Writes ranking.json, ranked.png and copies rank00.png, rank01.png ... of the best; doing it again gives the same.
"""

import common  # noqa: F401 (before torch: Ctrl-C meanwhile leaves no traceback)

# isort: split

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from common.config import command, from_mapping, parse_options
from common.log import say
from common.outputs.image_list import ORIGIN
from common.outputs.label import LabelOptions
from common.outputs.out_directory import OutDirectory, Request
from common.outputs.record import OutputDirectory
from common.precision import Precision
from rankers import default_ranker, load_ranker
from rankers.outdir import Row, made_by, read_out_directory
from rankers.ranking import TOP_K, Ranked, rank_directory, ranking_names, report, write_ranking


@dataclass(frozen=True)
class Options:
    """Order the images of an out directory."""

    out: tyro.conf.Positional[Path] = Path("out")
    """Directory that generate.py wrote."""
    ranker: str = ""
    """Checkpoint directory, published model or a list of them (see rankers); empty: for images of the generator that
    ships the one beside it, else the newest one trained here, else the one that ships."""
    top_k: int = TOP_K
    """Best images of a text that are copied to rank00.png ..."""
    min_percentile: float = 0.0
    """An image passes when it scores above this percentage of real images with their own captions; 0: all pass."""
    until: int = 0
    """Generate until this many images of every text pass; 0: none more."""
    budget: int = 64
    """Images of a text in all at which --until gives up."""
    checkpoint: str = ""
    """The generator that goes on for --until; empty: the newest one, else the one that ships."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """auto takes bf16 where the machine has it."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.top_k}")
        if not 0 <= self.min_percentile <= 100:
            raise ValueError(f"min_percentile must lie in [0, 100], not {self.min_percentile}")
        if self.until < 0 or (self.until and not self.min_percentile):
            raise ValueError("--until needs --min-percentile above 0, which says what passes")
        if self.budget < 1:
            raise ValueError(f"budget must be at least 1, not {self.budget}")


# --- generating more -----------------------------------------------------------------------------------------------

ROUND = 8  # images of a text generated before looking again


def generate_until(options: Options, ranker: Any, out: OutDirectory) -> None:
    """Generate more for every text, behind the images that stand, until enough pass or the budget is spent."""
    from dalle.sampling import SamplingOptions

    rows = read_out_directory(options.out)
    origin = common_origin(rows, options.out)
    out.require_ours(len(rows) + options.budget * len({row.text for row in rows}))
    pipeline = load_generator(options, origin)
    out.label = from_mapping(LabelOptions, origin["label"] or {}, where=f"{options.out}/images.jsonl")
    out.origin = {name: value for name, value in origin.items() if name not in ("label", "whiten")}
    out.continue_behind_all()
    sampling = from_mapping(SamplingOptions, origin["sampling"], where=f"{options.out}/images.jsonl")
    while requests := wanted(options, rank(options, ranker), read_out_directory(options.out)):
        say(f"generating {len(requests)} more images")
        todo = [Request(text, index) for text, index in requests]
        for image in pipeline.generate_requests(todo, origin["seed"], sampling, origin["negative"], ROUND):
            out.add(image)
    if out.count > len(rows):
        out.write_grid()


def wanted(options: Options, texts: dict[str, list[Ranked]], rows: Sequence[Row]) -> list[tuple[str, int]]:
    """(text, index) of the next round: for texts with too few passing images and budget left."""
    requests, last = [], {}
    for row in rows:
        last[row.text] = max(last.get(row.text, 0), int(row.values["index"]))
    for text, ranked in texts.items():
        passing, count = sum(row.passed for row in ranked), len(ranked)
        if passing >= options.until:
            continue
        if count >= options.budget:
            say(f"{text}: {passing} of {options.until} pass after {count} images, the budget")
            continue
        requests += [(text, last[text] + 1 + i) for i in range(min(ROUND, options.budget - count))]
    return requests


def common_origin(rows: Sequence[Row], out: Path) -> dict[str, Any]:
    """What all images share: seed, sampling, checkpoint. Raises ValueError where one run did not make all."""
    origins = [{name: row.values.get(name) for name in ORIGIN} for row in rows]
    if any(origin != origins[0] for origin in origins) or "index" not in rows[0].values:
        raise ValueError(f"the images of {out} were not made by one run of generate.py: --until cannot go on")
    if origins[0]["source"]:
        raise ValueError(f"the images of {out} started from another image: --until cannot go on from there")
    if origins[0]["whiten"]:
        raise ValueError(f"the images of {out} were put on white: --until cannot go on")
    return origins[0]


def load_generator(options: Options, origin: dict[str, Any]) -> Any:
    from dalle import default_checkpoint
    from dalle.engines import FastOptions
    from dalle.pipeline import TextToImage

    checkpoint = options.checkpoint or default_checkpoint()
    off = origin["engine"] == "torch" and "off" in (
        origin["kernels"] or {}
    )  # earlier releases wrote no kernels
    fast = FastOptions(origin["engine"] or "auto", origin["weights"], "off" if off else "auto")
    pipeline = TextToImage.from_pretrained(checkpoint, options.device, fast)
    if pipeline.sha256 != origin["checkpoint"]:
        raise ValueError(
            f"another generator than {checkpoint} made the images of {options.out}: name it with --checkpoint"
        )
    return pipeline


def require_room(options: Options, rows: Sequence[Row], files: OutputDirectory) -> None:
    """Raises ValueError where a file that the ranking would replace is not what an earlier one wrote."""
    count = len({row.text for row in rows})
    files.require_ours(ranking_names(count, len(rows) + options.budget, options.top_k))


@command
def main(argv: Sequence[str] | None = None) -> dict[str, list[Ranked]]:
    """Rank; returns what ranking.json holds."""
    options = parse_options(Options, argv, description=__doc__)
    read_out_directory(options.out)
    with OutDirectory(options.out) as out:
        return rank_all(options, out)


def rank_all(options: Options, out: OutDirectory) -> dict[str, list[Ranked]]:
    """Generate what --until asks for, rank, write and show."""
    rows = read_out_directory(options.out)
    require_room(options, rows, out.files)
    name = options.ranker or str(default_ranker(made_by(rows)))
    ranker = load_ranker(name, options.device, options.precision)
    if options.min_percentile and ranker.calibration is None:
        raise ValueError(
            f"the ranker {name} has no calibration, so --min-percentile means nothing: make one with "
            f"`python -m rankers.calibrate --ranker {name}`"
        )
    if options.until:
        generate_until(options, ranker, out)
    texts = rank(options, ranker)
    write_ranking(out.files, ranker, texts, options.top_k, options.min_percentile)
    report(options.out, ranker, texts)
    return texts


def rank(options: Options, ranker: Any) -> dict[str, list[Ranked]]:
    return rank_directory(options.out, ranker, options.top_k, options.min_percentile)


if __name__ == "__main__":
    main()
