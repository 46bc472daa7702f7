"""An output directory: a command touches in it only what it wrote itself, one writer at a time.

What was written is known by a record, `.written.jsonl`: name, size and sha256 of every file, noted before the file
takes its place. A file of which the record knows nothing, or other bytes, is the user's: it is neither replaced nor
removed, and a command that would have to is refused before it does anything.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

from common.files import atomic_directory, atomic_path, ensure_writable_directory, naming_a_full_disk
from common.lock import DirectoryLock, locked, require_free

RECORD = ".written.jsonl"
_SHOWN = 3  # foreign files that a message names
_MANY = 64


class OutputDirectory:
    """Use as a context manager; the lock is held until `close`."""

    def __init__(self, path: Path, wait_s: float = 0.0) -> None:
        """Raises ValueError where the directory cannot be written to or another command writes there for longer than
        `wait_s` seconds."""
        self._is_new = not path.exists()
        self.path = ensure_writable_directory(path)
        self._lock = DirectoryLock(path)
        patient_until = time.monotonic() + wait_s
        while self._lock.is_taken and time.monotonic() < patient_until:
            time.sleep(0.05)
            self._lock = DirectoryLock(path)
        require_free(self._lock, path)
        self._known: dict[str, dict[int, set[str]]] = {}  # name -> size -> sha256
        self._lists: set[str] = set()  # names that grow by lines
        self._tails: dict[str, Any] = {}  # name -> hash of the list as it stands
        self._unnoted: list[dict[str, Any]] = []
        self._current: dict[str, dict[str, Any]] = {}  # what this process has noted last of a name
        try:
            self._read_record()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others write here. A directory that was made for nothing goes."""
        if self._current:
            self._compact()
        self._lock.release()
        if self._is_new:
            with contextlib.suppress(OSError):
                self.path.rmdir()

    # ------------------------------------------------------------------------------------------------ what is ours

    def names(self) -> list[str]:
        """Files that the record knows and that are there."""
        return [name for name in self._known if os.path.lexists(self.path / name)]

    def is_ours(self, name: str) -> bool:
        """Whether the file has the very bytes that were written under this name. A list may end in half a line."""
        path, known = self.path / name, self._known.get(name)
        if not known or path.is_symlink() or not path.is_file():
            return False
        size = path.stat().st_size
        if size in known and _has_bytes(path, known[size], size):
            return True
        before = [s for s in known if s < size] if name in self._lists else []
        return bool(before) and _has_bytes(path, known[max(before)], max(before))

    def foreign(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that are there and not ours, in their order."""
        names = list(names)
        if len(names) > _MANY:  # one listing instead of a look for each
            there = {entry.name.casefold() for entry in os.scandir(self.path)}
            names = [name for name in names if "/" in name or name.casefold() in there]
        return [name for name in names if os.path.lexists(self.path / name) and not self.is_ours(name)]

    def require_ours(self, names: Iterable[str]) -> None:
        """Raises ValueError naming files that would be replaced and are the user's."""
        found = self.foreign(names)
        if found:
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            raise ValueError(
                f"{self.path} holds {', '.join(found[:_SHOWN])}{more}, not written here or changed since: move "
                f"{'it' if len(found) == 1 else 'them'} away or choose another directory; nothing was touched"
            )

    def adopt(self, names: Iterable[str]) -> None:
        """Take as ours what a release without a record is known to have written; noted with the next file."""
        for name in names:
            size, sha256 = _fingerprint(self.path / name)
            self._unnoted.append(self._learn({"file": name, "size": size, "sha256": sha256}))

    # -------------------------------------------------------------------------------------------------- writing

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yield a temporary path; its file takes its place when the block ends well. Raises ValueError for a file of
        that name that is not ours."""
        self.require_ours([name])
        with atomic_path(self.path / name) as temporary:
            yield temporary
            self.require_ours([name])  # written for minutes: the user may have put one there
            self._note(name, *_fingerprint(temporary))
        self._tails.pop(name, None)

    def write_text(self, name: str, text: str) -> Path:
        with self.writing(name) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return self.path / name

    def write_json(self, name: str, value: Any) -> Path:
        """Sorted keys, Chinese unescaped."""
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        return self.write_text(name, text)

    def append(self, name: str, line: str) -> None:
        """Add a line to a list that is ours or not there. Raises OSError naming a full disk."""
        path = self.path / name
        if name not in self._tails:
            self.require_ours([name])
            self._tails[name] = hashlib.sha256(path.read_bytes() if path.exists() else b"")
        data, tail = f"{line}\n".encode(), self._tails[name]
        size = path.stat().st_size if path.exists() else 0
        tail.update(data)
        self._note(name, size + len(data), tail.hexdigest(), is_list=True)
        with naming_a_full_disk(path), path.open("ab") as file:
            file.write(data)

    def remove(self, name: str) -> bool:
        """Remove a file if it is ours; whether it was."""
        if not self.is_ours(name):
            return False
        (self.path / name).unlink()
        self._tails.pop(name, None)
        self._current.setdefault(name, {})
        return True

    # ------------------------------------------------------------------------------------------------ the record

    def _read_record(self) -> None:
        """Lines that a kill has cut are skipped: what they told of is then taken for the user's."""
        path = self.path / RECORD
        if not path.is_file():
            return
        lines = path.read_bytes().split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                self._learn(json.loads(line))
        if len(lines) > 1 and not self._known:
            raise ValueError(f"{path} is no record of ours: move it away or choose another directory")

    def _learn(self, entry: dict[str, Any]) -> dict[str, Any]:
        self._known.setdefault(entry["file"], {}).setdefault(int(entry["size"]), set()).add(entry["sha256"])
        if entry.get("list"):
            self._lists.add(entry["file"])
        return entry

    def _note(self, name: str, size: int, sha256: str, is_list: bool = False) -> None:
        is_list = is_list or name in self._lists
        entry = {"file": name, "size": size, "sha256": sha256} | ({"list": True} if is_list else {})
        self._current[name] = entry
        path = self.path / RECORD
        lines = [json.dumps(e, ensure_ascii=False) + "\n" for e in (*self._unnoted, entry)]
        with naming_a_full_disk(path), path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                lines[:0] = [] if file.read(1) == b"\n" else ["\n"]  # behind half a line
            file.write("".join(lines).encode())
        self._unnoted.clear()
        self._learn(entry)

    def _compact(self) -> None:
        """One line a file that is there, sorted: the same directory has the same record, however it came about."""
        entries = []
        for name, sizes in sorted(self._known.items()):
            if name in self._current and os.path.lexists(self.path / name):
                entries.append(self._current[name])
            elif os.path.lexists(self.path / name):
                extra = {"list": True} if name in self._lists else {}
                found = [(size, sha256) for size, known in sizes.items() for sha256 in sorted(known)]
                entries += [{"file": name, "size": s, "sha256": h} | extra for s, h in sorted(found)]
        lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries if entry)
        with contextlib.suppress(OSError), atomic_path(self.path / RECORD) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")


