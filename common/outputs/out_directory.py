"""Images of a run: 0000.png ..., grid.png and images.jsonl, one line an image with all that it depends on.

An image is renamed into place before its line is appended, so after a kill -9 every whole line has its image and the
next run of the same command goes on behind the last of them. What is the user's in the directory stays (see
common/outputs/record.py).
"""

import errno
import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from common.config import to_mapping
from common.files import DISK_FULL
from common.image import make_grid
from common.outputs.image_list import GRID, LIST, MAX_GRID, RANKED, RANKING, image_name, whole_lines
from common.outputs.label import LabelOptions, joined_arguments, labelled
from common.outputs.record import RECORD, OutputDirectory

COPY = re.compile(r"rank\d{2,}(_text\d{2,})?\.png")  # of the best, which rerank.py makes


@dataclass(frozen=True)
class Request:
    """One image to make: image `index` of the seed, for `text`."""

    text: str
    index: int
    key: str | None = None
    """Name of the text, where it has one."""


class Made(Protocol):
    """One image and how it came about. `log_likelihood` and `null_log_likelihood` (nats) where the generator knows."""

    image: Image.Image
    text: str
    index: int
    seconds: float
    key: str | None


def manifest_of(origin: dict[str, Any], text: str, index: int) -> dict[str, Any]:
    """What an image's file says of how it was made: its line without what tells of this machine's folders."""
    named = {"model" if name == "checkpoint" else name: value for name, value in origin.items()}
    return _without_folders({n: v for n, v in named.items() if v is not None}) | {
        "text": text,
        "index": index,
    }


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_folders(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_without_folders(v) for v in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


class OutDirectory:
    """Writes one run's images; use as a context manager. `origin`: seed, sampling options, checkpoint ... the same for
    every line, set before the first image is asked for. `label`: what their files say of themselves."""

    def __init__(
        self,
        path: Path,
        origin: dict[str, Any] | None = None,
        label: LabelOptions = LabelOptions(),  # noqa: B008 (frozen)
    ) -> None:
        """Raises ValueError where the directory cannot be written to, or another command writes there; changes nothing
        in it."""
        self.files = OutputDirectory(path)
        self.path, self.origin, self.label = self.files.path, origin or {}, label
        self.count = 0
        # bytes of an earlier run's list that stay; None: what does not stay is gone
        self._kept: int | None = 0
        try:
            if not (path / RECORD).exists():
                from common.outputs.earlier_out import earlier_files

                self.files.adopt(earlier_files(path))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "OutDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.files.close()

    def require_ours(self, num_images: int) -> None:
        """Raises ValueError where the list, the grid or one of the first `num_images` images, standing or to come, is
        not what a command of ours wrote: nothing is made then, and nothing touched."""
        names = (image_name(i) for i in range(num_images))
        self.files.require_ours(itertools.chain((LIST, GRID, RANKING), names))

    def continue_from(self, requests: Iterator[Request]) -> Iterator[Request]:
        """What is left of `requests` after those whose images stand already, made with the same `origin`."""
        lines = whole_lines(self.path)
        for request in requests:
            line, end = next(lines, ({}, 0))
            if not self._is_done(line, request):
                requests = itertools.chain([request], requests)
                break
            self.count, self._kept = self.count + 1, end
        return requests

    def continue_behind_all(self) -> None:
        """Go on behind every image of an earlier run."""
        for _, end in whole_lines(self.path):
            self.count, self._kept = self.count + 1, end

    def num_leftovers(self) -> int:
        """Images of an earlier run that the first new one replaces."""
        return 0 if self._kept is None else sum(1 for _ in whole_lines(self.path, self._kept))

    def forget_leftovers(self) -> None:
        """Remove what an earlier run listed behind the images that stay, and what was written about the whole.

        `add` does it before the first image, so that a run which fails before has lost nothing.
        """
        if self._kept is not None:
            self._forget_from(self._kept)
            self._kept = None

    def add(self, made: Made) -> Path:
        """Write one image and its line. Raises ValueError where a file of the user's has the image's name, or the
        image is too small for a visible label."""
        image, arguments = labelled(
            made.image, "PNG", self.label, manifest_of(self.origin, made.text, made.index)
        )
        self.forget_leftovers()
        name = image_name(self.count)
        line = (
            self.origin
            | self._label_of_lines()
            | {
                "file": name,
                "text": made.text,
                "index": made.index,
                "log_likelihood": getattr(made, "log_likelihood", None),
                "null_log_likelihood": getattr(made, "null_log_likelihood", None),
                "seconds": round(made.seconds, 4),
            }
        )
        if made.key is not None:
            line["key"] = made.key
        try:
            with self.files.writing(name) as temporary:
                image.save(temporary, format="PNG", **arguments)
            self.files.append(LIST, json.dumps(line, sort_keys=True, ensure_ascii=False))
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise OSError(
                errno.ENOSPC,
                f"disk full while writing {self.path / name}: the {self.count} images before it are whole; free some "
                "space and run the same command again",
            ) from error
        self.count += 1
        return self.path / name

    def write_grid(self, columns: int | None = None) -> Path:
        """grid.png of the first images, `columns` a row."""
        paths = [self.path / image_name(i) for i in range(min(self.count, MAX_GRID))]
        images = []
        for path in paths:
            with Image.open(path) as image:
                images.append(image.convert("RGB"))
        grid = make_grid(images, columns)
        with self.files.writing(GRID) as temporary:
            grid.save(temporary, format="PNG", **joined_arguments(paths, grid, "PNG"))
        return self.path / GRID

    def _label_of_lines(self) -> dict[str, Any]:
        return {} if self.label.label == "off" else {"label": to_mapping(self.label)}

    def _is_done(self, line: dict[str, Any], request: Request) -> bool:
        name = image_name(self.count)
        wanted = self.origin | {"label": None} | self._label_of_lines()
        wanted |= {"file": name, "text": request.text, "index": request.index}
        same = all(line.get(k) == v for k, v in wanted.items()) and line.get("key") == request.key
        return same and (self.path / name).is_file()

    def _forget_from(self, kept: int) -> None:
        """Removes the images listed behind byte `kept`, those lines, and what was written about the whole."""
        self.files.require_ours([LIST])
        for line, _ in whole_lines(self.path, kept):
            name = str(line.get("file"))
            if name == Path(name).name and name.endswith(".png"):
                self.files.remove(name)
        for name in self.files.names():
            if name in (GRID, RANKING, RANKED) or COPY.fullmatch(name):
                self.files.remove(name)
        if (self.path / LIST).is_file():
            with (self.path / LIST).open("rb") as file:
                stays = file.read(kept)
            with self.files.writing(
                LIST
            ) as temporary:  # a new file: a hard link of the old one keeps its lines
                temporary.write_bytes(stays)
