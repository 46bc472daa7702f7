"""One writer at a time in a directory: a lock that ends with its process, however that ends.

The kernel's record lock where the file system has one (`lockf`, which unlike `flock` is not handed on to forked
loaders and holds across the machines of an NFS; `msvcrt.locking` on Windows). Elsewhere a file that names its owner:
dead if that process of this machine is gone, or if an owner elsewhere has not renewed it for a minute.
"""

import contextlib
import json
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

LOCK_FILE = ".lock"
RENEWED_EVERY, DEAD_AFTER = (
    10.0,
    60.0,
)  # seconds between renewals, and without one, of a lock on another machine

_FAR = (
    1 << 30
)  # byte that is locked on Windows: what is locked nobody else can read, and all read who the holder is

_held: set[str] = set()  # by this process, which the kernel never refuses a second time
_guard = threading.Lock()


class World(Protocol):
    """Of common.distributed: the processes of a run."""

    is_main: bool

    def any(self, flags: dict[str, bool]) -> dict[str, bool]:
        """Whether a flag is up on any process."""


class DirectoryLock:
    """Tries at once; `is_taken` tells that another holds it, `holder` who that is, as far as it is known."""

    def __init__(self, directory: Path, name: str = LOCK_FILE) -> None:
        """Raises OSError where no file can be made in `directory`."""
        self.path, self.holder = directory / name, ""
        self._key = os.path.realpath(self.path)
        self._lock: _KernelLock | _OwnedFile | None = None
        with _guard:
            if self._key in _held:
                self.holder = "this very process"
            else:
                self._lock = self._take()
                if self._lock:
                    _held.add(self._key)

    def _take(self) -> "_KernelLock | _OwnedFile | None":
        try:
            lock: _KernelLock | _OwnedFile = _KernelLock(self.path)
        except _Unsupported:
            lock = _OwnedFile(self.path)
        if lock.is_mine:
            return lock
        self.holder = _described(lock.owner)
        return None

    @property
    def is_taken(self) -> bool:
        return self._lock is None

    def release(self) -> None:
        """Also removes the file. Nothing where it was not taken or was released before."""
        with _guard:
            if self._lock:
                self._lock.release()
                self._lock = None
                _held.discard(self._key)


@contextlib.contextmanager
def locked(directory: Path, name: str = LOCK_FILE, waits: bool = False) -> Iterator[None]:
    """Alone in `directory` inside. Where another is: raises ValueError naming who writes there, or waits for it."""
    lock = DirectoryLock(directory, name)
    while waits and lock.is_taken:
        time.sleep(0.05)
        lock = DirectoryLock(directory, name)
    try:
        require_free(lock, directory)
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def alone_in(directory: Path, world: World, name: str = LOCK_FILE) -> Iterator[None]:
    """`locked` for all processes of a run: the main one holds it, all raise the ValueError."""
    lock = DirectoryLock(directory, name) if world.is_main else None
    try:
        if world.any({"taken": lock is not None and lock.is_taken})["taken"]:
            if lock:
                require_free(lock, directory)
            raise ValueError(f"another command is writing to {directory}")
        yield
    finally:
        if lock:
            lock.release()


def require_free(lock: DirectoryLock, directory: Path) -> None:
    """Raises ValueError, naming who writes to `directory`, where the lock is another's."""
    if lock.is_taken:
        by = f" ({lock.holder})" if lock.holder else ""
        raise ValueError(
            f"another command is writing to {directory}{by}: wait for it or stop it, or choose another directory"
        )


class _Unsupported(Exception):
    """The file system has no record locks."""


