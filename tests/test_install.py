"""make setup: what is missing is said in one sentence with exit code 2. Python, disk and pip are fakes."""

import importlib.util
import os
import stat
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("install", ROOT / "deploy/install.py")
install = importlib.util.module_from_spec(spec)
spec.loader.exec_module(install)
Usage = namedtuple("Usage", "total used free")
OFFLINE = "ERROR: Could not fetch URL x: NewConnectionError('Temporary failure in name resolution')"


@pytest.fixture
def place(tmp_path):
    """An environment whose python is a script, which `answers` fills; and requirements."""
    (tmp_path / "requirements.txt").write_text(
        "# pinned\neinops==0.8.1\ntorch==2.15.0; python_version > '3'\n"
    )
    return tmp_path


def answers(place: Path, script: str) -> None:
    python = place / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    (python.parent / "pip").touch()


def run(place: Path, capsys, monkeypatch, free: float = 60e9) -> tuple[int, str, str]:
    monkeypatch.setattr(install.shutil, "disk_usage", lambda folder: Usage(1e12, 0, free))
    code = install.main([str(place / ".venv"), str(place / "requirements.txt")])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_line_a_stage(place, capsys, monkeypatch):
    answers(
        place,
        'case "$*" in *download*) exit 0;; *install*) echo "Collecting torch==2.15.0";'
        'echo "  Downloading torch-2.15.0-cp311.whl (755.1 MB)"; echo "  Downloading einops.whl (64 kB)";'
        'echo "Installing collected packages: torch";; esac',
    )
    code, out, err = run(place, capsys, monkeypatch)
    assert code == 0 and not err
    lines = out.splitlines()
    assert [line[:5] for line in lines if line.startswith("[")] == [f"[{i}/5]" for i in range(1, 6)]
    assert any("torch, 755.1 MB" in line for line in lines) and "2 packages" in out and "einops," not in out
    assert lines[-1].startswith("installed in 0:0")


def test_imports_are_compiled_even_where_python_is_told_to_write_nothing(place, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    answers(
        place,
        f'case "$*" in *generate*) echo "$* in $PWD, $PYTHONDONTWRITEBYTECODE." > {place}/said;; esac',
    )
    assert run(place, capsys, monkeypatch)[0] == 0
    assert (
        place / "said"
    ).read_text() == f"-c import generate, rerank, serve.app, serve.worker in {ROOT}, .\n"


@pytest.mark.parametrize(
    ("script", "free", "said"),
    [
        ("exit 0", 3e9, "3.0 GB are free"),
        (f'echo "{OFFLINE}" >&2; exit 1', 60e9, "the package index cannot be reached"),
        (f'case "$*" in *download*) exit 0;; esac; echo "{OFFLINE}"; exit 1', 60e9, "cannot be reached"),
        (
            'case "$*" in *download*) exit 0;; esac; echo "ERROR: No space left on device"; exit 1',
            60e9,
            "disk is full",
        ),
        (
            'case "$*" in *download*) exit 0;; esac; echo "ERROR: broken wheel"; exit 1',
            60e9,
            "ERROR: broken wheel",
        ),
        (
            'case "$*" in *generate*) echo "Illegal instruction" >&2; exit 1;; esac',
            60e9,
            "cannot be imported: Illegal instruction",
        ),
    ],
)
def test_what_is_missing_is_one_sentence(place, capsys, monkeypatch, script, free, said):
    answers(place, script)
    code, _, err = run(place, capsys, monkeypatch, free)
    assert code == 2 and said in err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err


def test_an_old_python_says_so(place, capsys, monkeypatch):
    monkeypatch.setattr(install.sys, "version_info", (3, 9, 2))
    code, out, err = run(place, capsys, monkeypatch)
    assert code == 2 and not out and "3.11 or newer is needed, this is 3.9" in err


def test_an_environment_that_cannot_be_made(place, capsys, monkeypatch):
    (place / ".venv").write_text("a file")
    code, _, err = run(place, capsys, monkeypatch)
    assert code == 2 and "no virtual environment could be made" in err


def test_make_gives_its_exit_code(tmp_path):
    """Of a Python that is too old, as make starts it."""
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\necho 'error: too old' >&2\nexit 2\n")
    old.chmod(0o755)
    command = ["make", "-C", str(ROOT), "setup", f"PYTHON={old}", f"VENV={tmp_path / 'env'}"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
    assert done.returncode == 2 and "error: too old" in done.stderr and not (tmp_path / "env").exists()
    assert sys.version_info >= install.OLDEST
