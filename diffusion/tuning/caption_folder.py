"""A plain folder of images and captions in the place of shards: images/STEM.png and captions/STEM.txt, or side by side.

It answers like `data_tools.shards.index.ShardIndex`; the files are found by data_tools' own reader of folders.
Nothing is copied, so captions may be edited between two runs.
"""

import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from data_tools.readers.formats.folder import pair
from data_tools.readers.inventory import take_inventory
from data_tools.shards.index import Sample

MissingCaptions = Literal["refuse", "skip"]


class CaptionFolder:
    """A sequence of images below a folder. `read(i)` gives the bytes of image i and of its caption."""

    def __init__(
        self, root: Path, images: Sequence[str], captions: dict[str, str], problems: Sequence[str]
    ) -> None:
        self.root, self.images, self.captions, self.problems = root, list(images), captions, list(problems)
        self.paths = [root / "images"]  # whose parent is what messages name
        self.remote = None
        self.samples = [Sample(os.path.splitext(name)[0], 0, {}) for name in self.images]

    @classmethod
    def open(cls, root: str | Path, missing: MissingCaptions = "refuse") -> "CaptionFolder":
        """Raises FileNotFoundError or ValueError in one sentence: no images, or images without a caption."""
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"no folder {root}")
        inventory = take_inventory(root)
        pairs = pair(inventory)
        images = [image.name for image in pairs]
        captions = {os.path.splitext(image.name)[0]: image.caption for image in pairs if image.caption}
        if not images:
            raise ValueError(f"no images in {root}: images/STEM.png and captions/STEM.txt are looked for")
        kept = [name for name in images if _has_text(root, captions.get(os.path.splitext(name)[0]))]
        without = sorted(set(images) - set(kept))
        said = ""
        if without:
            said = (
                f"{len(without)} of {len(images)} images in {root} have no caption, the first is {without[0]}"
            )
        if not kept or (without and missing == "refuse"):
            raise ValueError(
                f"{said}: write captions/STEM.txt for each image captions of the same name, or leave those images out "
                "with --missing-captions skip"
            )
        alone = len(set(inventory.of("caption")) - set(captions.values()))
        others = inventory.of("list", "tar", "other", "hidden")
        problems = [f"{said}: left out"] if without else []
        problems += [f"{alone} captions in {root} have no image"] if alone else []
        problems += (
            [f"{len(others)} other files in {root} are not read, such as {others[0]}"] if others else []
        )
        return cls(root, kept, captions, problems)

    def __len__(self) -> int:
        return len(self.images)

    def split(self, share: float) -> tuple["CaptionFolder", "CaptionFolder"]:
        """Training and validation images: a share of at least one by the hash of the name, so it stays when images are
        added. Raises ValueError where nothing would be left to train on."""
        ranked = sorted(self.images, key=lambda name: hashlib.sha256(name.encode()).digest())
        count = max(1, round(share * len(ranked)))
        if count >= len(ranked):
            raise ValueError(
                f"{self.root} holds {len(ranked)} image: at least two are needed, one to validate with"
            )
        held_out = set(ranked[:count])
        parts = ([n for n in self.images if (n in held_out) == val] for val in (False, True))
        train, val = (CaptionFolder(self.root, names, self.captions, self.problems) for names in parts)
        return train, val

    @functools.cached_property
    def fingerprint(self) -> str:
        """The same where an epoch visits the same images."""
        return hashlib.sha256("\n".join(self.images).encode()).hexdigest()[:16]

    def read(self, i: int, suffixes: Sequence[str] | None = None) -> dict[str, bytes]:
        """`png`: the image's bytes whatever its format, the decoder looks for itself; `txt`: its caption."""
        members = {}
        if suffixes is None or "png" in suffixes:
            members["png"] = (self.root / self.images[i]).read_bytes()
        if suffixes is None or "txt" in suffixes:
            members["txt"] = (self.root / self.captions[self.samples[i].key]).read_bytes()
        return members


def _has_text(root: Path, caption: str | None) -> bool:
    return caption is not None and bool((root / caption).read_bytes().strip())
