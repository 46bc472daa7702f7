"""The commands of docs/evaluation.md are read by the options that they are meant for."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from common.config import parse_options
from evaluation.arena import join_arms

ROOT = Path(__file__).parent.parent.parent


def commands() -> list[str]:
    text = (ROOT / "docs" / "evaluation.md").read_text("utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.join(shlex.split(line, comments=True)) for line in lines if line.strip()]


def test_there_are_commands_of_every_program():
    for name in ("evaluation.arena", "evaluation.sweep", "evaluation.human", "benchmarks.best_of_n"):
        assert any(f"python -m {name} " in line for line in commands()), name


@pytest.mark.parametrize("line", commands())
def test_a_command_is_understood(line):
    words = shlex.split(line)
    assert words[0] == "python", line
    name, arguments = (words[2], words[3:]) if words[1] == "-m" else (Path(words[1]).stem, words[2:])
    if "--config" in arguments and not Path(ROOT, arguments[arguments.index("--config") + 1]).is_file():
        at = arguments.index("--config")
        assert arguments[at + 1] == "out/sweep/winner.yaml", "a file that another command writes"
        arguments = arguments[:at] + arguments[at + 2 :]
    name = {"evaluation": "evaluation.__main__"}.get(name, name)
    arguments = join_arms(arguments) if name == "evaluation.arena" else arguments
    assert parse_options(importlib.import_module(name).Options, arguments)
