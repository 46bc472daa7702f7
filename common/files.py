"""Files that are whole or absent: atomic writes, hashes, JSON with readable Chinese."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CANNOT_REPLACE = (errno.EEXIST, errno.EPERM, errno.EACCES, errno.EBUSY, errno.ETXTBSY, errno.EOPNOTSUPP)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it into place when the block ends well, remove it otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming_a_full_disk(path):
            yield temporary
            replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace(source: Path, target: Path) -> None:
    """Move a file into place, whatever stands there: also where a rename does not replace (some network drives), or
    not what another process has open."""
    try:
        os.replace(source, target)
        return
    except OSError as error:
        if error.errno not in CANNOT_REPLACE or not target.is_file():
            raise
    aside = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        os.replace(target, aside)
    except OSError:
        shutil.copyfile(source, target)  # somebody holds it: its bytes can still be written
        source.unlink()
        return
    os.replace(source, target)
    with contextlib.suppress(OSError):
        aside.unlink()


@contextlib.contextmanager
def naming_a_full_disk(path: Path) -> Iterator[None]:
    """What is written to `path` inside ends in an OSError that names it and the space left where the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        free = shutil.disk_usage(path.parent).free / 2**20
        raise OSError(
            errno.ENOSPC,
            f"disk full while writing {path}: {free:.1f} MiB are free; free some space and run the same command again",
        ) from error


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """The same for a directory; an existing one at `path` is set aside first, then removed.

    Raises OSError naming the space that was written and that is free when the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, aside = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    if aside.exists() and not path.exists():  # killed between the two renames below
        os.replace(aside, path)
    for leftover in (temporary, aside):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for part in (*temporary.rglob("*"), temporary):
            _fsync(part)
        if path.exists():
            os.replace(path, aside)
        os.replace(temporary, path)
        _fsync(path.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise OSError(
            errno.ENOSPC,
            f"disk full while writing {path}: {size_of(temporary) / 2**20:.1f} MiB of it were written and "
            f"{shutil.disk_usage(path.parent).free / 2**20:.1f} MiB are free; what was there before is whole; free "
            "some space and run the same command again",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def shipped(name: str) -> Path:
    """What comes with this project, from any working directory; under the working directory where it is there too."""
    here, there = Path(name), Path(__file__).parent.parent / name
    return there if there.exists() and not here.exists() else here


def size_of(directory: Path) -> int:
    """Bytes of all files under `directory`."""
    return sum(f.stat().st_size for f in directory.rglob("*") if f.is_file())


def _fsync(path: Path) -> None:
    """To the disk. Some network drives cannot, for folders above all: they write as they see fit."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EACCES, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Sorted keys, Chinese unescaped, written atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


def read_json(path: Path) -> Any:
    """Raises FileNotFoundError, or ValueError naming the file when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def split_lines(text: str) -> list[str]:
    """The lines of a text without their ends, which are LF or CRLF and nothing else.

    `str.splitlines` also breaks at U+2028, NEL, VT, FF and a lone CR, which titles and captions may hold.
    """
    lines = text.split("\n")
    last = lines.pop()
    lines = [line.removesuffix("\r") for line in lines]
    return [*lines, last] if last else lines


def read_lines(path: Path, encoding: str = "utf-8-sig") -> list[str]:
    """The lines of a file as `split_lines` takes them. Raises ValueError naming the file for another encoding.

    The bytes are decoded as they are: text mode would turn a lone CR into a line break.
    """
    try:
        return split_lines(path.read_bytes().decode(encoding))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid {encoding.removesuffix('-sig').upper()}: {error}") from error


def cache_directory() -> Path:
    """Where this user's caches lie: below the home directory, else below the temporary one, for this user alone.

    A container may run under a user id that has no home directory, or one that it may not write to.
    Raises PermissionError where another user made the temporary one, who could put code into it.
    """
    try:
        path = Path.home() / ".cache" / "product-painter"
        path.mkdir(parents=True, exist_ok=True)
        if os.access(path, os.W_OK):
            return path
    except (RuntimeError, OSError):  # RuntimeError: no HOME, and a user id that is in no list of users
        pass
    user = (
        os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    )  # Windows: a folder a user anyway
    path = Path(tempfile.gettempdir()) / f"product-painter-{user}"
    path.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "getuid") and path.stat().st_uid != user:
        raise PermissionError(
            errno.EACCES, "belongs to another user; set HOME to a folder of your own", str(path)
        )
    return path


def sha256_file(path: Path) -> str:
    """Hex digest of the file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def require_content(path: Path) -> None:
    """Raises ValueError where a file of weights is what stands in its place: a Git LFS or git-annex pointer, a web page
    that was saved instead, or nothing."""
    with path.open("rb") as file:
        opening = file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n")
    again = "download the file itself"
    if opening.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the file: run `git lfs pull` there, or {again}")
    if b"annex/objects/" in opening and path.stat().st_size < 1000:
        raise ValueError(
            f"{path} is a git-annex pointer, not the file: run `git annex get` there, or {again}"
        )
    if opening.lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--", b"<body")):
        raise ValueError(f"{path} is a web page (HTML or XML) that was saved in place of the file: {again}")
    if not opening:
        raise ValueError(f"{path} is empty: {again}")


def ensure_writable_directory(path: Path) -> Path:
    """Create `path` and prove that a file can be written there. Raises ValueError saying why not."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe.{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to the directory {path}: {error.strerror}") from error
    return path
