"""Does requirements.txt resolve on machines that are not here? By pip itself, as far as wheels exist.

    python deploy/check_platforms.py
    python deploy/check_platforms.py --platforms macos-arm --timeout-s 1800

For each platform: environment markers as it would evaluate them; `pip install --dry-run --platform ...` of what is left
names the pins without a wheel for it; and whether the pins satisfy what every package that pip found requires on
that platform (pip itself evaluates a package's own markers for the machine it runs on). Nothing is installed, but an
index without separate metadata makes pip download the wheels, gigabytes where CUDA is among them. Exit code 1 where
something does not fit.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYTHON = "3.11"
SOURCE_ALONE = ("deepspeed",)  # published without wheels; its extensions are compiled when they are used
MISSING = re.compile(r"No matching distribution found for ([A-Za-z0-9_.-]+)==")


def _linux(machine: str) -> tuple[dict[str, str], list[str]]:
    marks = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
    tags = [f"manylinux_2_{minor}_{machine}" for minor in range(39, 16, -1)]
    return marks | {"platform_machine": machine}, [*tags, f"manylinux2014_{machine}", f"linux_{machine}"]


PLATFORMS: dict[str, tuple[dict[str, str], list[str]]] = {
    "linux-x86": _linux("x86_64"),
    "linux-arm": _linux("aarch64"),
    "macos-arm": (
        {
            "sys_platform": "darwin",
            "platform_system": "Darwin",
            "os_name": "posix",
            "platform_machine": "arm64",
        },
        ["macosx_14_0_arm64"],
    ),
    "windows": (
        {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt", "platform_machine": "AMD64"},
        ["win_amd64"],
    ),
}
"""Markers, and tags of wheels."""


def environment(platform: str) -> dict[str, str]:
    """Markers of CPython on it, for packaging."""
    marks = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "implementation_name": "cpython"}
    return marks | {"platform_python_implementation": "CPython", "extra": ""} | PLATFORMS[platform][0]


def pins(files: Sequence[Path], marks: dict[str, str]) -> list[Requirement]:
    """Those that the platform would install."""
    lines = [
        line.partition("#")[0].strip() for file in files for line in file.read_text("utf-8").splitlines()
    ]
    found = [Requirement(line) for line in lines if line]
    return [pin for pin in found if pin.marker is None or pin.marker.evaluate(marks)]


def ask_pip(wanted: Sequence[Requirement], platform: str, timeout_s: float) -> tuple[list[dict], list[str]]:
    """What pip would install, and the pins without a wheel. Raises RuntimeError with what else pip says."""
    wanted, missing = [f"{pin.name}{pin.specifier}" for pin in wanted], []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        fixed = [
            "--dry-run",
            "--no-deps",
            "--no-cache-dir",
            "--only-binary=:all:",
            "--python-version",
            PYTHON,
        ]
        fixed += ["--target", f"{folder}/none", "--report", str(report), "--quiet"]
        fixed += [word for tag in PLATFORMS[platform][1] for word in ("--platform", tag)]
        while True:
            command = [sys.executable, "-m", "pip", "install", *fixed, *wanted]
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
            if done.returncode == 0:
                return json.loads(report.read_text("utf-8"))["install"], missing
            if not (name := MISSING.search(done.stderr)):
                raise RuntimeError(done.stderr.strip()[-500:])
            missing.append(name[1])
            wanted = [pin for pin in wanted if not pin.startswith(f"{name[1]}==")]


def misfits(found: Sequence[dict], missing: Sequence[str], marks: dict[str, str]) -> list[str]:
    """What the packages of pip's report require there that is not pinned, or pinned otherwise."""
    versions = {canonicalize_name(e["metadata"]["name"]): e["metadata"]["version"] for e in found}
    known, wrong = {canonicalize_name(name) for name in missing}, []
    for each in found:
        for text in each["metadata"].get("requires_dist", []):
            needed = Requirement(text)
            name = canonicalize_name(needed.name)
            if (needed.marker and not needed.marker.evaluate(marks)) or name in known:
                continue
            if name not in versions:
                wrong.append(f"{each['metadata']['name']} requires {text}, which is not pinned there")
            elif not needed.specifier.contains(versions[name], prereleases=True):
                wrong.append(f"{each['metadata']['name']} requires {text}, pinned is {versions[name]}")
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line a finding; returns how many platforms have any."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--platforms", nargs="+", choices=PLATFORMS, default=list(PLATFORMS))
    parser.add_argument("--requirements", nargs="+", type=Path, default=[ROOT / "requirements.txt"])
    parser.add_argument("--timeout-s", type=float, default=3600, help="of one run of pip")
    options = parser.parse_args(argv)
    failed = 0
    for platform in options.platforms:
        marks = environment(platform)
        wanted = pins(options.requirements, marks)
        try:
            found, missing = ask_pip(wanted, platform, options.timeout_s)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            print(f"{platform}: not checked: {error}", flush=True)
            failed += 1
            continue
        lines = [f"no wheel of {name}" for name in missing if name not in SOURCE_ALONE]
        lines += misfits(found, missing, marks)
        print(
            f"{platform}: {len(found)} of {len(wanted)} pins have wheels, {len(lines)} findings", flush=True
        )
        for line in lines:
            print(f"  {line}", flush=True)
        failed += bool(lines)
    return failed


if __name__ == "__main__":
    sys.exit(min(1, main()))
