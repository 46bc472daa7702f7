"""Every command of the README and of docs/ is read by its own program without a complaint."""

import ast
import dataclasses
import importlib
import re
import shlex
import typing
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).parent.parent
CHINESE = sorted((ROOT / "docs" / "zh").glob("*.md"))
PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md"), *CHINESE])
LAUNCHERS = ("python", "torchrun", "deepspeed")
WRITTEN_BY_OTHERS = {"out/sweep/winner.yaml"}  # config files that an earlier command of the page makes
NOT_OURS = {"git", "cd", "pip", "pytest", "export", "source", "tensorboard", "curl"}
VENV = ".venv/bin/"  # before a command of the first screen, where nothing is activated yet
PACKAGES = ("data_tools", "vq", "dalle", "rankers", "gan", "evaluation")


class Read(Exception):
    """Ends a program as soon as its options are read."""


def commands() -> list[str]:
    """The lines of every shell block and `python ...` in running text; the log's commands are history."""
    found = []
    for page in PAGES:
        text = page.read_text("utf-8")
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.S):
            found += block.replace("\\\n", " ").splitlines()
        found += re.findall(r"`(python (?!-m [\w.]+`)[^`]+)`", text)  # a bare module is a mention
    lines = (shlex.join(shlex.split(line, comments=True)) for line in found)
    return sorted({line.removeprefix(VENV) for line in lines if line})


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


def program_module(name: str):
    """What `python -m NAME` runs: a module, or a package's __main__."""
    is_package = (ROOT / name.replace(".", "/")).is_dir()
    return importlib.import_module(f"{name}.__main__" if is_package else name)


@pytest.mark.parametrize("line", programs_lines())
def test_a_command_is_read_by_its_program(line, monkeypatch):
    name, arguments = program_and_arguments(line)
    monkeypatch.chdir(ROOT)
    at = [i for i, word in enumerate(arguments) if word in WRITTEN_BY_OTHERS]
    arguments = [word for i, word in enumerate(arguments) if i not in at and i + 1 not in at]
    module = program_module(name)
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


# --- two languages -------------------------------------------------------------------------------------------------


def test_every_page_has_a_twin_in_chinese():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert {path.name for path in CHINESE} == pages


def twins() -> list[tuple[Path, Path]]:
    return [(ROOT / "docs" / page.name, page) for page in CHINESE] + [
        (ROOT / "README.md", ROOT / "README.zh.md")
    ]


@pytest.mark.parametrize(("english", "chinese"), twins(), ids=lambda page: page.parent.name + "_" + page.stem)
def test_both_languages_show_the_same_commands_and_headings(english, chinese):
    found = []
    for page in (english, chinese):
        text = page.read_text("utf-8")
        blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, flags=re.S | re.M)
        if page.stem.startswith("README"):  # comments are translated there
            blocks = [(kind, re.sub(r" *#.*", "", block)) for kind, block in blocks]
        prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.S | re.M)
        inline = sorted(re.findall(r"`(python [^`]+)`", prose))
        headings = [len(marks) for marks in re.findall(r"^(#+) ", prose, flags=re.M)]
        found.append((blocks, inline, headings))
    assert found[0][2] == found[1][2], "headings"
    assert found[0][1] == found[1][1], "commands in running text"
    for here, there in zip(found[0][0], found[1][0], strict=True):
        assert here == there


def test_links_lead_somewhere():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


# --- command lines of other projects -------------------------------------------------------------------------------


def flags_of(options: type, prefix: str = "") -> set[str]:
    """`--group.field` of a dataclass; a group may go without its name, so both are there."""
    found = set()
    for name, kind in typing.get_type_hints(options).items():
        if dataclasses.is_dataclass(kind):
            found |= flags_of(kind, f"{prefix}{name}.") | flags_of(kind, prefix)
        else:
            found.add(f"--{prefix}{name}".replace("_", "-"))
    return found


def translated_flags() -> list[tuple[str, set[str]]]:
    """Program of a table's second column, and the flags below it."""
    tables = []
    for line in (ROOT / "docs/from_other_projects.md").read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 3 and cells[1].endswith(" here"):
            tables.append((cells[1].split("`")[1].removesuffix(".py"), set()))
        elif len(cells) == 3 and tables:
            tables[-1][1].update(re.findall(r"`(--[\w.-]+)", cells[1]))
    return tables


def test_flags_that_stand_for_those_of_other_projects_exist():
    tables = translated_flags()
    assert len(tables) == 6 and sum(len(flags) for _, flags in tables) > 60
    for program, flags in tables:
        main = program_module(program).main
        module = importlib.import_module(main.__module__)
        unknown = flags - flags_of(getattr(module, "Options", None) or module.DownloadConfig)
        assert not unknown, f"{program}: {unknown}"


def test_every_project_stands_side_by_side_with_ours():
    text = (ROOT / "docs/from_other_projects.md").read_text("utf-8")
    for part in text.split("\n## ")[1:]:
        assert re.search(r"```text\n.*?```\s+```bash\n", part, flags=re.S), part.splitlines()[0]
