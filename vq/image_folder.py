"""A plain folder of images in the place of shards, for training the image tokenizer without packing first.

It answers like `data_tools.shards.index.ShardIndex`. A caption is the `.txt` of the same stem, if there is one. The
validation images are a fixed share by the hash of the file name, so they stay the same when images are added.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from data_tools.images.decode import PLUGINS, sniff
from data_tools.readers.inventory import read_head, take_inventory
from data_tools.shards.index import Sample


class ImageFolder:
    """A sequence of images below a folder. `read(i)` gives the bytes of image i and of its caption."""

    def __init__(self, root: Path, files: Sequence[Path], problems: Sequence[str]) -> None:
        self.root, self.files, self.problems = root, list(files), list(problems)
        self.paths = [root / "pictures"]  # whose parent is what messages name
        self.remote = None
        self.samples = [Sample(str(file.relative_to(root)), 0, {}) for file in self.files]

    @classmethod
    def open(cls, root: str | Path, split: str = "train", val_share: float = 0.02) -> "ImageFolder":
        """Files that begin like an image; others are counted in `problems`. `split`: train or val.

        Raises FileNotFoundError or ValueError when there is nothing to read, or nothing left for one of the splits.
        """
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"no image folder {root}")
        inventory = take_inventory(root)
        images = [root / name for name in inventory.of("image") if sniff_file(root / name)]
        others = len(inventory.entries) - len(images) - len(inventory.of("caption", "hidden"))
        if not images:
            raise ValueError(f"no images in {root}: {others} files, none of them {', '.join(PLUGINS)}")
        ranked = sorted(images, key=lambda p: hashlib.sha256(str(p.relative_to(root)).encode()).digest())
        held_out = set(ranked[: max(1, round(val_share * len(images)))])
        chosen = [p for p in images if (p in held_out) == (split == "val")]
        if not chosen:
            raise ValueError(
                f"{root} holds {len(images)} image: at least two are needed, one to validate with"
            )
        problems = [f"{others} files of {root} are no images and were left out"] if others else []
        return cls(root, chosen, problems)

    def __len__(self) -> int:
        return len(self.files)

    def require(self, *suffixes: str) -> "ImageFolder":
        """As `ShardIndex.require`: every sample here is an image."""
        return self

    def has(self, suffix: str) -> bool:
        """As `ShardIndex.has`: a folder has images and captions, and no further members."""
        return False

    def spread(self, count: int) -> range:
        """As `ShardIndex.spread`."""
        return range(0, len(self), max(1, len(self) // count))

    def read(self, i: int, suffixes: Sequence[str] | None = None) -> dict[str, bytes]:
        """`png`: the image's bytes whatever its format, the decoder looks for itself; `txt`: its caption."""
        path = self.files[i]
        members = {}
        if suffixes is None or "png" in suffixes:
            members["png"] = path.read_bytes()
        caption = path.with_suffix(".txt")
        if (suffixes is None or "txt" in suffixes) and caption.is_file():
            members["txt"] = caption.read_bytes()
        return members


def sniff_file(path: Path) -> str:
    """What kind of image the first bytes of a file are; "" for another one or none that can be read."""
    head = read_head(path)
    return sniff(head) if isinstance(head, bytes) else ""
