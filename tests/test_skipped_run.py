"""A run that skips everything is no pass."""

import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
SKIPPED = "def test_a():\n    pytest.skip('no data')\n"
PASSED = "def test_b():\n    pass\n"


@pytest.mark.parametrize(("tests", "code"), [(SKIPPED, 5), (SKIPPED + PASSED, 0), (PASSED, 0)])
def test_a_run_that_skips_everything_fails(tmp_path, tests, code):
    hook = CONFTEST.read_text("utf-8").partition("def pytest_sessionfinish")[2].partition("\n\n\n")[0]
    (tmp_path / "conftest.py").write_text(f"import pytest\ndef pytest_sessionfinish{hook}\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text(f"import pytest\n{tests}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == code, ended.stdout
    assert ("every test was skipped" in ended.stdout) is bool(code)
