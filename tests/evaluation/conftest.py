"""Tiny checkpoints with random weights, written once; the helpers that write them live with their own parts' tests."""

import sys
from pathlib import Path

import pytest

for part in ("dalle", "rankers"):
    sys.path.append(str(Path(__file__).parent.parent / part))


@pytest.fixture(scope="session")
def generator_dir(tmp_path_factory) -> Path:
    """Read only."""
    from small_checkpoint import write_generator

    return write_generator(tmp_path_factory.mktemp("generator") / "step_00000007")
