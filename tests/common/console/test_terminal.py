"""Whatever the terminal is, a command does its work: ASCII alone, a reader that leaves, closed streams, Ctrl-C."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import command_env

from common.console.terminal import first_line

ROOT = Path(__file__).parents[3]
SAYING = """
import sys
from pathlib import Path
from common.config import command

def say(text):  # as common.log, which takes torch along
    print(text, flush=True)

@command
def main(argv=None):
    for i in range(3000):
        say(f"{i} \\u7ea2\\u8272 \\udcff")
    print("\\u5b8c", file=sys.stderr)
    Path(sys.argv[1]).write_text("saved")
    say("\\u5b8c")
    if len(sys.argv) > 2:
        raise ValueError("\\u9519 \\udcff")
main()
"""


def shell(line: str, path: Path, *more: str, **env: str) -> subprocess.CompletedProcess:
    """`line` in bash, where $SAY runs the command above, which writes `path` at its end."""
    command = ["bash", "-o", "pipefail", "-c", line, sys.executable, SAYING, str(path), *more]
    given = {n: v for n, v in (command_env() | env).items() if v}
    return subprocess.run(command, capture_output=True, env=given, timeout=120, check=False)


SAY = '"$0" -c "$1" "${@:2}"'


@pytest.mark.parametrize(
    "env",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "ascii:strict"},
        {"PYTHONIOENCODING": "latin-1:strict"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "utf-8:strict"},
    ],
    ids=lambda env: next(iter(env.values())),
)
def test_what_the_terminal_cannot_show_is_written_out(tmp_path, env):
    done = shell(SAY, tmp_path / "f", **env)
    assert done.returncode == 0 and (tmp_path / "f").read_text() == "saved", done.stderr
    assert b"\\udcff" in done.stdout and done.stdout.count(b"\n") == 3001
    failed = shell(SAY, tmp_path / "f", "fail", **env)
    assert failed.returncode == 2 and failed.stderr.splitlines()[-1].startswith(b"error: ")
    assert b"Traceback" not in failed.stderr


@pytest.mark.parametrize(
    "line",
    [
        f"{SAY} | head -1",
        f"{SAY} | true",
        f"{SAY} 2>&1 | true",
        f"{SAY} >&-",
        f"{SAY} 2>&-",
        f"{SAY} <&- >&- 2>&-",
        f"{SAY} > /dev/full",
        f"{SAY} 2> /dev/full",
    ],
)
def test_a_reader_that_leaves_loses_nothing(tmp_path, line):
    done = shell(line, tmp_path / "f")
    assert done.returncode == 0 and (tmp_path / "f").read_text() == "saved"
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr


SCRIPTS = ["generate.py", "rerank.py", "train_dalle.py", "train_vqgan.py"]
PACKAGES = ["vq", "dalle", "data_tools", "rankers", "evaluation"]
INTERRUPTED = """
import builtins, os, runpy, sys
real = builtins.__import__
def interrupted(name, *rest, **more):
    if name.partition(".")[0] in ("torch", "tyro", "numpy", "PIL", "yaml", "tqdm"):
        raise KeyboardInterrupt
    return real(name, *rest, **more)
builtins.__import__ = interrupted
sys.argv = sys.argv[1:]
if sys.argv[0].endswith(".py"):
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("name", [*SCRIPTS, *(f"{package}.__main__" for package in PACKAGES)])
def test_ctrl_c_while_modules_are_imported_leaves_no_traceback(name):
    """Everything heavy is imported after the hook is set, whatever entry a user takes."""
    package = name.partition(".__main__")[0]
    entries = {"vq": "vq.convert", "dalle": "dalle.plan", "data_tools": "data_tools.shard"}
    entries |= {"rankers": "rankers.train", "evaluation": "evaluation.arena"}
    target = str(ROOT / name) if name in SCRIPTS else entries[package]
    command = [sys.executable, "-c", INTERRUPTED, target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=command_env(), check=False)
    assert done.stderr == "interrupted\n" and done.returncode in (130, -2)


def test_a_full_disk_is_told_with_what_to_free(tmp_path, capsys, monkeypatch):
    import errno

    from common.config import command

    for filename, words in (
        (str(tmp_path / "x.bin"), f"disk full while writing {tmp_path / 'x.bin'}: "),
        (None, ""),
    ):

        @command
        def main(argv=None, filename=filename):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), filename)

        with pytest.raises(SystemExit) as stopped:
            main([])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.startswith(f"error: {words or 'disk full: '}")
        assert "MiB are free in" in said and "free some space there and run the same command again" in said


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("\n  no such thing.\nat line 3"), "no such thing"),
        (RuntimeError(""), "RuntimeError"),
        (ValueError("x" * 400), "x" * 300),
    ],
)
def test_what_an_error_says_fits_into_a_sentence(error, said):
    assert first_line(error) == said
