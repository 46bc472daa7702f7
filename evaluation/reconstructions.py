"""What an image tokenizer keeps of goods: are its reconstructions still recognised, beside the originals?

    python -m evaluation.reconstructions runs/goods_128_vqgan ../shared/data/goods
    python -m evaluation.reconstructions pretrained/goods-128/generator ../shared/data/goods --judge runs/judge
    python -m evaluation.reconstructions runs/sd/vae ../shared/data/goods --image-size 128

Takes image tokenizers of train_vqgan.py, generators that hold one, and folders of diffusers' AutoencoderKL. The judge
(python -m evaluation.train_judge) names category and colour of originals and reconstructions; intervals are 95 %, by
bootstrap over images, those of shares of the originals paired. Writes metrics.json and grid.png (originals above
reconstructions) and prints the table. `python -m vq.evaluate` has pixels, codebook usage and speed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from PIL import Image

from common.config import command, parse_options, to_mapping
from common.console.tables import plain_console
from common.distributed import pick_device
from common.image import stack_rows, to_image, to_tensor
from common.log import say
from common.outputs.record import OutputDirectory
from common.precision import Precision
from data_tools.images.decode import BadImage
from data_tools.shards.loader import CorruptSample
from evaluation.codecs import Codec, open_codec
from evaluation.compare.parts import Networks, Part, pixel_colors_of
from evaluation.metrics.compute import networks_note
from evaluation.metrics.distribution import Frechet
from evaluation.metrics.features import CACHE, FeatureNetwork, ListedImages
from evaluation.metrics.pixel_colors import ColorHistogram, PixelColors
from evaluation.metrics.resampling import Estimate, Resampling, interval_of, mean_estimate
from evaluation.metrics.rows import name_on
from evaluation.metrics.statistics import Interval
from evaluation.options import judge_name
from evaluation.reference import Facts, ReferenceImages
from rankers.training.pairs import AttributeConfig
from vq.losses.reconstruction import psnr

COLUMNS = 12  # of the grid


@dataclass(frozen=True)
class Options:
    """Judge the reconstructions of an image tokenizer."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Image tokenizer or generator (a checkpoint, run directory or hub id), or a folder of AutoencoderKL."""
    data: Annotated[str, tyro.conf.Positional]
    """Folder of image shards."""
    split: str = "val"
    """Which shards."""
    train_split: str = "train"
    """Shards whose images of known colour name colours in pixels; empty: none."""
    judge: str = ""
    """Judge (python -m evaluation.train_judge); empty: the newest of runs/."""
    inception: str = ""
    """File with the Inception weights of FID; empty: torch's hub cache, where they are there."""
    attributes: AttributeConfig = field(default_factory=AttributeConfig)
    image_size: int = 0
    """Side in pixels; 0: that of training."""
    limit: int = 0
    """Images to look at; 0: all."""
    show: int = 48
    """Images in the grid."""
    batch_size: int = 32
    """Images of one pass."""
    replicates: int = 1000
    """Bootstrap replicates for intervals."""
    frechet_replicates: int = 50
    """The same for the Frechet distance, each of which costs a decomposition."""
    out: Path = Path("out/reconstructions")
    """Directory for metrics.json and grid.png."""
    cache: Path = CACHE
    """Folder where features of images are kept."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """auto takes bf16 autocast for the tokenizer where the machine has it; the judge computes in float32."""

    def __post_init__(self) -> None:
        for name, low in (("limit", 0), ("show", 0), ("batch_size", 1), ("image_size", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, not {getattr(self, name)}")
        if self.replicates < 20 or not 2 <= self.frechet_replicates <= self.replicates:
            raise ValueError(
                "replicates must be at least 20 and frechet_replicates lie in [2, replicates], not "
                f"{self.replicates} and {self.frechet_replicates}"
            )


@dataclass(frozen=True)
class Metric:
    """One line of the table."""

    name: str
    reconstructions: Interval
    count: int
    originals: Interval | None = None
    relative: Interval | None = None
    """Reconstructions as a share of the originals."""
    is_share: bool = True

    def to_json(self) -> dict[str, Any]:
        ends = ("reconstructions", "originals", "relative")
        return {"name": self.name, "count": self.count} | {
            end: vars(getattr(self, end)) if getattr(self, end) else None for end in ends
        }


@dataclass(frozen=True)
class Pairs:
    """Originals beside their reconstructions, in the order of `facts`."""

    facts: tuple[Facts, ...]
    originals: list[Image.Image]
    reconstructions: list[Image.Image]
    psnr: NDArray[np.float64]

    def parts(self, options: Options) -> tuple[Part, Part]:
        keys = [fact.key for fact in self.facts]
        resampling = Resampling(keys, options.replicates)
        sets = (self.originals, self.reconstructions)
        return tuple(Part(keys, ListedImages(images), resampling, options.cache) for images in sets)


def reconstruct_all(codec: Codec, images: ReferenceImages, options: Options, device: torch.device) -> Pairs:
    """Raises ValueError where no image can be read."""
    from common.console.progress import progress

    count = min(len(images), options.limit) if options.limit else len(images)
    facts, originals, reconstructions, noise = [], [], [], []
    with progress(total=count, desc="reconstructing", unit=" images") as bar:
        for indices, batch in _batches(images, count, options.batch_size):
            pixels = torch.stack([to_tensor(image) for image in batch]).to(device)  # (B, 3, S, S)
            decoded = codec.reconstruct(pixels.contiguous(memory_format=torch.channels_last))
            shown = [to_image(row) for row in decoded]
            levels = torch.stack([to_tensor(image) for image in shown])
            noise += psnr(levels, pixels.cpu()).tolist()
            facts += [images.facts(i) for i in indices]
            originals += batch
            reconstructions += shown
            bar.update(len(batch))
    if len(facts) < 2:
        raise ValueError(
            f"{len(facts)} of {count} images of {images.name} can be read: at least 2 are needed"
        )
    return Pairs(tuple(facts), originals, reconstructions, np.array(noise))


def _batches(
    images: ReferenceImages, count: int, batch_size: int
) -> Iterator[tuple[list[int], list[Image.Image]]]:
    indices, batch, lost = [], [], 0
    for i in range(count):
        try:
            batch.append(images.open(i))
            indices.append(i)
        except (CorruptSample, BadImage):
            lost += 1
        if len(batch) == batch_size:
            yield indices, batch
            indices, batch = [], []
    if batch:
        yield indices, batch
    if lost:
        say(f"left out {lost} of {count} images that cannot be read")


def share_metric(
    name: str, originals: NDArray, reconstructions: NDArray, resampling: Resampling
) -> Metric | None:
    """Of (N,) hits, NaN where an image does not count; None where none counts."""
    first = mean_estimate(originals, resampling, is_share=True)
    second = mean_estimate(reconstructions, resampling, is_share=True)
    if first is None or second is None:
        return None
    return Metric(name, second.interval, second.count, first.interval, _ratio(second, first))


def _ratio(a: Estimate, b: Estimate) -> Interval | None:
    """a / b on the same replicates; None where b is 0."""
    if not b.interval.value:
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        replicates = np.where(b.replicates > 0, a.replicates / b.replicates, np.nan)
    return interval_of(a.interval.value / b.interval.value, replicates, least=0.0)


def named_right(wanted: Sequence[str], ranked: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """(N,): whether the wanted name is among the ranked ones; NaN where none is wanted."""
    return np.array([float(w in names) if w else np.nan for w, names in zip(wanted, ranked, strict=True)])


def judge_metrics(pairs: Pairs, parts: tuple[Part, Part], networks: Networks) -> list[Metric | None]:
    """Category and colour named right by the judge."""
    judge = networks.judge
    if judge is None:
        return []
    features = [part.features(judge.network) for part in parts]
    known = set(judge.words.categories)
    wanted = [fact.category if fact.category in known else "" for fact in pairs.facts]
    found = []
    for name, top in (("category right", 1), ("category among 5", 5)):
        hits = [named_right(wanted, judge.top_categories(rows, top)) for rows in features]
        found.append(share_metric(f"{name}, {judge.name}", *hits, parts[0].resampling))
    colors = judge.words.colors
    if colors:
        wanted = [fact.known_color if fact.known_color in colors else "" for fact in pairs.facts]
        named = [[[colors[i]] for i in judge.color_probabilities(rows).argmax(1)] for rows in features]
        hits = [named_right(wanted, names) for names in named]
        found.append(share_metric(f"colour right, {judge.name}", *hits, parts[0].resampling))
    return found


def pixel_metric(pairs: Pairs, parts: tuple[Part, Part], measured: PixelColors | None) -> Metric | None:
    """Colour named right by the pixels' nearest training images."""
    if measured is None:
        return None
    wanted = [fact.known_color if fact.known_color in measured.colors else "" for fact in pairs.facts]
    names = [[[name] for name in measured.named(part.features(ColorHistogram()))] for part in parts]
    hits = [named_right(wanted, named) for named in names]
    return share_metric("colour right, pixels", *hits, parts[0].resampling)


