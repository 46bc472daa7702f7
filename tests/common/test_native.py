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
