"""The out directory: 0000.png ..., grid.png and images.jsonl, one line a picture with all that it depends on.

A picture is renamed into place before its line is appended, so after a kill -9 every whole line has its picture and
the next run of the same command goes on behind the last of them.
"""

import errno
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from common.files import DISK_FULL, atomic_path, ensure_writable_directory
from common.image import make_grid
from dalle.pipeline import Picture, Request

LIST, GRID = "images.jsonl", "grid.png"
MAX_GRID = 64  # pictures that grid.png shows
RANKING = ("ranking.json", "ranked.png", "rank[0-9]*.png")  # what rerank.py wrote about earlier pictures


class OutDirectory:
    """Writes one run's pictures. `origin`: seed, sampling options, checkpoint ... the same for every line."""

    def __init__(self, path: Path, origin: dict[str, Any]) -> None:
        """Raises ValueError when the directory cannot be written to; changes nothing in it."""
        self.path = ensure_writable_directory(path)
        self.origin = origin
        self.count = 0
        # bytes of an earlier run's list that stay; None: what does not stay is gone
        self._kept: int | None = 0

    def continue_from(self, requests: Iterator[Request]) -> Iterator[Request]:
        """What is left of `requests` after those whose pictures stand already, made with the same `origin`."""
        lines = self._lines()
        for request in requests:
            line, end = next(lines, ({}, 0))
            if not self._is_done(line, request):
                requests = itertools.chain([request], requests)
                break
            self.count, self._kept = self.count + 1, end
        return requests

    def continue_behind_all(self) -> None:
        """Go on behind every picture of an earlier run."""
        for _, end in self._lines():
            self.count, self._kept = self.count + 1, end

    def num_leftovers(self) -> int:
        """Pictures of an earlier run that the first new one replaces."""
        return 0 if self._kept is None else sum(1 for _ in self._lines(self._kept))

    def forget_leftovers(self) -> None:
        """Remove what an earlier run listed behind the pictures that stay, and what was written about the whole.

        `add` does it before the first picture, so that a run which fails before has lost nothing.
        """
        if self._kept is not None:
            self._forget_from(self._kept)
            self._kept = None

    def add(self, picture: Picture) -> Path:
        """Write one picture and its line."""
        self.forget_leftovers()
        name = f"{self.count:04d}.png"
        line = self.origin | {
            "file": name,
            "text": picture.text,
            "index": picture.index,
            "log_likelihood": picture.log_likelihood,
            "null_log_likelihood": picture.null_log_likelihood,
            "seconds": round(picture.seconds, 4),
        }
        if picture.key is not None:
            line["key"] = picture.key
        try:
            with atomic_path(self.path / name) as temporary:
                picture.image.save(temporary, format="PNG")
            with (self.path / LIST).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n")
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise OSError(
                errno.ENOSPC,
                f"disk full while writing {self.path / name}: the {self.count} pictures before it are whole; free some "
                "space and run the same command again",
            ) from error
        self.count += 1
        return self.path / name

    def write_grid(self, columns: int | None = None) -> Path:
        """grid.png of the first pictures, `columns` a row."""
        pictures = []
        for i in range(min(self.count, MAX_GRID)):
            with Image.open(self.path / f"{i:04d}.png") as image:
                pictures.append(image.convert("RGB"))
        with atomic_path(self.path / GRID) as temporary:
            make_grid(pictures, columns).save(temporary, format="PNG")
        return self.path / GRID

    def _lines(self, start: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
        """Whole lines of an earlier run from byte `start` on, each with the byte it ends at, up to a damaged one."""
        if not (self.path / LIST).is_file():
            return
        with (self.path / LIST).open("rb") as file:
            file.seek(start)
            for text in file:
                try:
                    line = json.loads(text)
                except ValueError:
                    return
                if not isinstance(line, dict) or not text.endswith(b"\n"):
                    return
                yield line, file.tell()

    def _is_done(self, line: dict[str, Any], request: Request) -> bool:
        name = f"{self.count:04d}.png"
        wanted = self.origin | {"file": name, "text": request.text, "index": request.index}
        same = all(line.get(k) == v for k, v in wanted.items()) and line.get("key") == request.key
        return same and (self.path / name).is_file()

    def _forget_from(self, kept: int) -> None:
        """Removes the pictures listed behind byte `kept`, those lines, and what was written about the whole."""
        for line, _ in self._lines(kept):
            name = str(line.get("file"))
            if name == Path(name).name and name.endswith(".png"):
                (self.path / name).unlink(missing_ok=True)
        for pattern in (GRID, *RANKING):
            for path in self.path.glob(pattern):
                path.unlink()
        if (self.path / LIST).is_file():
            os.truncate(self.path / LIST, kept)
