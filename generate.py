"""Generate images of a text.

    python generate.py "一件红色的连衣裙" 8 out/ --rank                   # best first, as rerank.py would order them
    python generate.py "一双黑色的鞋" 8 out/ --cfg-scale 4 --top-p 0.95 --seed 7
    python generate.py "" 4 out/ --prompts-file prompts.txt --batch-size 16       # one text a line; goes on if killed
    python generate.py "" 1 out/ --prompts-file T2I_test.text.tsv                 # id<TAB>text; ids become keys
    python generate.py "" 4 out/ --prompts-file prompts.txt --engine ray          # on the nodes of a Ray cluster
    python generate.py "一条蓝色牛仔裤" 4 out/ --prime image.png --keep-rows 8    # keeps the image's upper rows
    python generate.py "一条蓝色牛仔裤" 4 out/ --inpaint image.png --mask mask.png
    python generate.py "一条蓝色牛仔裤" 4 out/ --vary image.png --strength 0.4
    python generate.py "红色T恤" 8 out/ --line drawing.png             # follows the drawing; a generator with --lines
    python generate.py "蓝色T恤" 4 out/ --like photo.png               # same shape and background, colour of the text
    python generate.py "红色T恤" 8 out/ --whiten                       # on pure white

Takes the generator that was trained last, else the one that ships; `--checkpoint` names another. The same seed gives
the same bytes; image i of a seed does not depend on the batch size. Without --rank: python rerank.py out/ afterwards
"""

import common  # noqa: F401 (before torch: Ctrl-C meanwhile leaves no traceback)

# isort: split

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from PIL import Image

from common.config import command, parse_options, to_mapping
from common.console.progress import progress
from common.files import sha256_file
from common.log import say
from common.outputs.label import LabelOptions
from common.outputs.out_directory import OutDirectory, Request
from dalle import default_checkpoint, inpaint
from dalle.engines import FastOptions
from dalle.inpaint import Source
from dalle.lines import LineControl
from dalle.pipeline import TextToImage
from dalle.sampling import SamplingOptions
from data_tools.engine import EngineOptions
from data_tools.images import LineMethod
from diffusion.white_background import WhitenOptions, onto_white, require_whiten, whiten_origin

if TYPE_CHECKING:
    from data_tools.prompts import Unused

NEEDED = (  # flags, and those of which they need one
    ("keep_rows", ("prime",)),
    ("mask", ("inpaint",)),
    ("strength", ("vary",)),
    ("line_scale", ("line", "like")),
    ("line_cfg_scale", ("line", "like")),
    ("like_method", ("like",)),
)
DEFAULT_TEXT = "一件红色的连衣裙"


