"""Progress: a bar in a terminal, lines in a file, nothing with --quiet, no colour with NO_COLOR."""

import io
import os
import pty
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.config import parse_options
from common.console import progress as module
from common.console.progress import QUIET, progress
from common.log import say

ROOT = Path(__file__).parents[3]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.delenv(QUIET, raising=False)
    file = Terminal()
    assert list(progress(range(3), unit="image", file=file)) == [0, 1, 2]
    assert "\r" in file.getvalue() and "3/3" in file.getvalue()


def test_a_file_gets_a_line_every_while_and_none_of_a_short_run(monkeypatch):
    monkeypatch.delenv(QUIET, raising=False)
    file = io.StringIO()
    assert list(progress(range(3), file=file)) == [0, 1, 2]
    assert file.getvalue() == ""
    now = [1000.0]
    with progress(total=100, desc="images", file=file) as bar:
        bar._time = lambda: now[0]
        bar.start_t = bar.last_print_t = now[0]
        for _ in range(100):
            now[0] += 1.0
            bar.update()
    assert "\r" not in file.getvalue()
    counts = [re.search(r"(\d+)/100", line)[1] for line in file.getvalue().splitlines()]
    assert counts == ["30", "60", "90", "100"]
    assert module.LINE_EVERY == 30


@dataclass(frozen=True)
class Options:
    text: str = ""


def test_quiet_is_every_commands(monkeypatch, capsys):
    monkeypatch.setenv(QUIET, "0")
    assert parse_options(Options, ["--text", "a"]) == Options("a")
    say("heard")
    assert parse_options(Options, ["--quiet", "--text", "a"]) == Options("a")
    say("not heard")
    file = Terminal()
    assert list(progress(range(3), file=file)) == [0, 1, 2]
    assert capsys.readouterr().out == "heard\n" and file.getvalue() == ""


@pytest.mark.parametrize("no_color", ["1", ""])
def test_no_color_is_honoured(no_color):
    """By what draws tables, in a terminal."""
    code = (
        "from rich.table import Table\nfrom common.console.tables import plain_console\n"
        "t = Table(title='t'); t.add_column('c', style='red'); t.add_row('x'); plain_console().print(t)"
    )
    main, other = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm-256color"}
    env |= {"NO_COLOR": no_color} if no_color else {}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, stdout=other, check=True, timeout=60)
    os.close(other)
    shown = os.read(main, 65536)
    os.close(main)
    assert (b"\x1b[31m" in shown) is not bool(no_color)
