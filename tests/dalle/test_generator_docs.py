"""Every command of docs/generator.md is one that its program would accept."""

import ast
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

from common.config import parse_options

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "generator.md").read_text("utf-8")
OPTIONS = {"vq.encode_shards": "Options", "dalle.plan": "PlanOptions"}  # the others call theirs Options
LAUNCHER_FLAGS = {"--nproc_per_node": 1, "--num_gpus": 1, "--hostfile": 1}


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.S)
    return sorted({line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()})


def program_and_arguments(command: str) -> tuple[str, list[str]]:
    launcher, *words = shlex.split(command)
    assert launcher in ("python", "torchrun", "deepspeed"), launcher
    while words[0] in LAUNCHER_FLAGS:
        words = words[2:]
    if words[0] == "-m":
        return words[1], words[2:]
    return words[0].removesuffix(".py").replace("/", "."), words[1:]


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_page_parses(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    name, arguments = program_and_arguments(command)
    module = importlib.import_module(name)
    parse_options(getattr(module, OPTIONS.get(name, "Options")), arguments)


def test_the_python_of_the_page_names_what_exists():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    assert len(blocks) == 2
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), node.module