@dataclass(frozen=True)
class Options:
    """Generate images of a text."""

    text: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TEXT")] = DEFAULT_TEXT
    """What to generate; "" with --prompts-file."""
    num_images: Annotated[tyro.conf.Positional[int], tyro.conf.arg(metavar="NUM_IMAGES")] = 8
    """Images of each text."""
    out_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT_DIR")] = Path("out")
    """Directory for 0000.png ..., grid.png and images.jsonl."""
    checkpoint: str = ""
    """Checkpoint directory, run directory or hub id; empty: the newest of runs/, else the one that ships."""
    seed: int = 0
    """Seed of the images."""
    sampling: Annotated[SamplingOptions, tyro.conf.arg(name="")] = field(default_factory=SamplingOptions)
    """How tokens are sampled."""
    negative: str = ""
    """What the images should not show: guidance leads away from it."""
    batch_size: int = 8
    """Images generated side by side; does not change them."""
    prompts_file: Path | None = None
    """Instead of the text: .txt (a text a line), .tsv (id<TAB>text), .csv or .jsonl; a run that was killed goes on."""
    prime: Path | None = None
    """Image whose upper rows stay."""
    keep_rows: int | None = None
    """Rows of image tokens that --prime keeps; default half of them."""
    inpaint: Path | None = None
    """Image of which --mask is redrawn."""
    mask: Path | None = None
    """Image that is white where --inpaint redraws."""
    vary: Path | None = None
    """Image to make variations of."""
    strength: float | None = None
    """Share of the tokens that --vary redraws, above 0 to 1; default 0.5."""
    line: Path | None = None
    """Line drawing that the images follow: dark on light or light on dark, of any size."""
    line_scale: float | None = None
    """Weight of the drawing, 0 (none) to 10; default 1."""
    line_cfg_scale: float | None = None
    """Guidance on the drawing beside that on the text, 0 to 10; default 1, which costs nothing."""
    like: Path | None = None
    """Photo whose shape and plain background stay while colour and material follow the text."""
    like_method: LineMethod | None = None
    """How --like draws the photo's lines: canny, xdog or contour; default canny."""
    whiten: bool = False
    """Put the products on a pure white background."""
    white: WhitenOptions = field(default_factory=WhitenOptions)
    """How --whiten does it."""
    label: Annotated[LabelOptions, tyro.conf.arg(name="")] = field(default_factory=LabelOptions)
    """What the files say of having been generated."""
    rank: bool = False
    """Order the images too, in the same process, with the same result as rerank.py afterwards."""
    ranker: str = ""
    """What --rank orders by; empty: as rerank.py, which for the generator that ships takes the ranker beside it."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    fast: FastOptions = field(default_factory=FastOptions)
    """How the generator is run."""
    work: tyro.conf.OmitArgPrefixes[EngineOptions] = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise ValueError(f"num_images must be at least 1, not {self.num_images}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        if self.prompts_file and self.text not in ("", DEFAULT_TEXT):
            raise ValueError(
                f'give a text or --prompts-file, not both: python generate.py "" {self.num_images} ...'
            )
        if sum(path is not None for path in (self.prime, self.inpaint, self.vary, self.like)) > 1:
            raise ValueError("choose one of --prime, --inpaint, --vary and --like")
        if self.line and self.like:
            raise ValueError("--like takes its lines from the photo: leave --line out")
        for flag, needed in NEEDED:
            if getattr(self, flag) is not None and all(getattr(self, name) is None for name in needed):
                raise ValueError(f"--{flag.replace('_', '-')} needs --{' or --'.join(needed)} PICTURE")
        require_whiten(self.whiten, self.white)
        if self.ranker and not self.rank:
            raise ValueError("--ranker needs --rank")
        if self.work.cluster and not self.prompts_file:
            raise ValueError("--engine ray is for many texts: name them with --prompts-file")
        if self.inpaint and not self.mask:
            raise ValueError("--inpaint needs --mask PICTURE, white where it is to be redrawn")


def open_mask(path: Path, image: Image.Image) -> Image.Image:
    """White where the image is to be redrawn. Raises ValueError for a mask of another shape, which would not lie on
    it."""
    from data_tools.images.decode import open_file as open_image

    mask = open_image(path, background="black")
    if abs(mask.width * image.height - mask.height * image.width) > 0.02 * mask.height * image.width:
        sizes = f"{mask.width} x {mask.height}, the image {image.width} x {image.height}"
        raise ValueError(f"the mask {path} is {sizes}: both must have the same shape")
    return mask


def make_source(options: Options, pipeline: TextToImage) -> Source | None:
    """The image that new ones start from, if one was given."""
    path = options.prime or options.inpaint or options.vary or options.like
    if path is None:
        return None
    from data_tools.images.decode import open_file as open_image

    tokenizer, image = pipeline.image_tokenizer, open_image(path)
    if options.prime:
        return inpaint.prime(tokenizer, image, options.keep_rows)
    if options.inpaint:
        return inpaint.inpaint(tokenizer, image, open_mask(options.mask, image))
    if options.vary:
        return inpaint.vary(tokenizer, image, 0.5 if options.strength is None else options.strength)
    source = inpaint.keep_background(tokenizer, image)
    if source is None:
        say(f"note: {path} has no plain background that could be kept: all of the image is made anew")
    return source


def make_line(options: Options, pipeline: TextToImage) -> LineControl | None:
    """The drawing that the images follow, if one was given. Raises FileNotFoundError or ValueError naming the file."""
    # Not the image's size: a decoder of larger images may stand beside the generator (vq.enlarge).
    size, path = (
        pipeline.config.line_size or pipeline.image_tokenizer.image_size,
        options.line or options.like,
    )
    if path is None:
        return None
    from common.square import resize_square
    from data_tools.images.decode import open_file as open_image
    from data_tools.images.line_drawings import extract, open_drawing

    if options.like:
        lines = extract(resize_square(open_image(path), size), options.like_method or "canny")
    else:
        if not path.is_file():
            raise FileNotFoundError(f"no drawing {path}")
        try:
            lines, note = open_drawing(path.read_bytes(), size)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if note:
            say(f"note: {path} is {note}")
    scales = {"scale": options.line_scale, "cfg_scale": options.line_cfg_scale}
    return LineControl(lines, **{name: value for name, value in scales.items() if value is not None})


def origin(options: Options, pipeline: TextToImage) -> dict[str, Any]:
    """What every line of images.jsonl repeats: all that an image depends on beside its text and index."""
    names = ("prime", "inpaint", "vary", "line", "like", *(flag for flag, _ in NEEDED))
    given = {n: getattr(options, n) for n in names if getattr(options, n) is not None}
    source: dict[str, Any] = {n: str(value) for n, value in given.items()}
    source |= {f"{n}_sha256": sha256_file(v) for n, v in given.items() if isinstance(v, Path) and v.is_file()}
    return whiten_origin(options.whiten, options.white) | {
        "seed": options.seed,
        "sampling": to_mapping(options.sampling),
        "negative": options.negative,
        "source": source or None,
        "engine": pipeline.fast.engine,
        "weights": pipeline.fast.weights,
        "kernels": pipeline.kernels,
        "checkpoint": pipeline.sha256,
    }


def requests_of_file(
    options: Options, pipeline: TextToImage, out: OutDirectory
) -> tuple[Iterator[Request], "Unused"]:
    """What is not in `out` yet of the texts of a file, and what of the file is not generated, as it is read."""
    from data_tools.prompts import Unused, read_prompts, usable

    unused = Unused()
    prompts = usable(read_prompts(options.prompts_file), lambda text: pipeline.encode_text(text)[1], unused)
    requests = out.continue_from(
        Request(p.text, i, p.key) for p in prompts for i in range(options.num_images)
    )
    if out.count:
        say(f"{out.count} images stand in {out.path}: going on behind them")
    if leftovers := out.num_leftovers():
        say(f"note: {leftovers} images in {out.path} were generated otherwise and give way to new ones")
    return requests, unused


def num_texts_of(prompts_file: Path) -> int:
    """Raises FileNotFoundError, or ValueError naming the line, before anything is generated."""
    from data_tools.prompts import count_prompts

    return count_prompts(prompts_file)


def generate_all(options: Options, pipeline: TextToImage, out: OutDirectory, num_texts: int) -> int:
    """Generates and writes everything; returns the number of images generated now."""
    source, line = make_source(options, pipeline), make_line(options, pipeline)
    if options.prompts_file:
        requests, unused = requests_of_file(options, pipeline, out)
    else:
        requests, unused = (Request(options.text, i) for i in range(options.num_images)), None
        if note := pipeline.encode_text(options.text)[1]:
            say(f"note: {note}")
    stood, total = out.count, num_texts * options.num_images
    how = (options.seed, options.sampling, options.negative)
    if cluster := options.work.cluster:
        from dalle.spread import GenerateBatches, generate_on

        checkpoint = str(pipeline.directory.resolve())
        work = GenerateBatches(checkpoint, options.device, pipeline.fast, *how, source, line)
        images = generate_on(cluster, work, requests, options.batch_size)
    else:
        images = pipeline.generate_requests(requests, *how, options.batch_size, source, line)
    images = onto_white(images, options.whiten, options.white)
    for image in progress(images, total=total, initial=stood, unit="image"):
        out.add(image)
    if unused:
        unused.report(options.prompts_file)
    if not out.count:
        raise ValueError(f"{options.prompts_file} holds no text that can be generated")
    out.forget_leftovers()
    return out.count - stood


def load_ranker_for(options: Options, pipeline: TextToImage) -> Any:
    """The ranker that rerank.py would take. Raises FileNotFoundError or ValueError before an image is made."""
    from rankers import default_ranker, load_ranker

    return load_ranker(options.ranker or str(default_ranker(pipeline.sha256)), options.device)


def rank_all(options: Options, ranker: Any, out: OutDirectory) -> None:
    """What rerank.py would do on the directory."""
    from rankers.ranking import rank_directory, report, write_ranking

    texts = rank_directory(options.out_dir, ranker)
    write_ranking(out.files, ranker, texts)
    report(options.out_dir, ranker, texts)


@command
def main(argv: Sequence[str] | None = None) -> Path:
    """Generate; returns the out directory."""
    options = parse_options(Options, argv, description=__doc__)
    num_texts = num_texts_of(options.prompts_file) if options.prompts_file else 1
    with OutDirectory(options.out_dir, label=options.label) as out:
        out.require_ours(num_texts * options.num_images)
        if options.rank:
            from rankers.ranking import ranking_names

            out.files.require_ours(ranking_names(num_texts, options.num_images))
        checkpoint = options.checkpoint or default_checkpoint()
        pipeline = TextToImage.from_pretrained(checkpoint, options.device, options.fast)
        out.origin = origin(options, pipeline)
        ranker = load_ranker_for(options, pipeline) if options.rank else None
        started = time.perf_counter()
        drawn = generate_all(options, pipeline, out, num_texts)
        out.write_grid(options.num_images if options.prompts_file and 1 < options.num_images <= 16 else None)
        seconds = (time.perf_counter() - started) / max(1, drawn)
        say(
            f"{out.count} images in {out.path} | {drawn} generated now, {seconds:.2f} s each | by {checkpoint}"
        )
        if options.rank:
            rank_all(options, ranker, out)
    if not options.rank:
        say(f"next: python rerank.py {out.path}")
    return out.path


if __name__ == "__main__":
    main()
