"""Put products on a pure white background.

    python -m diffusion.whiten out/ out_white/                        # an out directory of generate.py, or any folder
    python -m diffusion.whiten shirt.jpg shirt_white.png
    python -m diffusion.whiten photos/ white/ --method grabcut --erode 1
    python -m diffusion.whiten photos/ white/ --method poolnet --weights final.pth
    python -m diffusion.whiten photos/ white/ --method onnx --weights u2net.onnx

`border` needs no weights and suits products on plain backgrounds; `--whiten` of the generating commands is the same.
An image in which hardly anything or nearly everything passes for product is copied as it is, and said. PNG files keep
the background at exactly 255.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from PIL import Image

from common.config import command, parse_options
from common.console.progress import progress
from common.files import atomic_path
from common.image import make_grid
from common.log import say
from common.outputs.image_list import GRID, LIST, MAX_GRID, read_list
from common.outputs.label import joined_arguments, keep_mark, kept_arguments
from common.outputs.record import OutputDirectory
from data_tools.images.decode import SUFFIXES, BadImage, decode, open_plugin, sniff
from diffusion.white_background import Whitener, WhitenOptions

SHOWN = 5  # notes that are said one by one


@dataclass(frozen=True)
class Options:
    """Put products on white."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
    """An image, a folder of images, or an out directory of a generating command."""
    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """The image or the folder to write."""
    whiten: Annotated[WhitenOptions, tyro.conf.arg(name="")] = field(default_factory=WhitenOptions)
    device: str = "cpu"
    """Of the networks: cpu, cuda or cuda:N."""


def whiten_file(source: Path, whitener: Whitener) -> tuple[Image.Image, str, dict[str, Any]]:
    """The image on white, a note where it was left as it is, and the keyword arguments of `Image.save` that keep its
    label. Raises ValueError naming a file that is no image."""
    data = source.read_bytes()
    try:
        found = whitener(decode(data))
    except BadImage as error:
        raise ValueError(f"{source} is no readable image: {error}") from error
    with open_plugin(data, sniff(data)) as file:
        image = keep_mark(file, found.image)
        arguments = kept_arguments(file, image, "PNG", whiten=whitener.origin() | {"note": found.note})
    return image, found.note, arguments


def whiten_folder(source: Path, target: Path, whitener: Whitener) -> dict[str, int]:
    """Every image of a folder, or those that an out directory lists, under the same names as PNG.

    Returns how many were written, left as they are, and unreadable. Raises ValueError for a folder without images, and
    where `target` holds files of the user's under the same names.
    """
    listed = [line for _, line in read_list(source)] if (source / LIST).is_file() else []
    named = {Path(str(line.get("file", ""))).name: line for line in listed}
    lines = {
        name: line for name, line in named.items() if name == line.get("file") and (source / name).is_file()
    }
    names = list(lines) or [p.name for p in sorted(source.iterdir()) if p.suffix[1:].lower() in SUFFIXES]
    if not names:
        raise ValueError(f"{source} holds no images")
    targets = {name: f"{Path(name).stem}.png" for name in names}
    if len(set(targets.values())) < len(names):
        raise ValueError(
            f"{source} holds images whose names differ in their suffix alone: rename one of them"
        )
    counts = {"written": 0, "left": 0, "unreadable": 0}
    with OutputDirectory(target) as out:
        out.require_ours([*targets.values(), LIST, GRID])
        if (target / LIST).is_file():
            out.remove(LIST)
        for name in progress(names, unit="image"):
            try:
                image, note, arguments = whiten_file(source / name, whitener)
            except (ValueError, OSError) as error:
                counts["unreadable"] += 1
                _say_some(counts["unreadable"], f"skipped: {error}")
                continue
            with out.writing(targets[name]) as temporary:
                image.save(temporary, format="PNG", **arguments)
            if name in lines:
                line = lines[name] | {"file": targets[name], "whiten": whitener.origin() | {"note": note}}
                out.append(LIST, json.dumps(line, sort_keys=True, ensure_ascii=False))
            counts["written"] += 1
            counts["left"] += bool(note)
            if note:
                _say_some(counts["left"], f"note: {name} was {note}")
        if not counts["written"]:
            raise ValueError(f"none of the {len(names)} images of {source} can be read")
        _write_grid(out, [targets[name] for name in names])
    return counts


def _write_grid(out: OutputDirectory, names: Sequence[str]) -> None:
    """grid.png where the images have one size."""
    paths = [out.path / n for n in names[:MAX_GRID] if (out.path / n).is_file()]
    images = [Image.open(path).convert("RGB") for path in paths]
    if len({image.size for image in images}) == 1:
        grid = make_grid(images)
        with out.writing(GRID) as temporary:
            grid.save(temporary, format="PNG", **joined_arguments(paths, grid, "PNG"))


def _say_some(count: int, text: str) -> None:
    if count <= SHOWN:
        say(text)


@command
def main(argv: Sequence[str] | None = None) -> Path:
    """The command of this module; returns what was written."""
    options = parse_options(Options, argv, description=__doc__)
    if not options.source.exists():
        raise FileNotFoundError(f"no image or folder {options.source}")
    whitener = Whitener.open(options.whiten, options.device)
    started = time.perf_counter()
    if options.source.is_dir():
        if options.source.resolve() == options.target.resolve():
            raise ValueError("DST must be another folder than SRC, whose images stay as they are")
        counts = whiten_folder(options.source, options.target, whitener)
        rate = counts["written"] / (time.perf_counter() - started)
        say(
            f"{counts['written']} images in {options.target}, {counts['left']} of them left as they were, "
            f"{counts['unreadable']} unreadable | {rate:.1f} images/s"
        )
        return options.target
    if options.target.suffix.lower() != ".png":
        raise ValueError(f"DST must be a PNG file, which keeps the background at 255: {options.target}")
    if options.target.exists():
        raise ValueError(f"{options.target} exists already: name a new file")
    image, note, arguments = whiten_file(options.source, whitener)
    with atomic_path(options.target) as temporary:
        image.save(temporary, format="PNG", **arguments)
    say(f"{options.target} {note}".rstrip())
    return options.target


if __name__ == "__main__":
    main()
