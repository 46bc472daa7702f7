"""Shared by all tests: one thread, here and in processes started from here, so that metrics do not hang on the machine;
and where the real material lies."""

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["LC_ALL"] = "C.UTF-8"  # pages are in English unless a test asks otherwise

import pytest
import torch

from kernels import compiler

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"

torch.set_num_threads(1)


SLOW_TIMEOUT_S = 1800


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run in which every test was skipped has shown nothing, and is no pass."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or exitstatus != pytest.ExitCode.OK:  # a worker of xdist has none
        return
    if reporter.stats.get("skipped") and not reporter.stats.get("passed"):
        reporter.write_line("every test was skipped: this run is no pass", red=True)
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.fixture
def goods() -> Path:
    """Folder of real product shards; skips where it is missing."""
    path = SHARED / "data" / "goods"
    if not path.is_dir():
        pytest.skip(f"no real images at {path}")
    return path


@pytest.fixture
def roberta() -> Path:
    """Folder of the Chinese RoBERTa vocabulary; skips where it is missing."""
    path = SHARED / "models" / "chinese-roberta-wwm-ext"
    if not path.is_dir():
        pytest.skip(f"no tokenizer vocabulary at {path}")
    return path


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    """A machine whose compiler fails, and which has nothing compiled yet."""
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(compiler, "prefers_torch", lambda: False)
    compiled = (compiler.load, compiler.unavailable_reason)
    for cached in compiled:
        cached.cache_clear()
    yield
    for cached in compiled:
        cached.cache_clear()
