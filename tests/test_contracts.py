"""The house's rules, read off the tree: import arrows, ASCII, configs. The linter watches complexity."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SCRIPTS = ["train_vqgan", "train_dalle", "generate", "rerank"]
ALLOWED = {
    "common": set(),
    "kernels": {"common"},
    "data_tools": {"common"},
    "vq": {"common", "data_tools"},
    "dalle": {"common", "data_tools", "vq"},
    # losses and frozen ImageNet features live in vq
    "rankers": {"common", "data_tools", "vq"},
    "diffusion": {"common", "data_tools", "vq"},
    "gan": {"common", "data_tools", "vq", "diffusion"},  # of the latter, white backgrounds
    "evaluation": {"common", "data_tools", "vq", "dalle", "rankers", "diffusion", "gan"},
    "serve": {"common", "data_tools", "vq", "dalle", "rankers", "diffusion", "gan"},
}
# kernels are switched on by scripts, engines and commands; a model's own files know nothing of them
USES_KERNELS = (
    "train_dalle.py", "dalle/engines/", "dalle/plan.py", "dalle/average.py", "vq/encode_shards.py", "vq/evaluate.py",
    "evaluation/", "benchmarks/", "tests/", "kernels/",
)  # fmt: skip
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
            wrong = imported & (set(ALLOWED) | set(SCRIPTS)) - ALLOWED[package] - {package, "kernels"}
            broken += [f"{path.relative_to(ROOT)} imports {name}" for name in sorted(wrong)]
        elif path.stem in SCRIPTS and path.parent == ROOT:
            broken += [
                f"{path.name} imports {name}" for name in sorted(imported & (set(SCRIPTS) | {"serve"}))
            ]
    assert not broken, broken


def imported_modules(tree: ast.AST, known: set[str]) -> set[str]:
    """Of `known`, those that are imported anywhere in a file, in its functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & known or {node.module}
    return found & known


def on_circles(imports: dict[str, set[str]]) -> set[str]:
    """Modules that import each other or stand between such: those left after taking away all that import none left,
    then all that none left imports."""
    left = dict(imports)
    while free := [m for m, others in left.items() if not others & left.keys()]:
        left = {m: others for m, others in left.items() if m not in free}
    while free := left.keys() - set().union(*left.values()):
        left = {m: others for m, others in left.items() if m not in free}
    return set(left)


def test_no_module_imports_itself_through_others():
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in python_files()
        if path.relative_to(ROOT).parts[0] not in ("tests", "benchmarks")
    }
    known = set(names)
    imports = {
        name: imported_modules(ast.parse(path.read_text("utf-8")), known - {name})
        for name, path in names.items()
    }
    assert not on_circles(imports)


def test_the_circle_test_sees_a_circle():
    tree = ast.parse("def f():\n    from a import b\nimport c.d")
    assert imported_modules(tree, {"a", "a.b", "c.d", "e"}) == {"a.b", "c.d"}
    circle = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert on_circles(circle) == {"b", "c"} and not on_circles(circle | {"c": {"d"}})


def test_only_who_switches_kernels_on_imports_them():
    users = [
        str(path.relative_to(ROOT))
        for path in python_files()
        if "kernels" in imported_packages(ast.parse(path.read_text("utf-8")))
    ]
    assert not [user for user in users if not user.startswith(USES_KERNELS)]


def test_compiled_code_stands_in_kernels_alone():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sources = [name for name in listed.split() if name.endswith((".cpp", ".h", ".cu"))]
    assert sources and all(name.startswith("kernels/csrc/") for name in sources)


def test_the_arrow_test_sees_a_forbidden_import():
    tree = ast.parse("def f():\n    from dalle.model import Dalle\n    import vq.model")
    assert imported_packages(tree) == {"dalle", "vq"}


def test_no_top_level_name_shadows_a_package():
    assert not FORBIDDEN_TOP_LEVEL & {p.stem for p in ROOT.iterdir()}


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
    "base": "diffusion.train_base",
    "controlnet": "diffusion.train_controlnet",
    "gan": "gan.train",
    "ecommerce": "diffusion.finetune",
    "emoji": "diffusion.train_lora",
    "poster": "diffusion.train_lora",
    "taiyi_lora": "diffusion.train_lora",
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
    assert stem == "judge" or options.loop.num_steps > 0  # a judge is fitted, not trained in steps


def imported_by(script: str) -> set[str]:
    """The project's modules that are loaded once a script is imported, before it does anything."""
    code = f"import sys, {script}; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in found.stdout.split() if name.split(".")[0] in ALLOWED}


@pytest.mark.parametrize(("script", "most"), [("generate", 58), ("train_dalle", 86)])
def test_scripts_import_what_every_run_needs(script, most):
    """What one flag needs is imported where the flag is read: rankers, files of prompts, compiled kernels, engines."""
    found = imported_by(script)
    assert {"common.config", "dalle.model", "vq.model", "kernels.report"} <= found
    unneeded = (
        "kernels.swap",
        "rankers",
        "data_tools.prompts",
        "dalle.engines.packed",
        "dalle.training.from_images",
    )
    assert not found & set(unneeded)
    assert len(found) <= most, sorted(found)
