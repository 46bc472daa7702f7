"""Generate images of a text with a trained GAN.

    python -m gan.generate "一件红色的连衣裙" 8 out/
    python -m gan.generate "一双黑色的鞋" 16 out/ --psi 0.7 --seed 3             # less variety, fewer failures
    python -m gan.generate "一件红色的T恤" 8 out/ --interpolate "一条蓝色牛仔裤"    # a strip from one text to the other
    python -m gan.generate "一双黑色的鞋" 8 out/ --whiten                          # on pure white
    python -m gan.generate "" 8 out/ --category Shoes                             # where the shards carried categories

Takes the GAN that was trained last; `--checkpoint` names another. The same seed gives the same bytes; image i of a seed
does not depend on how many are asked for. Then: python rerank.py out/
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from common.config import command, parse_options, to_mapping
from common.log import say
from common.outputs.label import LabelOptions
from common.outputs.out_directory import OutDirectory, Request
from diffusion.white_background import WhitenOptions, onto_white, require_whiten, whiten_origin
from gan.pipeline import Generated, SamplingOptions, TextToGan, default_checkpoint

DEFAULT_TEXT = "一件红色的连衣裙"


@dataclass(frozen=True)
class Options:
    """Generate images of a text."""

    text: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TEXT")] = DEFAULT_TEXT
    """What to show; "" with --category."""
    num_images: Annotated[tyro.conf.Positional[int], tyro.conf.arg(metavar="NUM_IMAGES")] = 8
    """Images; with --interpolate the steps from one text to the other."""
    out_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT_DIR")] = Path("out")
    """Directory for 0000.png ..., grid.png and images.jsonl."""
    checkpoint: str = ""
    """Checkpoint directory, run directory (its best checkpoint) or hub id; empty: the newest of runs/."""
    seed: int = 0
    """Seed of the images."""
    sampling: Annotated[SamplingOptions, tyro.conf.arg(name="")] = field(default_factory=SamplingOptions)
    """How images are generated."""
    interpolate: str = ""
    """Second text: image 0 of the seed, its text going from the first to this one."""
    label: Annotated[LabelOptions, tyro.conf.arg(name="")] = field(default_factory=LabelOptions)
    """What the files say of having been generated."""
    whiten: bool = False
    """Put the products on a pure white background."""
    white: WhitenOptions = field(default_factory=WhitenOptions)
    """How --whiten does it."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise ValueError(f"num_images must be at least 1, not {self.num_images}")
        if self.interpolate and self.num_images < 2:
            raise ValueError(f"an interpolation needs at least 2 images, not {self.num_images}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, not {self.seed}")
        require_whiten(self.whiten, self.white)


def origin(options: Options, pipeline: TextToGan) -> dict[str, Any]:
    """What every line of images.jsonl repeats: all that an image depends on beside its text and index."""
    return whiten_origin(options.whiten, options.white) | {
        "seed": options.seed,
        "sampling": to_mapping(options.sampling),
        "interpolate": options.interpolate or None,
        "checkpoint": pipeline.sha256,
    }


def generated(options: Options, pipeline: TextToGan) -> Iterator[Generated]:
    """The images asked for, in order."""
    if not options.interpolate:
        requests = (Request(options.text, i) for i in range(options.num_images))
        yield from pipeline.generate(requests, options.seed, options.sampling)
        return
    started = time.perf_counter()
    strip = pipeline.interpolate(
        options.text, options.interpolate, options.num_images, options.seed, options.sampling
    )
    seconds = (time.perf_counter() - started) / len(strip)
    for i, image in enumerate(strip):
        yield Generated(image, options.text, i, seconds)


@command
def main(argv: Sequence[str] | None = None) -> Path:
    """Generate; returns the out directory."""
    options = parse_options(Options, argv, description=__doc__)
    with OutDirectory(options.out_dir, label=options.label) as out:
        out.require_ours(options.num_images)
        checkpoint = options.checkpoint or default_checkpoint()
        pipeline = TextToGan.from_pretrained(checkpoint, options.device)
        label = pipeline.label_number(options.sampling.category)
        for text in filter(None, (options.text, options.interpolate)):
            if note := pipeline.complain(text, label):
                say(f"note: {note}")
        out.origin = origin(options, pipeline)
        started = time.perf_counter()
        for found in onto_white(generated(options, pipeline), options.whiten, options.white):
            out.add(found)
        out.write_grid(options.num_images if options.interpolate and options.num_images <= 64 else None)
    seconds = (time.perf_counter() - started) / out.count
    say(f"{out.count} images in {out.path} | {seconds:.3f} s each | by {checkpoint}")
    if not options.interpolate:
        say(f"next: python rerank.py {out.path}")
    return out.path


if __name__ == "__main__":
    main()