def distance_metrics(
    pairs: Pairs, parts: tuple[Part, Part], networks: Sequence[FeatureNetwork], replicates: int
) -> list[Metric]:
    """PSNR, and on every network the Frechet distance and the mean cosine of an image with its reconstruction."""
    resampling = parts[0].resampling
    noise = mean_estimate(pairs.psnr, resampling)
    found = [Metric("PSNR, dB", noise.interval, noise.count, is_share=False)]
    for network in networks:
        real, decoded = (part.features(network).astype(np.float64) for part in parts)
        distance = Frechet(real).estimate(decoded, resampling, replicates)
        name = name_on("frechet_distance", network)
        found.append(Metric(name, distance.interval, distance.count, is_share=False))
        lengths = np.linalg.norm(real, axis=1) * np.linalg.norm(decoded, axis=1)
        cosine = mean_estimate((real * decoded).sum(1) / np.maximum(lengths, 1e-12), resampling)
        name = name_on("cosine", network)
        found.append(Metric(name, cosine.interval, cosine.count, is_share=False))
    return found


def show(metrics: Sequence[Metric], title: str) -> None:
    from rich.table import Table

    table = Table(title=title)
    table.add_column("metric", overflow="fold")
    for name in ("reconstructions", "originals", "of originals", "N"):
        table.add_column(name, justify="right")
    for metric in metrics:
        cells = [_cell(metric.reconstructions, metric.is_share), _cell(metric.originals, metric.is_share)]
        table.add_row(metric.name, *cells, _cell(metric.relative, True), str(metric.count))
    plain_console().print(table)


