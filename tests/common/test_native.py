"""Which processors the compiled code is for, and that what is for the lesser ones runs on the better ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import native

ROOT = Path(__file__).parents[2]
KERNELS = (
    "dalle/test_fast.py",
    "dalle/test_train_native.py",
    "dalle/test_train_heads.py",
    "vq/test_native_encoder.py",
)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((*native.LEVELS["avx512"], *native.LEVELS["avx2"]), "avx512"),
        ((*native.LEVELS["avx512"][:-3], "avx2", "fma", "f16c"), "avx2"),  # AVX512 without bfloat16
        (("avx", "fma", "f16c"), ""),
        ((), ""),
    ],
)
def test_the_level_is_the_best_that_the_processor_reaches(monkeypatch, flags, expected):
    monkeypatch.delenv(native.LEVEL_VARIABLE, raising=False)
    monkeypatch.setattr(native, "cpu_flags", lambda: frozenset(flags))
    assert native.level() == expected


def test_the_level_can_be_lowered(monkeypatch):
    flags = frozenset((*native.LEVELS["avx512"], *native.LEVELS["avx2"]))
    monkeypatch.setattr(native, "cpu_flags", lambda: flags)
    monkeypatch.setenv(native.LEVEL_VARIABLE, "avx2")
    assert native.level() == "avx2"
    monkeypatch.setenv(native.LEVEL_VARIABLE, "sse")
    with pytest.raises(ValueError, match="must be one of avx512, avx2, not 'sse'"):
        native.level()


@pytest.mark.skipif(not native.level(), reason="a CPU without compiled kernels")
def test_a_compiler_may_come_with_arguments(tmp_path, monkeypatch):
    """ccache g++, g++ -march=...: the words of a shell, quotes included."""
    log = tmp_path / "a wrapper"
    log.write_text('#!/bin/sh\necho "$@" > "$(dirname "$0")/said"\nshift\nexec "$@"\n')
    log.chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CXX", f"'{log}' --first g++ -DX=1")
    source = tmp_path / "one.cpp"
    source.write_text('extern "C" int one() { return X; }')
    assert native.library.__wrapped__(source).one() == 1
    assert (tmp_path / "said").read_text().startswith("--first g++ -DX=1 -std=c++17")
    monkeypatch.setenv("CXX", "none-such g++")
    with pytest.raises(OSError, match="none-such"):
        native.library.__wrapped__(source)


@pytest.mark.slow
@pytest.mark.skipif(native.level() != "avx512", reason="a CPU that runs the lesser kernels anyway, or none")
def test_kernels_of_avx2_on_a_better_processor():
    tests = [str(ROOT / "tests" / name) for name in KERNELS]
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=ROOT,
        env={**os.environ, native.LEVEL_VARIABLE: "avx2"},
        check=True,
    )
