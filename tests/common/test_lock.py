"""One writer in a directory, also where the file system has no locks, and after whatever end of the one before."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import command_env

from common import lock
from common.lock import DirectoryLock, locked

HOLD = """
import errno, fcntl, os, sys, time
from pathlib import Path
if sys.argv[2] == "owned":
    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    fcntl.lockf = unsupported
from common.lock import DirectoryLock
held = DirectoryLock(Path(sys.argv[1]))
print("taken" if held.is_taken else "held", held.holder, flush=True)
sys.stdin.read()
held.release()
"""


@pytest.fixture(params=["kernel", "owned"])
def system(request, monkeypatch) -> str:
    """A file system with record locks, and one without."""
    if request.param == "owned":

        def unsupported(*_: object) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "lockf", unsupported)
    return request.param


def hold(directory: Path, system: str) -> subprocess.Popen:
    """Another process that tries for the lock, and its first word."""
    command = [sys.executable, "-c", HOLD, str(directory), system]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=command_env()
    )
    process.said = process.stdout.readline()
    return process


def test_a_second_process_is_told_who_writes_there(tmp_path, system):
    process = hold(tmp_path, system)
    assert process.said.startswith("held")
    told = rf"another command is writing to .*process {process.pid}"
    with pytest.raises(ValueError, match=told), locked(tmp_path):
        raise AssertionError
    process.communicate("")
    with locked(tmp_path):
        assert hold(tmp_path, system).said.startswith("taken")
    assert list(tmp_path.iterdir()) == []


def test_kill_9_leaves_no_lock(tmp_path, system):
    process = hold(tmp_path, system)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list(tmp_path.iterdir())  # the file is there and says nothing
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_this_process_cannot_take_it_twice(tmp_path, system):
    with locked(tmp_path):
        assert DirectoryLock(tmp_path).is_taken
        (tmp_path / "link").symlink_to(tmp_path)
        assert DirectoryLock(tmp_path / "link").is_taken
        assert not DirectoryLock(tmp_path, "other").is_taken
    again = DirectoryLock(tmp_path)
    assert not again.is_taken
    again.release()
    again.release()
    assert not DirectoryLock(tmp_path).is_taken


def test_the_lock_of_another_machine_is_dead_when_it_is_not_renewed(tmp_path, monkeypatch):
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    owner = tmp_path / ".lock.owner"
    owner.write_text(json.dumps({"machine": "elsewhere", "pid": 1, "started": "1", "command": "x.py"}))
    with pytest.raises(ValueError, match=r"x.py, process 1 on elsewhere"), locked(tmp_path):
        pass
    old = time.time() - lock.DEAD_AFTER - 5
    os.utime(owner, (old, old))
    with locked(tmp_path):
        assert json.loads(owner.read_text())["pid"] == os.getpid()
    assert not owner.exists()


def test_it_is_renewed(tmp_path, monkeypatch):
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    monkeypatch.setattr(lock, "RENEWED_EVERY", 0.02)
    held = DirectoryLock(tmp_path)
    os.utime(tmp_path / ".lock.owner", (1000, 1000))
    deadline = time.monotonic() + 20
    while (tmp_path / ".lock.owner").stat().st_mtime == 1000 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (tmp_path / ".lock.owner").stat().st_mtime > 1000
    held.release()


def test_a_lock_on_a_removed_file_keeps_nobody_out(tmp_path, monkeypatch):
    """The holder removes the file between another's open and its lock."""
    real, opened = fcntl.lockf, []

    def late(file, *rest: int) -> None:
        if not opened:
            opened.append(1)
            (tmp_path / ".lock").unlink()
        real(file, *rest)

    monkeypatch.setattr(fcntl, "lockf", late)
    with locked(tmp_path):
        assert hold(tmp_path, "kernel").said.startswith("taken")


FAKE_MSVCRT = """
import errno, fcntl, os, sys, types
from common import lock
fake = types.ModuleType("msvcrt")
fake.LK_NBLCK, fake.LK_UNLCK = 2, 0
def locking(descriptor, mode, count):
    how = fcntl.LOCK_UN if mode == fake.LK_UNLCK else fcntl.LOCK_EX | fcntl.LOCK_NB
    try:
        fcntl.lockf(descriptor, how, count, os.lseek(descriptor, 0, os.SEEK_CUR))
    except OSError as error:
        raise PermissionError(errno.EACCES, "Permission denied") from error
fake.locking = locking
sys.modules["msvcrt"], lock.fcntl = fake, None
"""


class TestWindows:
    """Its locks are byte ranges of an open file, and an open file cannot be removed."""

    @pytest.fixture(autouse=True)
    def windows(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "msvcrt", None)  # put back afterwards
        monkeypatch.setattr(lock, "fcntl", None)
        exec(FAKE_MSVCRT, {})

    def test_another_process_holds_it_and_is_named(self, tmp_path):
        program = FAKE_MSVCRT + HOLD.replace('if sys.argv[2] == "owned":', "if False:")
        command = [sys.executable, "-c", program, str(tmp_path), "kernel"]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=command_env()
        )
        assert process.stdout.readline().startswith("held")
        with pytest.raises(ValueError, match=rf"process {process.pid}"), locked(tmp_path):
            raise AssertionError
        process.communicate("")
        with locked(tmp_path):
            assert (tmp_path / ".lock").is_file()
        assert list(tmp_path.iterdir()) == []

    def test_the_file_is_closed_before_it_is_removed_and_may_stay(self, tmp_path, monkeypatch):
        held = DirectoryLock(tmp_path)
        file = held._lock.file

        def refuse(path: Path, missing_ok: bool = False) -> None:
            assert file.closed
            raise PermissionError(errno.EACCES, "open in another process", str(path))

        monkeypatch.setattr(Path, "unlink", refuse)
        held.release()
        again = DirectoryLock(tmp_path)
        assert not again.is_taken
        again.release()


def test_without_proc_a_lock_is_dead_when_it_is_not_renewed(tmp_path, monkeypatch):
    """macOS and Windows do not say when a process began."""

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    monkeypatch.setattr(lock, "_started", lambda pid: None)
    owner = tmp_path / ".lock.owner"
    owner.write_text(json.dumps({"machine": lock._this_process()["machine"], "pid": 1, "started": None}))
    with pytest.raises(ValueError, match="another command"), locked(tmp_path):
        pass
    old = time.time() - lock.DEAD_AFTER - 5
    os.utime(owner, (old, old))
    with locked(tmp_path):
        pass