def _cell(value: Interval | None, is_share: bool) -> str:
    if value is None:
        return ""
    if is_share:
        return f"{value.value:.1%} [{100 * value.low:.1f}, {100 * value.high:.1f}]"
    return str(value)


def grid(pairs: Pairs, count: int) -> Image.Image | None:
    """Rows of originals above rows of their reconstructions, `count` images spread evenly over all."""
    count = min(count, len(pairs.facts)) // COLUMNS * COLUMNS or min(count, len(pairs.facts))
    if not count:
        return None
    chosen = np.linspace(0, len(pairs.facts) - 1, count).round().astype(int)
    rows = []
    for start in range(0, count, COLUMNS):
        part = chosen[start : start + COLUMNS]
        rows += [[images[i] for i in part] for images in (pairs.originals, pairs.reconstructions)]
    return stack_rows(rows)


def measure(
    codec: Codec, images: ReferenceImages, networks: Networks, options: Options, device: torch.device
) -> tuple[list[Metric], Pairs]:
    """All metrics that the shards and the networks allow."""
    pairs = reconstruct_all(codec, images, options, device)
    parts = pairs.parts(options)
    found = judge_metrics(pairs, parts, networks)
    if options.train_split:
        train = ReferenceImages.of_split(
            options.data, options.train_split, images.side, attributes=options.attributes
        )
        found.append(pixel_metric(pairs, parts, pixel_colors_of(train, range(len(train)), options.cache)))
    found += distance_metrics(pairs, parts, networks.statistics, options.frechet_replicates)
    return [metric for metric in found if metric], pairs


@command
def main(argv: Sequence[str] | None = None) -> list[Metric]:
    """Prints the table; returns the metrics."""
    options = parse_options(Options, argv, description=__doc__)
    device = pick_device(options.device)
    codec = open_codec(options.checkpoint, device, options.precision)
    side = options.image_size or codec.image_size
    if not side or side % codec.downsample_factor:
        raise ValueError(
            f"image_size must be a multiple of {codec.downsample_factor} for {codec.name}, not {side}"
        )
    images = ReferenceImages.of_split(options.data, options.split, side, attributes=options.attributes)
    judge = options.judge or judge_name()
    networks = Networks.load(judge, inception=options.inception, device=options.device)
    if not judge:
        say(
            "note: categories are not judged, no judge was trained under runs/: python -m evaluation.train_judge"
        )
    with OutputDirectory(options.out) as files:
        files.require_ours(("metrics.json", "grid.png"))
        metrics, pairs = measure(codec, images, networks, options, device)
        show(metrics, f"{codec.name}: {len(pairs.facts)} images of {side} px, {codec.code(side)}")
        for line in networks_note(networks):
            say(line)
        about = {"codec": {"name": codec.name, "sha256": codec.identity, "code": codec.code(side)}}
        about |= {"image_size": side, "networks": networks.identities, "options": to_mapping(options)}
        files.write_json("metrics.json", about | {"metrics": [metric.to_json() for metric in metrics]})
        page = grid(pairs, options.show)
        if page:
            with files.writing("grid.png") as temporary:
                page.save(temporary, "PNG")
        say(f"wrote {options.out / 'metrics.json'}" + (" and grid.png" if page else ""))
        return metrics


if __name__ == "__main__":
    main()
