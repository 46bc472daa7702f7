"""No benchmark is left behind by a change of what it measures: each can be imported and shows its options."""

import importlib
from pathlib import Path

import pytest

import benchmarks

NAMES = sorted(path.stem for path in Path(benchmarks.__path__[0]).glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_imported(name):
    assert importlib.import_module(f"benchmarks.{name}").__doc__
