"""A whole generator checkpoint (small_checkpoint.py), written once, and its pipeline."""

from pathlib import Path

import pytest
from small_checkpoint import write_generator

from dalle.pipeline import TextToImage


@pytest.fixture(scope="session")
def generator_dir(tmp_path_factory) -> Path:
    """Read only."""
    return write_generator(tmp_path_factory.mktemp("generator") / "step_00000007")


@pytest.fixture(scope="session")
def pipeline(generator_dir) -> TextToImage:
    return TextToImage.from_pretrained(generator_dir, "cpu")
