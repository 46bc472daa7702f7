"""Images that are answered as URLs: files under names nobody can guess, for a limited time."""

import re
import secrets
import time
from pathlib import Path

from common.files import atomic_path, ensure_writable_directory

_NAME = re.compile(r"[A-Za-z0-9_\-]{32}\.(png|jpeg|webp)")
_LEFT = re.compile(rf"\.{_NAME.pattern}\.\d+\.tmp")  # half written when the process was killed


class ImageStore:
    """Keeps files for `minutes`; touches only files of its own names."""

    def __init__(self, directory: Path, minutes: float) -> None:
        """Raises ValueError when the directory cannot be written to."""
        self.directory, self.seconds = ensure_writable_directory(directory), minutes * 60
        self._swept: float | None = None

    def put(self, data: bytes, output_format: str) -> str:
        """Keep an image; returns its name."""
        self._sweep()
        name = f"{secrets.token_urlsafe(24)}.{output_format}"
        with atomic_path(self.directory / name) as temporary:
            temporary.write_bytes(data)
        return name

    def get(self, name: str) -> bytes | None:
        """The image of that name; None for any other name and for one that is no longer kept."""
        path = self.directory / name
        if not _NAME.fullmatch(name) or not path.is_file():
            return None
        if time.time() - path.stat().st_mtime > self.seconds:
            return None
        return path.read_bytes()

    def _sweep(self) -> None:
        """Remove what is older, at most once a minute."""
        passed = time.monotonic()  # a clock that is put back stops no sweeping
        if self._swept is not None and passed - self._swept < 60:
            return
        self._swept, now = passed, time.time()
        for path in self.directory.iterdir():
            is_ours = _NAME.fullmatch(path.name) or _LEFT.fullmatch(path.name)
            if is_ours and now - path.stat().st_mtime > self.seconds:
                path.unlink(missing_ok=True)
