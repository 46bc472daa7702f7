"""From line drawings to images with a ControlNet: one drawing, or every row of a published list of pairs.

    python -m diffusion.control "红色T恤" 8 out/ --line drawing.png                          # the run trained last
    python -m diffusion.control "红色T恤" 8 out/ --line drawing.png --whiten --controlnet runs/controlnet
    python -m diffusion.control "" 1 answer/ --pairs valid_data.parquet --controlnet runs/controlnet_line \\
        --sampling.num-steps 10 --sampling.cfg-scale 7 --sampling.scheduler ddim            # <id>.jpg and a zip
    python -m diffusion.control "a red dress" 4 out/ --line d.png --base stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --controlnet lllyasviel/sd-controlnet-canny

The same seed gives the same bytes; image i of a seed does not depend on the batch size.
"""

import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image

from common import checkpoint
from common.config import command, parse_options, to_mapping
from common.console.progress import progress
from common.files import read_json, sha256_file, write_json
from common.log import say
from common.outputs.label import LabelOptions, labelled
from common.outputs.out_directory import OutDirectory, manifest_of
from common.outputs.record import OutputDirectory
from data_tools.images.line_drawings import open_drawing, read_drawing, resize_lines
from data_tools.ingest.records import Problem
from data_tools.lines import drawing_of
from data_tools.readers.base import ReaderOptions
from data_tools.readers.detect import open_source
from diffusion.controlnet.model import KIND
from diffusion.controlnet.pipeline import ControlPipeline
from diffusion.sampling import SamplingOptions
from diffusion.white_background import Whitener, WhitenOptions, require_whiten, whiten_origin

FOLDER_NAME = "Realistic Drawing"  # of the published answers
FIRST_ID, MISSING_ID = 20000, 24807  # rows are numbered from the first; the second does not exist
ORIGIN = "control.json"  # how the images of a list were made
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Made:
    """One image, for the out directory."""

    image: Image.Image
    text: str
    index: int
    seconds: float
    key: str | None = None


@dataclass(frozen=True)
class Options:
    """Images that follow line drawings."""

    text: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TEXT")]
    """What the images show; "" with --pairs."""
    num_images: Annotated[tyro.conf.Positional[int], tyro.conf.arg(metavar="NUM_IMAGES")] = 8
    """Images of the drawing; 1 with --pairs."""
    out_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT_DIR")] = Path("out")
    """Directory for 0000.png ..., grid.png and images.jsonl; with --pairs for the published layout."""
    line: Path | None = None
    """Line drawing, dark on light or light on dark, of any size."""
    pairs: Path | None = None
    """Parquet or JSONL of the published layout: an image for every drawing and title in it."""
    controlnet: str = ""
    """Run, checkpoint, diffusers folder, hub id or .pth file; empty: the ControlNet trained last in runs/."""
    base: str = ""
    """Base model; empty: the one that the checkpoint names."""
    base_config: str = ""
    """For a base in a single file: folder or hub id with the configs and the tokenizer of its architecture."""
    scale: float = 1.0
    """How strongly the drawing counts, 0 to 2."""
    suffix: str | None = None
    """Appended to every text; default: as the ControlNet was trained."""
    negative: str | None = None
    """What the images should not show; default: as the ControlNet was trained."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    seed: int = 0
    """Seed of the images."""
    batch_size: int = 8
    """Images sampled side by side; does not change them."""
    whiten: bool = False
    """Put the products on a pure white background."""
    white: WhitenOptions = field(default_factory=WhitenOptions)
    """How --whiten does it."""
    label: Annotated[LabelOptions, tyro.conf.arg(name="")] = field(default_factory=LabelOptions)
    """What the files say of having been generated."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        if (self.line is None) == (self.pairs is None):
            raise ValueError("give one of --line DRAWING and --pairs LIST")
        if self.pairs and (self.text or self.num_images != 1):
            raise ValueError(
                'with --pairs the titles are the texts: python -m diffusion.control "" 1 OUT_DIR --pairs LIST'
            )
        if not 0 <= self.scale <= 2:
            raise ValueError(f"scale must lie in [0, 2], not {self.scale}")
        if self.num_images < 1 or self.batch_size < 1 or self.seed < 0:
            raise ValueError("num_images and batch_size must be at least 1, seed at least 0")
        require_whiten(self.whiten, self.white)


def open_pipeline(options: Options) -> ControlPipeline:
    """The ControlNet that is named, or trained last, with the prompts of the options."""
    name = options.controlnet or checkpoint.newest_run(KIND)
    if not name:
        raise FileNotFoundError(
            "no ControlNet was trained yet under runs/: run python -m diffusion.train_controlnet, or name one with "
            "--controlnet"
        )
    pipeline = ControlPipeline.open(str(name), options.base, options.base_config, options.device)
    given = {"suffix": options.suffix, "negative": options.negative}
    changes = {n: v for n, v in given.items() if v is not None}
    pipeline.prompting = replace(pipeline.prompting, **changes)
    return pipeline


