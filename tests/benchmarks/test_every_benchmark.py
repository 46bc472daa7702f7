"""No benchmark is left behind by a change of what it measures: each can be imported and shows its options."""

import importlib
from pathlib import Path

import pytest

import benchmarks

FOLDER = Path(benchmarks.__path__[0])
NAMES = sorted(".".join(path.relative_to(FOLDER).with_suffix("").parts) for path in FOLDER.rglob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_imported(name):
    assert importlib.import_module(f"benchmarks.{name}").__doc__