SHORT_WAIT = 20.0  # seconds: for another command that writes one file too


def require_replaceable(*paths: Path) -> None:
    """Raises ValueError where one of these files is there and not what a command of ours wrote: before the work."""
    for path in paths:
        if os.path.lexists(path):
            with OutputDirectory(path.parent, SHORT_WAIT) as files:
                files.require_ours([path.name])


@contextlib.contextmanager
def writing_file(path: Path) -> Iterator[Path]:
    """A file in a directory that is not the command's own: yields a temporary path, like `OutputDirectory.writing`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with OutputDirectory(path.parent, SHORT_WAIT) as files, files.writing(path.name) as temporary:
        yield temporary


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory that appears whole: yields a temporary one to fill. Raises ValueError where anything stands at
    `target` or another command is making it."""
    require_new(target)
    ensure_writable_directory(target.parent)
    with locked(target.parent, f".{target.name}.lock"):
        require_new(target)
        with atomic_directory(target) as temporary:
            yield temporary


def require_new(target: Path) -> None:
    if os.path.lexists(target):
        raise ValueError(f"{target} exists already: name a new directory")


def _fingerprint(path: Path) -> tuple[int, str]:
    data = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            data.update(block)
            size += len(block)
    return size, data.hexdigest()


def _has_bytes(path: Path, known: set[str], size: int) -> bool:
    """Whether the first `size` bytes are known, and nothing but half a line of JSON, as a kill leaves it, behind."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size and (block := file.read(min(1 << 20, size))):
            digest.update(block)
            size -= len(block)
        rest = file.read()
    return digest.hexdigest() in known and (not rest or (rest.startswith(b"{") and b"\n" not in rest))
