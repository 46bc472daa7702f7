"""deploy/check_platforms.py: what pip says is a fake here; `python deploy/check_platforms.py` asks the real one."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("check_platforms", ROOT / "deploy/check_platforms.py")
platforms = importlib.util.module_from_spec(spec)
spec.loader.exec_module(platforms)


def names(platform: str) -> set[str]:
    return {p.name for p in platforms.pins([ROOT / "requirements.txt"], platforms.environment(platform))}


def test_what_each_platform_is_asked_for():
    everywhere = names("windows") & names("macos-arm") & names("linux-x86")
    assert {"torch", "numpy", "transformers"} <= everywhere and names("linux-arm") == names("linux-x86")
    only_linux = names("linux-x86") - everywhere
    assert {"deepspeed", "triton"} < only_linux
    assert {n for n in only_linux if not n.startswith(("nvidia-", "cuda-"))} == {"deepspeed", "triton"}
    assert names("windows") - everywhere == {"colorama"} and names("macos-arm") == everywhere


def package(name: str, version: str, *requires: str) -> dict:
    return {"metadata": {"name": name, "version": version, "requires_dist": list(requires)}}


def test_what_a_package_requires_there():
    found = [
        package("a", "1.0", "b>=2", "c; sys_platform == 'linux'", "d; extra == 'more'", "E_f==1.*"),
        package("b", "1.5", "g"),
        package("e-f", "1.2"),
    ]
    windows, linux = (
        platforms.misfits(found, ["g"], platforms.environment(p)) for p in ("windows", "linux-arm")
    )
    assert windows == ["a requires b>=2, pinned is 1.5"]
    expected = 'a requires c; sys_platform == "linux", which is not pinned there'
    assert [line.replace("'", '"') for line in linux] == [*windows, expected]


@pytest.fixture
def pip(monkeypatch):
    """Has no wheel of `b`."""

    def run(command, **_):
        if "b==1" in command:
            said = "ERROR: Could not find a version that satisfies b==1\nERROR: No matching distribution found for b==1"
            return subprocess.CompletedProcess(command, 1, "", said)
        wanted = [word for word in command if "==" in word]
        report = {"install": [package(*word.split("==")) for word in wanted]}
        Path(command[command.index("--report") + 1]).write_text(json.dumps(report))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(platforms.subprocess, "run", run)


def test_a_pin_without_a_wheel_is_named(pip, tmp_path, capsys):
    (tmp_path / "r.txt").write_text("# pinned\na==1\nb==1; sys_platform != 'win32'\nc==2\n")
    flags = ["--requirements", str(tmp_path / "r.txt"), "--platforms", "macos-arm", "windows"]
    assert platforms.main(flags) == 1
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "macos-arm: 2 of 3 pins have wheels, 1 findings",
        "  no wheel of b",
        "windows: 2 of 2 pins have wheels, 0 findings",
    ]
