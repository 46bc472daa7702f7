"""Which processors the compiled code is for, and that what is for the lesser ones runs on the better ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import compiler

ROOT = Path(__file__).parents[2]
KERNELS = (
    "dalle/test_engines.py",
    "kernels/test_train_block.py",
    "kernels/test_train_heads.py",
    "kernels/test_encode.py",
    "kernels/test_swap.py",
)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((*compiler.LEVELS["avx512"], *compiler.LEVELS["avx2"]), "avx512"),
        ((*compiler.LEVELS["avx512"][:-3], "avx2", "fma", "f16c"), "avx2"),  # AVX512 without bfloat16
        (("avx", "fma", "f16c"), ""),
        ((), ""),
    ],
)
def test_the_level_is_the_best_that_the_processor_reaches(monkeypatch, flags, expected):
    monkeypatch.delenv(compiler.LEVEL_VARIABLE, raising=False)
    monkeypatch.setattr(compiler, "cpu_flags", lambda: frozenset(flags))
    assert compiler.level() == expected


def test_the_level_can_be_lowered(monkeypatch):
    flags = frozenset((*compiler.LEVELS["avx512"], *compiler.LEVELS["avx2"]))
    monkeypatch.setattr(compiler, "cpu_flags", lambda: flags)
    monkeypatch.setenv(compiler.LEVEL_VARIABLE, "avx2")
    assert compiler.level() == "avx2"
    monkeypatch.setenv(compiler.LEVEL_VARIABLE, "sse")
    with pytest.raises(ValueError, match="must be one of avx512, avx2, not 'sse'"):
        compiler.level()


@pytest.mark.skipif(not compiler.level(), reason="a CPU without compiled kernels")
def test_a_compiler_may_come_with_arguments(tmp_path, monkeypatch):
    """ccache g++, g++ -march=...: the words of a shell, quotes included."""
    log = tmp_path / "a wrapper"
    log.write_text('#!/bin/sh\necho "$@" > "$(dirname "$0")/said"\nshift\nexec "$@"\n')
    log.chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CXX", f"'{log}' --first g++ -DX=1")
    source = tmp_path / "one.cpp"
    source.write_text('extern "C" int one() { return X; }')
    assert compiler.compile_and_open(source).one() == 1
    assert (tmp_path / "said").read_text().startswith("--first g++ -DX=1 -std=c++17")
    monkeypatch.setenv("CXX", "none-such g++")
    with pytest.raises(OSError, match="none-such"):
        compiler.compile_and_open(source)


@pytest.mark.slow
@pytest.mark.skipif(compiler.level() != "avx512", reason="a CPU that runs the lesser kernels anyway, or none")
def test_kernels_of_avx2_on_a_better_processor():
    tests = [str(ROOT / "tests" / name) for name in KERNELS]
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=ROOT,
        env={**os.environ, compiler.LEVEL_VARIABLE: "avx2"},
        check=True,
    )
