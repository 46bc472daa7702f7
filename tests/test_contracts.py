"""The house's rules, read off the tree: import arrows, sizes of files and functions, configs, README commands."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SCRIPTS = ["train_vqgan", "train_dalle", "generate", "rerank"]
ALLOWED = {
    "common": set(),
    "data_tools": {"common"},
    "vq": {"common", "data_tools"},
    "dalle": {"common", "data_tools", "vq"},
    "rankers": {"common", "data_tools"},
    "diffusion": {"common", "data_tools"},
    "gan": {"common", "data_tools"},
    "evaluation": {"common", "data_tools", "vq", "dalle", "rankers", "diffusion", "gan"},
    "serve": {"common", "data_tools", "vq", "dalle", "rankers"},
}
FORBIDDEN_TOP_LEVEL = {"datasets", "tokenizers", "evaluate", "utils", "models", "clip"}


def python_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    return [ROOT / name for name in listed if (ROOT / name).is_file()]


def imported_packages(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_import_arrows():
    broken = []
    for path in python_files():
        package = path.relative_to(ROOT).parts[0]
        imported = imported_packages(ast.parse(path.read_text("utf-8")))
        if package in ALLOWED:
            wrong = imported & (set(ALLOWED) | set(SCRIPTS)) - ALLOWED[package] - {package}
            broken += [f"{path.relative_to(ROOT)} imports {name}" for name in sorted(wrong)]
        elif path.stem in SCRIPTS and path.parent == ROOT:
            broken += [
                f"{path.name} imports {name}" for name in sorted(imported & (set(SCRIPTS) | {"serve"}))
            ]
    assert not broken, broken


def test_the_arrow_test_sees_a_forbidden_import():
    tree = ast.parse("def f():\n    from dalle.model import Dalle\n    import vq.model")
    assert imported_packages(tree) == {"dalle", "vq"}


def test_no_top_level_name_shadows_a_package():
    assert not FORBIDDEN_TOP_LEVEL & {p.stem for p in ROOT.iterdir()}


def test_files_and_functions_are_short():
    long = []
    for path in python_files():
        text = path.read_text("utf-8")
        name = path.relative_to(ROOT)
        is_test = name.parts[0] == "tests"  # cases make tests long without making them hard to read
        if len(text.splitlines()) > (550 if is_test else 400):
            long.append(f"{name}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                limit = 70 if is_test or node.name in ("forward", "train_step") else 50
                if length > limit:
                    long.append(f"{name}: {node.name} has {length} lines")
    assert not long, long


def test_code_is_ascii_outside_strings():
    bad = []
    for path in python_files():
        if path.relative_to(ROOT).parts[0] == "tests":
            continue
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            comment = line.partition("#")[2] if line.lstrip().startswith("#") else ""
            if not comment.isascii():
                bad.append(f"{path.relative_to(ROOT)}:{number}")
    assert not bad, bad


def config_files() -> list[Path]:
    return sorted((ROOT / "configs").rglob("*.yaml"))


CONFIG_SCRIPTS = {
    "vqgan": "train_vqgan",
    "dalle": "train_dalle",
    "ranker": "rankers.train",
    "judge": "evaluation.train_judge",
}


@pytest.mark.parametrize("path", config_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_config_is_read_by_its_command(path: Path):
    import importlib

    from common.config import from_mapping

    opening = path.read_text("utf-8").splitlines()[:6]
    assert any(str(path.relative_to(ROOT)) in line for line in opening), "a config opens with its command"
    stem = next(name for name in CONFIG_SCRIPTS if path.stem.startswith(name))
    module = importlib.import_module(CONFIG_SCRIPTS[stem])
    options = from_mapping(module.Options, yaml.safe_load(path.read_text("utf-8")), where=path.name)
    assert options.loop.num_steps > 0


def readme_commands() -> list[str]:
    commands = []
    for name in ("README.md", "README.zh.md"):
        text = (ROOT / name).read_text("utf-8")
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.S):
            joined = block.replace("\\\n", " ")
            commands += [
                line.split("#")[0].strip() for line in joined.splitlines() if line.split("#")[0].strip()
            ]
    return sorted(set(commands))


def split_command(command: str) -> tuple[list[str], list[str]] | None:
    """(module or script, its arguments) of a README line that runs one of our programs."""
    words = shlex.split(command)
    launchers = {"python": 1, "deepspeed": 1, "torchrun": 1}
    if words[0] not in launchers:
        return None
    rest = words[1:]
    while rest and rest[0].startswith("--"):  # the launcher's own flags take one value each
        rest = rest[2:] if "=" not in rest[0] else rest[1:]
    if rest[0] == "-m":
        return ["-m", rest[1]], rest[2:]
    return [rest[0]], rest[1:]


@pytest.mark.parametrize("command", readme_commands())
def test_every_readme_command_is_known(command: str):
    """A make target that exists, or a program of ours whose help names every flag that the line uses."""
    if command.startswith("make "):
        target = command.split()[1]
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), flags=re.M), target
        return
    found = split_command(command)
    assert found is not None or command.split()[0] in ("git", "cd", "pip"), command
    if found is None:
        return
    program, arguments = found
    shown = subprocess.run(
        [sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert shown.returncode == 0, shown.stderr[-500:]
    for argument in arguments:
        if argument.startswith("--") and argument != "--config":
            assert argument.split("=")[0] in shown.stdout, f"{argument} is no flag of {program}"
        if argument.startswith("configs/"):
            assert (ROOT / argument).exists(), argument
