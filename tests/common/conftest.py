"""Token shards for the toy run, and its undisturbed run to compare with."""

from pathlib import Path

import pytest
from processes import run
from toy_run import write_token_shards


@pytest.fixture(scope="session")
def tokens(tmp_path_factory) -> Path:
    """48 samples: an epoch is six steps of the toy run."""
    folder = tmp_path_factory.mktemp("toy") / "tokens"
    write_token_shards(folder, 48)
    return folder


@pytest.fixture(scope="session")
def plain_run(tokens, tmp_path_factory) -> Path:
    """Run directory of twelve steps on one plain process."""
    return run(tmp_path_factory.mktemp("plain") / "run", tokens)


@pytest.fixture(scope="session")
def muon_run(tokens, tmp_path_factory) -> Path:
    """The same with Muon."""
    return run(tmp_path_factory.mktemp("muon") / "run", tokens, "--optim.name", "muon")
