"""Every command of the pages on data and on the image tokenizer is read by its program without a complaint."""

import importlib
import re
import shlex
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from common.config import parse_options
from data_tools.clean import preset_to_config

ROOT = Path(__file__).parents[2]


def commands() -> list[str]:
    found = []
    for page in ("data.md", "image_tokenizer.md"):
        text = (ROOT / "docs" / page).read_text("utf-8")
        found += [
            line
            for block in re.findall(r"```bash\n(.*?)```", text, flags=re.S)
            for line in block.splitlines()
        ]
        found += re.findall(r"`(python [^`]+)`", text)
    return sorted({line.split(" #")[0].strip() for line in found} - {""})


@pytest.mark.parametrize("line", commands())
def test_a_command_parses(line):
    words = shlex.split(line)
    assert words[0] == "python", line
    module, arguments = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
    if module.endswith(".py"):
        assert (ROOT / module).is_file()
        module = module.removesuffix(".py").replace("/", ".")
    program = importlib.import_module(module)
    if module == "data_tools.clean":
        arguments = preset_to_config(arguments)
    options = [
        value
        for name, value in vars(program).items()
        if is_dataclass(value)
        and value.__module__ in (module, "vq.options")
        and (name == "Options" or name.endswith("Config"))
    ]
    at = [i for i, word in enumerate(arguments) if word == "--config"]
    if module == "vq.convert":  # its --config is the yaml of the foreign weights
        arguments = [word for i, word in enumerate(arguments) if i not in at and i - 1 not in at]
    own = [cls for cls in options if cls.__name__ != "Chunk"]
    assert len(own) == 1, own
    assert parse_options(own[0], arguments) is not None


def test_the_pages_show_every_program():
    said = " ".join(commands())
    shown = {m for m in re.findall(r"data_tools\.(\w+)", said)}
    programs = {
        path.stem for path in (ROOT / "data_tools").glob("*.py") if "\n@command\n" in path.read_text("utf-8")
    }
    assert programs - shown == {"synthetic"}, "the embedded default draws itself"
