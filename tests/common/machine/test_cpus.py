"""How many CPUs a container grants, as cgroups of both versions tell it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.machine import cpus

ROOT = Path(__file__).parents[3]


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def quota(tmp_path: Path, own: str) -> float | None:
    (tmp_path / "own").write_text(own)
    return cpus.cgroup_quota(tmp_path / "own", tmp_path / "sys")


def test_version_2_counts_the_groups_above_too(tmp_path):
    write(tmp_path / "sys/a/b", cpu__max="max 100000\n")
    write(tmp_path / "sys/a", cpu__max="150000 100000\n")
    assert quota(tmp_path, "0::/a/b\n") == 1.5
    write(tmp_path / "sys/a/b", cpu__max="50000 100000\n")
    assert quota(tmp_path, "0::/a/b\n") == 0.5


def test_version_1(tmp_path):
    own = "9:name=systemd:/\n4:cpu,cpuacct:/docker/x\n3:cpuset:/\n"
    write(tmp_path / "sys/cpu,cpuacct/docker/x", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    assert quota(tmp_path, own) is None
    write(tmp_path / "sys/cpu,cpuacct/docker/x", cpu__cfs_quota_us="200000\n", cpu__cfs_period_us="100000\n")
    assert quota(tmp_path, own) == 2.0


def test_a_group_that_is_mounted_as_the_root(tmp_path):
    """As a container sees its own."""
    write(tmp_path / "sys/cpu", cpu__cfs_quota_us="100000\n", cpu__cfs_period_us="50000\n")
    assert quota(tmp_path, "4:cpu:/docker/x\n") == 2.0
    write(tmp_path / "sys", cpu__max="300000 100000\n")
    assert quota(tmp_path, "0::/docker/x\n") == 3.0


def test_nothing_limits_it(tmp_path):
    assert quota(tmp_path, "0::/\n") is None
    assert cpus.cgroup_quota(tmp_path / "none") is None


@pytest.mark.parametrize(("granted", "expected"), [(0.3, 1), (1.2, 2), (64.0, None), (None, None)])
def test_available_cpus(monkeypatch, granted, expected):
    monkeypatch.setattr(cpus, "cgroup_quota", lambda: granted)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert cpus.available_cpus() == (expected or 8)


def environment(**given: str) -> str:
    base = {n: v for n, v in os.environ.items() if n not in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT")}
    code = "import os, common; print(os.environ.get('OMP_NUM_THREADS'), os.environ.get('GOMP_SPINCOUNT'))"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=base | given, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_what_the_user_has_set_stays():
    assert environment(OMP_NUM_THREADS="7", GOMP_SPINCOUNT="5") == "7 5"
    assert environment(OMP_WAIT_POLICY="active").endswith("None")
    assert environment().endswith("3000")