def follow_one(options: Options, pipeline: ControlPipeline) -> Path:
    """All images of one drawing, into an out directory."""
    if not options.line.is_file():
        raise FileNotFoundError(f"no drawing {options.line}")
    try:
        lines, note = open_drawing(options.line.read_bytes(), pipeline.image_size)
    except ValueError as error:
        raise ValueError(f"{options.line}: {error}") from error
    if note:
        say(f"note: {options.line} is {note}")
    finish = finisher(options)
    drawing = {"line": str(options.line), "line_sha256": sha256_file(options.line)}
    origin = origin_of(options, pipeline) | {"source": drawing}
    with OutDirectory(options.out_dir, origin, options.label) as out:
        out.require_ours(options.num_images)
        for first in range(0, options.num_images, options.batch_size):
            count, started = min(options.batch_size, options.num_images - first), time.perf_counter()
            images = pipeline(
                options.text, lines, count, options.seed, options.sampling, options.scale, first
            )
            images = [finish(image) for image in images]
            seconds = (time.perf_counter() - started) / count
            for i, image in enumerate(images):
                out.add(Made(image, options.text, first + i, seconds))
        out.write_grid()
    return options.out_dir


def origin_of(options: Options, pipeline: ControlPipeline) -> dict[str, Any]:
    """What an image depends on beside its text, drawing and index."""
    return whiten_origin(options.whiten, options.white) | {
        "seed": options.seed,
        "sampling": to_mapping(options.sampling),
        "prompting": to_mapping(pipeline.prompting),
        "scale": options.scale,
        "base": str(pipeline.base.path),
        "controlnet": pipeline.sha256,
    }


def finisher(options: Options) -> Callable[[Image.Image], Image.Image]:
    """What happens to every image: onto white, or nothing."""
    if not options.whiten:
        return lambda image: image
    whitener = Whitener.open(options.white)
    return lambda image: whitener(image).image


def read_pairs(path: Path, size: int) -> Iterator[tuple[int, str, np.ndarray] | Problem]:
    """(row from 0, title, drawing (size, size)) of a published list, or why a row has none.

    The image of a row may be missing: it is what is asked for. As published, drawings are squashed to a square.
    """
    row = -1
    options = ReaderOptions(
        format="parquet" if path.suffix == ".parquet" else "jsonl", image_column="pd_line_drawing"
    )
    source = open_source(path, options)
    for part in source.parts:
        for item in source.read(part):
            row += 1
            if isinstance(item, Problem):
                yield item
                continue
            try:
                drawing = read_drawing(drawing_of(item) or item.image)
            except ValueError as error:
                yield Problem(item.where, item.key, "not_a_drawing", str(error) or "no readable image")
                continue
            yield row, item.captions[0], resize_lines(drawing.lines, (size, size))


def answer_id(row: int) -> int:
    """The published number of a row: from 20000 on, and one number is left out."""
    number = FIRST_ID + row
    return number if number < MISSING_ID else number + 1


def follow_all(options: Options, pipeline: ControlPipeline) -> Path:
    """`Realistic Drawing/<id>.jpg` for every row and the zip of the folder; rows that stand already are kept.

    Raises ValueError where the directory holds images of another list, or made otherwise.
    """
    finish, lost = finisher(options), []
    made_by = origin_of(options, pipeline) | {"pairs_sha256": sha256_file(options.pairs)}
    if options.label.label != "off":
        made_by |= {"label": to_mapping(options.label)}
    with OutputDirectory(options.out_dir) as whole, OutputDirectory(options.out_dir / FOLDER_NAME) as out:
        whole.require_ours([ORIGIN, f"{FOLDER_NAME}.zip"])
        if (whole.path / ORIGIN).is_file() and read_json(whole.path / ORIGIN) != made_by:
            raise ValueError(
                f"{options.out_dir} holds images of another list, or made otherwise: name another folder"
            )
        with whole.writing(ORIGIN) as temporary:
            write_json(temporary, made_by)
        for item in progress(read_pairs(options.pairs, pipeline.image_size), unit="image"):
            if isinstance(item, Problem):
                lost.append(item)
                continue
            row, text, lines = item
            name = f"{answer_id(row)}.jpg"
            if (out.path / name).is_file():
                continue
            (image,) = pipeline(text, lines, 1, options.seed, options.sampling, options.scale, first=row)
            image, arguments = labelled(
                finish(image), "JPEG", options.label, manifest_of(made_by, text, index=row)
            )
            with out.writing(name) as temporary:
                image.save(temporary, format="JPEG", quality=JPEG_QUALITY, **arguments)
        for problem in lost[:5]:
            say(f"skipped: {problem.where}: {problem.detail}")
        names = sorted(p.name for p in out.path.glob("[0-9]*.jpg"))
        if not names:
            raise ValueError(f"no row of {options.pairs} has a drawing and a title that can be read")
        with whole.writing(f"{FOLDER_NAME}.zip") as temporary:
            write_zip(temporary, out.path, names)
    say(f"{len(names)} images in {out.path}, {len(lost)} rows skipped, {FOLDER_NAME}.zip beside them")
    return options.out_dir


def write_zip(target: Path, folder: Path, names: Sequence[str]) -> None:
    """The same bytes each time: `Realistic Drawing/<id>.jpg`, stored."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name in names:
            info = zipfile.ZipInfo(f"{FOLDER_NAME}/{name}", (1980, 1, 1, 0, 0, 0))
            archive.writestr(info, (folder / name).read_bytes())


@command
def main(argv: Sequence[str] | None = None) -> Path:
    """The command of this module; returns the out directory."""
    options = parse_options(Options, argv, description=__doc__)
    pipeline, started = open_pipeline(options), time.perf_counter()
    found = follow_all(options, pipeline) if options.pairs else follow_one(options, pipeline)
    say(f"{found} | {time.perf_counter() - started:.1f} s")
    return found


if __name__ == "__main__":
    main()