class _KernelLock:
    def __init__(self, path: Path) -> None:
        self.path, self.owner = path, {}
        self.is_mine = False
        while not self.is_mine:
            self.file = path.open("a+", encoding="utf-8")
            try:
                _lock_record(self.file)
            except (BlockingIOError, PermissionError):
                self.owner = _read(path)
                self.file.close()
                return
            except OSError as error:
                self.file.close()
                raise _Unsupported from error
            self.is_mine = self._is_still_there()
            if not self.is_mine:
                self.file.close()
        with contextlib.suppress(OSError):  # a full disk: only the description is lost
            self.file.truncate(0)
            self.file.write(json.dumps(_this_process()))
            self.file.flush()

    def _is_still_there(self) -> bool:
        """The holder before removes the file as it ends: a lock on what was removed keeps nobody out."""
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(self.file.fileno()))

    def release(self) -> None:
        if fcntl:
            self.path.unlink(missing_ok=True)
            self.file.close()
            return
        _unlock_record(self.file)
        self.file.close()
        with contextlib.suppress(
            PermissionError
        ):  # Windows keeps a file that anybody has open, the next holder too
            self.path.unlink(missing_ok=True)


def _lock_record(file: IO[str]) -> None:
    """Raises BlockingIOError or PermissionError where another process has it, another OSError where there are none."""
    if fcntl:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    import msvcrt

    os.lseek(file.fileno(), _FAR, os.SEEK_SET)
    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


def _unlock_record(file: IO[str]) -> None:
    import msvcrt

    os.lseek(file.fileno(), _FAR, os.SEEK_SET)
    msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)


class _OwnedFile:
    """A file made by O_EXCL, which every file system has, and renewed by a thread while its process lives."""

    def __init__(self, path: Path) -> None:
        self.path = path.with_name(f"{path.name}.owner")
        path.unlink(missing_ok=True)  # what the try of a kernel lock has left
        self.me = _this_process() | {"token": uuid.uuid4().hex}
        self.owner: dict[str, Any] = {}
        self.is_mine = self._create() or (self._is_dead() and self._steal())
        self._ended = threading.Event()
        if self.is_mine:
            threading.Thread(target=self._renew, daemon=True).start()

    def _create(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            self.owner = _read(self.path)
            return False
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(self.me))
        return True

    def _is_dead(self) -> bool:
        if self.owner.get("machine") == self.me["machine"] and self.me["started"] is not None:
            return _started(self.owner.get("pid", 0)) != self.owner.get("started")
        probe = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex[:8]}")
        try:  # by the file server's clock
            probe.touch()
            return probe.stat().st_mtime - self.path.stat().st_mtime > DEAD_AFTER
        except FileNotFoundError:
            return True
        finally:
            probe.unlink(missing_ok=True)

    def _steal(self) -> bool:
        """Of those who find the same dead owner one alone can move its file away; then see who made the new one."""
        dead = self.path.with_name(f"{self.path.name}.{self.me['token'][:8]}")
        try:
            os.replace(self.path, dead)
        except FileNotFoundError:
            return False
        if _read(dead) != self.owner:  # another was faster: this is its new file
            os.replace(dead, self.path)
            return False
        dead.unlink()
        if not self._create():
            return False
        time.sleep(0.2)
        return _read(self.path) == self.me

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED_EVERY):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        self._ended.set()
        if _read(self.path) == self.me:
            self.path.unlink(missing_ok=True)


def _this_process() -> dict[str, Any]:
    """What tells this process from any other, also after a restart of the machine and across containers."""
    machine = [platform.node()]
    with contextlib.suppress(OSError):
        machine.append(Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip())
        machine.append(os.readlink("/proc/self/ns/pid"))
    command = Path(sys.argv[0]).name if sys.argv else ""
    pid = os.getpid()
    return {"machine": " ".join(machine), "pid": pid, "started": _started(pid), "command": command}


def _started(pid: int) -> str | None:
    """When the process began, as the kernel counts; None where there is none, and on systems without /proc: process
    ids are reused."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] in "ZX" else after_name[19]  # a zombie writes nothing any more


def _read(path: Path) -> dict[str, Any]:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _described(owner: dict[str, Any]) -> str:
    if "pid" not in owner:
        return ""
    machine = str(owner.get("machine")).split()[0]
    where = "" if machine == platform.node() else f" on {machine}"
    return f"{owner.get('command') or 'python'}, process {owner['pid']}{where}"
