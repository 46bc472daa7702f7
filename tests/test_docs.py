"""Every command of the README and of docs/ is read by its own program without a complaint."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md")])
LAUNCHERS = ("python", "torchrun", "deepspeed")
WRITTEN_BY_OTHERS = {"out/sweep/winner.yaml"}  # config files that an earlier command of the page makes
NOT_OURS = {"git", "cd", "pip", "pytest", "export", "tensorboard", "curl"}
PACKAGES = ("data_tools", "vq", "dalle", "rankers", "gan", "evaluation")


class Read(Exception):
    """Ends a program as soon as its options are read."""


def commands() -> list[str]:
    """The lines of every shell block and `python ...` in running text; the log's commands are history."""
    found = []
    for page in PAGES:
        if page.name == "LOG.md":
            continue
        text = page.read_text("utf-8")
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.S):
            found += block.replace("\\\n", " ").splitlines()
        found += re.findall(r"`(python (?!-m [\w.]+`)[^`]+)`", text)  # a bare module is a mention
    lines = (shlex.join(shlex.split(line, comments=True)) for line in found)
    return sorted({line for line in lines if line})


def program_and_arguments(line: str) -> tuple[str, list[str]]:
    words = shlex.split(line)[1:]
    while words[0].startswith("--"):  # the launcher's own flags take one value each
        words = words[1:] if "=" in words[0] else words[2:]
    if words[0] == "-m":
        return words[1], words[2:]
    assert (ROOT / words[0]).is_file(), line
    return words[0].removesuffix(".py").replace("/", "."), words[1:]


def programs_lines() -> list[str]:
    return [line for line in commands() if line.split()[0] in LAUNCHERS]


@pytest.mark.parametrize("line", programs_lines())
def test_a_command_is_read_by_its_program(line, monkeypatch):
    name, arguments = program_and_arguments(line)
    monkeypatch.chdir(ROOT)
    at = [i for i, word in enumerate(arguments) if word in WRITTEN_BY_OTHERS]
    arguments = [word for i, word in enumerate(arguments) if i not in at and i + 1 not in at]
    module = importlib.import_module(f"{name}.__main__" if (ROOT / name).is_dir() else name)
    parse = tyro.cli

    def read(*args, **kwargs):
        parse(*args, **kwargs)
        raise Read

    monkeypatch.setattr(tyro, "cli", read)
    main = getattr(module.main, "__wrapped__", module.main)  # without what turns errors into exit codes
    with pytest.raises(Read):
        main(arguments)


def test_other_lines_are_make_targets_or_tools_that_everyone_has():
    for line in commands():
        word, *rest = line.split()
        if word == "make":
            assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text("utf-8"), flags=re.M), line
        else:
            assert word in LAUNCHERS or word in NOT_OURS, line


def test_the_python_of_the_pages_names_what_exists():
    blocks = [
        b for page in PAGES for b in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), flags=re.S)
    ]
    assert len(blocks) >= 2
    for node in (node for block in blocks for node in ast.walk(ast.parse(block))):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), node.module


def test_every_program_is_shown():
    shown = {program_and_arguments(line)[0] for line in programs_lines()}
    files = [path for package in PACKAGES for path in (ROOT / package).glob("*.py")]
    programs = {
        f"{path.parent.name}.{path.stem}".removesuffix(".__main__")
        for path in files
        if "\n@command\n" in path.read_text("utf-8")
    }
    assert programs - shown <= {"data_tools.synthetic", "evaluation.demo"}, "those that make demo runs"
