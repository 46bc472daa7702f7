"""Files are whole or absent, whatever happens in the middle."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from processes import command_env

from common.files import (
    atomic_directory,
    atomic_path,
    cache_directory,
    ensure_writable_directory,
    read_json,
    read_lines,
    sha256_file,
    size_of,
    split_lines,
    write_json,
)


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_atomic_path_is_whole_or_absent(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "new" and names(tmp_path) == ["deep", "deep/a.txt"]


def test_atomic_directory_replaces_the_old_one_at_once(tmp_path):
    for text in ("one", "two"):
        with atomic_directory(tmp_path / "d") as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / f"{text}.txt").write_text(text)
    assert names(tmp_path) == ["d", "d/sub", "d/sub/two.txt"]
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "d") as temporary:
        (temporary / "half.txt").write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["d", "d/sub", "d/sub/two.txt"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    """What such a kill leaves: the old directory set aside, the new one under its temporary name."""
    (tmp_path / ".d.old").mkdir()
    (tmp_path / ".d.old" / "old.txt").write_text("old")
    (tmp_path / ".d.tmp").mkdir()
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "d"):
        raise RuntimeError
    assert names(tmp_path) == ["d", "d/old.txt"]


FULL_DISK = """
import resource, sys
from pathlib import Path
from common.files import atomic_directory
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # a write beyond fails as on a full disk
try:
    with atomic_directory(Path(sys.argv[1]) / "d") as temporary:
        (temporary / "small.bin").write_bytes(b"x" * 90_000)
        (temporary / "large.bin").write_bytes(b"x" * 200_000)
except OSError as error:
    print(error.errno, error.strerror)
"""


def test_a_full_disk_leaves_the_old_one_and_names_the_space(tmp_path):
    with atomic_directory(tmp_path / "d") as temporary:
        (temporary / "old.txt").write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        env=command_env(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(
        f"{errno.ENOSPC} disk full while writing {tmp_path}/d: 0.2 MiB of it were written and"
    )
    assert "what was there before is whole" in done.stdout
    assert names(tmp_path) == ["d", "d/old.txt"]


def test_other_errors_of_the_system_pass_unchanged(tmp_path):
    with pytest.raises(IsADirectoryError), atomic_directory(tmp_path / "d") as temporary:
        temporary.write_text("a directory")


def test_json_is_sorted_and_readable(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": "红色"})
    assert (tmp_path / "a.json").read_text("utf-8") == '{\n  "a": "红色",\n  "b": 1\n}\n'
    assert read_json(tmp_path / "a.json") == {"a": "红色", "b": 1}
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ValueError, match=r"b\.json is not valid JSON"):
        read_json(tmp_path / "b.json")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "c.json")


def test_sha256_and_size(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"x" * 10)
    assert size_of(tmp_path) == 13


def test_an_unwritable_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to the directory .*file/out: Not a directory"):
        ensure_writable_directory(tmp_path / "file" / "out")
    assert ensure_writable_directory(tmp_path / "new" / "out").is_dir()
    assert names(tmp_path / "new") == ["out"]


def test_lines_end_at_lf_or_crlf_alone(tmp_path):
    text = "a\u2028b\x85c\x0bd\x0ce\rf\r\ng\n\nh"
    assert split_lines(text) == ["a\u2028b\x85c\x0bd\x0ce\rf", "g", "", "h"]
    assert split_lines("") == [] and split_lines("a\n") == ["a"]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_lines(tmp_path / "a.txt") == split_lines(text)
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"a.txt is not valid UTF-8"):
        read_lines(tmp_path / "a.txt")


def test_a_cache_without_a_home(tmp_path, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = cache_directory()
    assert path.parent == tmp_path and path.stat().st_mode & 0o777 == 0o700
