"""Features of images ahead of measuring: `python -m evaluation`, the arena and the sweep find them in their cache.

    python -m evaluation.embed out/ --reference data/shards --judge runs/goods_128_judge
    python -m evaluation.embed out/a out/b --reference data/shards --engine ray --ray-address auto

The images are read here; on a Ray cluster (`--engine ray`) the nodes get them in batches, with the networks, and send
features back. A run that was killed goes on behind what is in the cache.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from common.config import command, parse_options
from common.log import say
from data_tools.engine import EngineOptions
from evaluation.metrics.features import FeatureStore, Images, SampleImages, embed
from evaluation.options import MeasuringOptions
from evaluation.sets import SampleSet


@dataclass(frozen=True)
class Options(MeasuringOptions):
    """Compute and keep the features of generated and real images."""

    out_dirs: tyro.conf.Positional[tuple[Path, ...]] = (Path("out"),)
    """Directories that generate.py wrote, of images of one size."""
    batch_size: int = 64
    """Images of one forward pass, and of one task."""
    work: tyro.conf.OmitArgPrefixes[EngineOptions] = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Returns the number of features in the cache that belong to the images."""
    options = parse_options(Options, argv, description=__doc__)
    options.check_reference()
    sets = [SampleSet.from_out_dir(path) for path in options.out_dirs]
    reference = options.real_images(sets[0])
    found: list[Images] = [SampleImages(samples.samples) for samples in sets]
    found += [reference.real, *([reference.train] if reference.train else [])]
    networks = options.networks()
    judge = [networks.judge.network] if networks.judge else []
    scorer = [networks.scorer] if networks.scorer else []
    # columns of one network are kept with the others
    used = {n.identity: getattr(n, "whole", n) for n in (*networks.statistics, *judge, *scorer)}
    cluster, count = options.work.cluster, 0
    with cluster.connected() if cluster else nullcontext():
        cluster = cluster.with_gpus(options.device) if cluster else None
        for network in used.values():
            store = FeatureStore(network, options.cache)
            for images in found:
                count += len(embed(network, images, store, options.batch_size, cluster)[0])
    say(f"{count} features of {len(used)} networks are in {options.cache}")
    return count


if __name__ == "__main__":
    main()
