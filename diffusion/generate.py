"""Images of a text from a diffusion base, into an out directory as generate.py writes it.

    python -m diffusion.generate 一件红色的T恤 8 out/                         # the base that was trained last
    python -m diffusion.generate 一只狮子 2 out/ --base runs/goods_128_diffusion --lora emoji.safetensors:0.8
    python -m diffusion.generate 一只狮子 2 out/ --base IDEA-CCNL/Taiyi-Stable-Diffusion-1B-Chinese-v0.1 \\
        --style "卡通风格，暖色调，科技感" --negative "低质量，模糊" --num-steps 50 --cfg-scale 7.5
    python -m diffusion.generate 一双黑色的鞋 4 out/ --image shoe.png --strength 0.5
    python -m diffusion.generate 一双黑色的鞋 4 out/ --whiten                # on pure white
    python -m diffusion.generate "" 1 out/ --prompts-file prompts.txt       # one text a line; goes on if killed

The same seed gives the same bytes; image i of a seed does not depend on the batch size. Then: python rerank.py out/
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from common.config import command, parse_options, to_mapping
from common.console.progress import progress
from common.files import sha256_file
from common.log import say
from common.outputs.label import LabelOptions
from common.outputs.out_directory import OutDirectory, Request
from common.precision import Precision
from data_tools.images.decode import open_file
from data_tools.prompts import Prompt, Unused, count_prompts, read_prompts, usable
from diffusion.base import newest_base
from diffusion.pipeline import DiffusionToImage, Prompting, Start
from diffusion.sampling import SamplingOptions
from diffusion.white_background import WhitenOptions, onto_white, require_whiten, whiten_origin

DEFAULT_TEXT = "一件红色的连衣裙"


@dataclass(frozen=True)
class Options:
    """Generate images of a text from a diffusion base."""

    text: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TEXT")] = DEFAULT_TEXT
    """What the images show; "" with --prompts-file."""
    num_images: Annotated[tyro.conf.Positional[int], tyro.conf.arg(metavar="NUM_IMAGES")] = 8
    """Images of each text."""
    out_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT_DIR")] = Path("out")
    """Directory for 0000.png ..., grid.png and images.jsonl."""
    base: str = ""
    """Folder in diffusers' layout, run directory, hub id or .safetensors file; empty: the newest of runs/."""
    base_config: str = ""
    """For a single .safetensors file: folder or hub id with the configs and the tokenizer of its architecture."""
    lora: tuple[str, ...] = ()
    """Adapters FILE or FILE:WEIGHT, merged into the base before sampling."""
    seed: int = 0
    """Seed of the images."""
    sampling: Annotated[SamplingOptions, tyro.conf.arg(name="")] = field(default_factory=SamplingOptions)
    """How images are sampled."""
    prompting: Annotated[Prompting, tyro.conf.arg(name="")] = field(default_factory=Prompting)
    """What is added to texts."""
    image: Path | None = None
    """Image that new ones start from."""
    strength: float | None = None
    """Share of the steps that change --image, above 0 to 1; default 0.6."""
    size: int | None = None
    """Side in pixels; default: the side that the base was trained for."""
    text_len: int | None = None
    """Tokens of every padded text; default: as the base was trained. Another length changes what the UNet reads."""
    batch_size: int = 8
    """Images sampled side by side; does not change them."""
    prompts_file: Path | None = None
    """Instead of the text: .txt with a text a line, .tsv with id<TAB>text, or .jsonl; a run that was killed goes on."""
    label: Annotated[LabelOptions, tyro.conf.arg(name="")] = field(default_factory=LabelOptions)
    """What the files say of having been generated."""
    whiten: bool = False
    """Put the products on a pure white background."""
    white: WhitenOptions = field(default_factory=WhitenOptions)
    """How --whiten does it."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """auto takes bf16 weights where the machine computes in bf16, else float32."""

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise ValueError(f"num_images must be at least 1, not {self.num_images}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        if self.prompts_file and self.text not in ("", DEFAULT_TEXT):
            raise ValueError('give a text or --prompts-file, not both: python -m diffusion.generate "" ...')
        if self.strength is not None and self.image is None:
            raise ValueError("--strength needs --image FILE")
        if self.prompting.negative and not self.sampling.is_guided:
            raise ValueError("a negative prompt works through guidance: set --cfg-scale above 1")
        require_whiten(self.whiten, self.white)


def make_start(options: Options) -> Start | None:
    """The image that new ones start from, if one was given."""
    if options.image is None:
        return None
    return Start(open_file(options.image), 0.6 if options.strength is None else options.strength)


def origin_of(options: Options, pipeline: DiffusionToImage) -> dict[str, Any]:
    """What every line of images.jsonl repeats: all that an image depends on beside its text and index."""
    source = None
    if options.image:
        strength = 0.6 if options.strength is None else options.strength
        source = {
            "image": str(options.image),
            "image_sha256": sha256_file(options.image),
            "strength": strength,
        }
    return whiten_origin(options.whiten, options.white) | {
        "seed": options.seed,
        "sampling": to_mapping(options.sampling) | {"size": options.size or pipeline.base.image_size},
        "prompting": to_mapping(options.prompting),
        "text_len": pipeline.base.text_len,
        "source": source,
        "weights": str(pipeline.dtype).removeprefix("torch."),
        "checkpoint": pipeline.identity.sha256,
        "loras": pipeline.identity.loras,
    }


def generate_all(options: Options, pipeline: DiffusionToImage, out: OutDirectory, num_texts: int) -> int:
    """Samples and writes everything; returns the number of images made now."""
    unused = Unused()
    if options.prompts_file:
        prompts = usable(
            read_prompts(options.prompts_file), lambda t: pipeline.note(t, options.prompting), unused
        )
    else:
        prompts = iter([Prompt(options.text)])
        note = pipeline.note(options.text, options.prompting)
        if note:
            say(f"note: {note}")
    requests = (Request(p.text, i, p.key) for p in prompts for i in range(options.num_images))
    if options.prompts_file:
        requests = out.continue_from(requests)
    if out.count:
        say(f"{out.count} images stand in {out.path}: going on behind them")
    stood, total = out.count, num_texts * options.num_images
    images = pipeline.generate(
        requests,
        options.seed,
        options.sampling,
        options.prompting,
        options.batch_size,
        options.size,
        make_start(options),
    )
    images = onto_white(images, options.whiten, options.white)
    for sampled in progress(images, total=total, initial=stood, unit="image"):
        out.add(sampled)
    if options.prompts_file:
        unused.report(options.prompts_file)
    if not out.count:
        raise ValueError(f"{options.prompts_file} holds no text that the base can read")
    out.forget_leftovers()
    return out.count - stood


def default_base() -> str:
    """The base that was trained last. Raises FileNotFoundError naming the command that makes one."""
    found = newest_base()
    if found is None:
        raise FileNotFoundError(
            "no base was trained yet under runs/: run `python -m diffusion.train_base --config "
            "configs/diffusion/base_128.yaml`, or name one with --base"
        )
    return str(found)


@command
def main(argv: Sequence[str] | None = None) -> Path:
    """Generate; returns the out directory."""
    options = parse_options(Options, argv, description=__doc__)
    num_texts = count_prompts(options.prompts_file) if options.prompts_file else 1
    with OutDirectory(options.out_dir, label=options.label) as out:
        out.require_ours(num_texts * options.num_images)
        make_start(options)  # a bad image is said before the base is loaded
        name = options.base or default_base()
        pipeline = DiffusionToImage.from_pretrained(
            name, options.device, options.lora, options.text_len, options.base_config, options.precision
        )
        out.origin = origin_of(options, pipeline)
        started = time.perf_counter()
        made = generate_all(options, pipeline, out, num_texts)
        out.write_grid(options.num_images if options.prompts_file and 1 < options.num_images <= 16 else None)
    seconds = (time.perf_counter() - started) / max(1, made)
    say(f"{out.count} images in {out.path} | {made} made now, {seconds:.2f} s each | by {name}")
    say(f"next: python rerank.py {out.path}")
    return out.path


if __name__ == "__main__":
    main()
