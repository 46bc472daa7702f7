"""Show and check the AI label of image files.

    python -m serve.label check out/0000.png
    python -m serve.label check out/*.png

Exit code 0 when every file carries an implicit label, 1 when one does not, 2 for a file that cannot be read.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro
from PIL import Image

from common.config import command, parse_options
from common.log import say
from common.outputs.label import FoundLabel, open_labelled, pixels_code, read_labels, read_manifest


@dataclass(frozen=True)
class Options:
    """Show and check the AI label of image files."""

    action: tyro.conf.Positional[Literal["check"]]
    """check reads the labels and compares the pixels with the producer's code."""
    files: tyro.conf.Positional[tuple[Path, ...]]
    """PNG, JPEG or WebP files."""

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("name at least one image file: python -m serve.label check out/0000.png")


def check(path: Path) -> bool:
    """Print what `path` says of itself; whether it carries an implicit label."""
    with open_labelled(path) as image:
        found, manifest = read_labels(image), read_manifest(image)
        if not found:
            say(f"{path}: no implicit label")
            return False
        say(f"{path}: labelled in {' and '.join(f.place for f in found)}, {_agreement(found)}")
        for name, value in asdict(found[0].label).items():
            say(f"  {name}: {value or '-'}")
        say(f"  pixels: {_pixels(image, found[0])}")
    for name, value in (manifest or {}).items():
        say(f"  made with {name}: {value}")
    return True


def _agreement(found: list[FoundLabel]) -> str:
    if len(found) == 1:
        return "in one place"
    return "all the same" if len({f.label for f in found}) == 1 else "which differ from each other"


def _pixels(image: Image.Image, found: FoundLabel) -> str:
    code = found.label.ReservedCode1
    if not code.startswith("sha256:"):
        return "the producer's code is not one of ours"
    if code == pixels_code(image):
        return "unchanged since they were labelled"
    if image.format == "JPEG":
        return "cannot be compared in a lossy file"
    return "changed since they were labelled, or stored with loss"


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Check every file; ends the process with 1 when one carries no label."""
    options = parse_options(Options, argv, description=__doc__)
    if not all([check(path) for path in options.files]):
        sys.exit(1)


if __name__ == "__main__":
    main()
