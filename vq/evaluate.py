"""How good an image tokenizer is: metrics over the validation images, and a page of them, worst first.

    python -m vq.evaluate runs/goods_128_vqgan ../shared/data/goods
    python -m vq.evaluate runs/goods_128_vqgan ../shared/data/goods --perceptual runs/perceptual_eval

PSNR (also over the goods alone, as vq.losses.foreground guesses them) and SSIM of 8-bit levels; LPIPS, or the named
features of vq.train_perceptual in its place; use of the codebook; colour shift; images a second. Writes
figures.json and index.html (one file, images inside). Whether goods are still recognised, and rFID: python -m
evaluation.reconstructions.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from PIL import Image
from torch import Tensor

from common.config import command, parse_options
from common.console.html import image_url, render
from common.distributed import pick_device
from common.files import atomic_path
from common.image import to_image
from common.log import say
from common.outputs.record import OutputDirectory
from common.precision import Precision, autocast
from common.text.language import Words
from data_tools.shards.loader import DecodeImage, eval_batches
from kernels import Kernels, accelerate
from vq.data import open_images
from vq.encoding import ImageEncoder
from vq.losses.foreground import border_mask
from vq.losses.perceptual import PerceptualDistance, load_perceptual
from vq.losses.reconstruction import color_shift, psnr
from vq.model import ImageTokenizer
from vq.quantizer import CodeUsage


@dataclass(frozen=True)
class Options:
    """Evaluate an image tokenizer."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """A checkpoint, a run directory or a hub id."""
    data: Annotated[str, tyro.conf.Positional]
    """Image shards with val-*.tar (a folder, http://, s3:// ...), or with --folder a plain folder of images."""
    folder: bool = False
    """`data` is a plain folder: its held-out images are looked at."""
    split: str = "val"
    """Which shards: val or train."""
    out: Path = Path("out/tokenizer")
    """Directory for figures.json and index.html."""
    perceptual: str = "auto"
    """lpips, a directory made by vq.train_perceptual, auto (lpips if it is here, else runs/perceptual), or none."""
    image_size: int = 0
    """Side in pixels; 0: that of training."""
    limit: int = 0
    """Images to look at; 0: all."""
    show: int = 96
    """Images on the page."""
    batch_size: int = 32
    """Images of one pass."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """auto takes bf16 autocast where the machine has it."""
    kernels: Kernels = "auto"
    """auto: compiled code on CPUs where it is faster; off: PyTorch."""

    def __post_init__(self) -> None:
        for name, low in (("limit", 0), ("show", 0), ("batch_size", 1), ("image_size", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, not {getattr(self, name)}")


@dataclass(frozen=True)
class Row:
    """One image."""

    key: str
    text: str
    psnr: float
    psnr_goods: float
    ssim: float
    perceptual: float | None
    original: Image.Image
    reconstruction: Image.Image


@dataclass
class Totals:
    """Sums over images."""

    usage: CodeUsage
    rows: list[Row] = field(default_factory=list)
    shifts: list[Tensor] = field(default_factory=list)
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0
    timed: int = 0


def levels(images: Tensor) -> Tensor:
    """[-1, 1] -> whole numbers 0..255, float."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round()


@torch.no_grad()
def evaluate(
    tokenizer: ImageTokenizer, options: Options, device: torch.device
) -> tuple[dict[str, Any], list[Row]]:
    """Metrics by name, and the images worst first. Raises ValueError for data that holds none."""
    perceptual = _perceptual(options, device)
    totals = Totals(CodeUsage(tokenizer.config.codebook_size, tokenizer.config.code_depth))
    encoder = ImageEncoder(tokenizer, device, options.precision)
    for batch in _batches(options, options.image_size or tokenizer.image_size):
        _add(totals, batch, encoder, perceptual, options, device)
    if not totals.rows:
        raise ValueError(f"none of the images in {options.data} could be read")
    rows, shift = totals.rows, torch.cat(totals.shifts)
    metrics: dict[str, Any] = {
        "pictures": len(rows),
        "psnr": sum(r.psnr for r in rows) / len(rows),
        "psnr_goods": sum(r.psnr_goods for r in rows) / len(rows),
        "ssim": sum(r.ssim for r in rows) / len(rows),
        "perceptual": sum(r.perceptual for r in rows) / len(rows) if perceptual else None,
        "perceptual_kind": perceptual.name if perceptual else "not measured",
        "color_shift": float(shift.mean(0).abs().max()),
        "encode_per_second": totals.timed / totals.encode_seconds if totals.timed else None,
        "decode_per_second": totals.timed / totals.decode_seconds if totals.timed else None,
    } | totals.usage.metrics()
    order = (lambda r: -r.perceptual) if perceptual else (lambda r: r.psnr)
    return metrics, sorted(rows, key=order)


def _perceptual(options: Options, device: torch.device) -> PerceptualDistance | None:
    if options.perceptual == "none":
        return None
    try:
        return load_perceptual(options.perceptual, device)
    except FileNotFoundError as error:
        if options.perceptual != "auto":
            raise
        say(f"note: the perceptual metric is left out: {error}")
        return None


def _batches(options: Options, image_size: int) -> Iterator[dict[str, Any]]:
    from common.console.progress import progress

    folder = options.data if options.folder else ""
    index = open_images(options.data, folder, options.split)
    count = min(len(index), options.limit) if options.limit else len(index)
    decode = DecodeImage(image_size, first_caption=True)
    with progress(total=count, desc="evaluating", unit=" images") as bar:
        for batch in eval_batches(index, decode, options.batch_size, count):
            yield batch
            bar.update(len(batch["key"]))


def _add(
    totals: Totals,
    batch: dict[str, Any],
    encoder: ImageEncoder,
    perceptual: PerceptualDistance | None,
    options: Options,
    device: torch.device,
) -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    images, tokenizer = batch["image"].to(device, memory_format=torch.channels_last), encoder.tokenizer
    grid = (images.shape[-2] // tokenizer.downsample_factor, images.shape[-1] // tokenizer.downsample_factor)
    with autocast(device, options.precision):
        if not totals.rows:  # the first pass allocates and chooses kernels: untimed
            tokenizer.decode_ids(encoder(images), grid)
        started = _clock(device)
        ids = encoder(images)
        encoded = _clock(device)
        decoded = tokenizer.decode_ids(ids, grid)
        ended = _clock(device)
        distances = perceptual(decoded, images).tolist() if perceptual else [None] * len(images)
    totals.encode_seconds += encoded - started
    totals.decode_seconds += ended - encoded
    totals.timed += len(images)
    totals.usage.add(ids)
    totals.shifts.append(color_shift(decoded, images).cpu())
    rounded = levels(decoded) / 127.5 - 1
    similar = ssim(levels(decoded), levels(images), data_range=255.0, reduction="none").view(-1).tolist()
    noise, on_goods = psnr(rounded, images).tolist(), psnr(rounded, images, border_mask(images)).tolist()
    for i, key in enumerate(batch["key"]):
        pair = to_image(images[i]), to_image(decoded[i])
        row = Row(key, batch["text"][i], noise[i], on_goods[i], similar[i], distances[i], *pair)
        totals.rows.append(row)


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def write_page(path: Path, metrics: dict[str, Any], rows: Sequence[Row], title: str) -> None:
    """One HTML file: the metrics, then original | reconstruction of `rows` in their order."""
    shown = [(name.replace("_", " "), _short(value)) for name, value in metrics.items()]
    page = render(
        "vq/templates/evaluate.html", Words({}, "en"), title=title, metrics=shown, rows=rows, url=image_url
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "not measured" if value is None else str(value)


@command
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Evaluate; returns the metrics."""
    options = parse_options(Options, argv, description=__doc__)
    with OutputDirectory(options.out) as files:
        files.require_ours(("figures.json", "index.html"))
        return report(options, files)


def report(options: Options, files: OutputDirectory) -> dict[str, Any]:
    """Evaluate, show and write."""
    device = pick_device(options.device)
    tokenizer = ImageTokenizer.from_pretrained(options.checkpoint, device)
    if options.kernels == "auto":
        say(str(accelerate(tokenizer, in_bf16=options.precision != "fp32")))
    metrics, rows = evaluate(tokenizer, options, device)
    for name, value in metrics.items():
        say(f"{name:>18}  {_short(value)}")
    about = {
        "checkpoint": options.checkpoint,
        "data": options.data,
        "codes_sha256": tokenizer.codes_sha256,
    }
    files.write_json("figures.json", metrics | about)
    with files.writing("index.html") as temporary:
        write_page(temporary, metrics, rows[: options.show], f"Image tokenizer {options.checkpoint}")
    say(f"wrote {options.out / 'index.html'} and figures.json")
    return metrics


if __name__ == "__main__":
    main()
